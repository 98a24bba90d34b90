"""What every worker of a run notes about itself: when it began, when its steps ended, how long its reports took.

The pre-training engine runs as it is; its step and Ray Train's ``report`` are timed where it calls them.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from unittest.mock import patch

import ray.train

from passreid_ray.engines import pretrain
from passreid_ray.train.worker import WorkerContext

Result = TypeVar("Result")
Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Span:
    """A time of day, in seconds since 1970, so that processes of one machine can be compared."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end - self.start


@dataclass(frozen=True)
class Marks:
    """Of one worker."""

    rank: int
    work: Span
    """The training function."""
    steps: list[Span]
    """Each call of the step; the wait for its batch is not in it."""
    reports: list[Span]
    """Each call of ``ray.train.report``, which is a barrier for all workers."""
    asks: list[Span]
    """Each time that the board was asked whether to stop: once for every record, by every worker, waiting."""

    def write(self, folder: Path) -> None:
        """Into a file of this rank's in ``folder``."""
        (folder / f"marks_{self.rank}.json").write_text(json.dumps(asdict(self)), encoding="utf-8")


def read_marks(folder: Path) -> list[Marks]:
    """Those of all workers that wrote into ``folder``, by rank."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("marks_*.json")]
    marks = [
        Marks(
            each["rank"],
            Span(**each["work"]),
            [Span(**span) for span in each["steps"]],
            [Span(**span) for span in each["reports"]],
            [Span(**span) for span in each["asks"]],
        )
        for each in found
    ]
    return sorted(marks, key=lambda each: each.rank)


class MarkedWorker:
    """The training function of pre-training, which leaves its ``Marks`` in ``folder`` when it ends."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, loop_config: dict[str, Any]) -> None:
        start = time.time()
        steps: list[Span] = []
        reports: list[Span] = []
        asks: list[Span] = []
        with (
            patch.object(pretrain, "train_step", timed(pretrain.train_step, steps)),
            patch.object(ray.train, "report", timed(ray.train.report, reports)),
            patch.object(WorkerContext, "stop_if_told", timed(WorkerContext.stop_if_told, asks)),
        ):
            # Looked up here, not kept from before: in the driver this object is pretrain.train_worker, and a function
            # that is no longer found under its name travels with globals of its own, in which nothing is patched.
            pretrain.train_worker(loop_config)
        rank = ray.train.get_context().get_world_rank()
        Marks(rank, Span(start, time.time()), steps, reports, asks).write(self._folder)


def timed(function: Callable[Arguments, Result], spans: list[Span]) -> Callable[Arguments, Result]:
    """``function``, which adds the span of each call to ``spans``."""

    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        start = time.time()
        result = function(*args, **kwargs)
        spans.append(Span(start, time.time()))
        return result

    return call
