"""A training run on a cluster, watched from outside: how far it is, what a fault cost it, how it ended."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from passreid_ray.config import to_toml
from passreid_ray.train.state_files import find_checkpoint, load_state
from tests.cluster.hosts import HEAD
from tests.cluster.ray_nodes import RayNodes
from tests.engines.killing import losses
from tests.engines.micro import STEPS_PER_EPOCH, micro_config

EPOCHS = 20
LAST_STEP = EPOCHS * STEPS_PER_EPOCH
POLL_SECONDS = 0.02
LIMIT_SECONDS = 400.0
"""Of every wait: far more than any takes, so that a test fails instead of waiting for ever."""


@dataclass(frozen=True)
class Recovery:
    """What a fault cost."""

    steps_lost: int
    """Steps that were done again: those since the last checkpoint."""
    seconds: float
    """From the fault to the first step that had not been done before it."""


class WatchedRun:
    """``jobs/pretrain.py`` with two workers on the nodes of a cluster; ``with`` kills what has not ended by itself."""

    def __init__(self, nodes: RayNodes, output: Path) -> None:
        self._nodes = nodes
        self._log = output / "said.log"
        output.mkdir(exist_ok=True)
        self._preset = output / "micro.toml"
        config = micro_config(
            output,
            epochs=EPOCHS,
            run={"output": str(output), "storage": str(output)},
            evaluation={},
            workers={"num_workers": 2, "max_failures": -1},
        )
        self.folder = config.run.folder
        self._preset.write_text(to_toml(config), encoding="utf-8")
        self._process = self._start()

    def __enter__(self) -> "WatchedRun":
        return self

    def __exit__(self, *exc: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _start(self) -> subprocess.Popen[str]:
        return self._nodes.start_job("pretrain.py", [str(self._preset)], self._log, HEAD)

    def give_again(self) -> None:
        """The same command, once the first has ended."""
        assert self._process.poll() is not None
        self._process = self._start()

    @property
    def step(self) -> int:
        """The last step in the run's records."""
        return max(losses(self.folder), default=0)

    @property
    def said(self) -> str:
        """All that the job has printed."""
        return self._log.read_text(errors="replace")

    def continued(self) -> list[int]:
        """The steps after which it went on, one for each time that it was started or restarted."""
        return [int(step) for step in re.findall(r"(?:continuing|going on) after step (\d+)", self.said)]

    def wait_for_step(self, step: int) -> None:
        """Wait until ``step`` is done."""
        self._wait(lambda: self.step >= step, f"step {step}")

    @contextlib.contextmanager
    def fault(self) -> Iterator[list[Recovery]]:
        """What the fault cost that the body makes, once the run does new steps; the body may mend it as well."""
        found: list[Recovery] = []
        start, times, done = time.monotonic(), len(self.continued()), self.step
        yield found
        while len(self.continued()) == times:
            done = max(done, self.step)
            self._check(start, "it goes on")
        self._wait(lambda: self.step > done, f"step {done + 1}")
        found.append(Recovery(done - self.continued()[times], time.monotonic() - start))

    def finish(self) -> None:
        """Wait until the run is done; it must end well."""
        self._wait(lambda: self._process.poll() is not None, "the end", may_end=True)
        assert self._process.poll() == 0, self.report("the job failed")

    def wait_for_death(self) -> None:
        """Wait until the job's process has ended, in whatever way."""
        self._process.wait(LIMIT_SECONDS)

    def _wait(self, is_time: Callable[[], bool], what: str, *, may_end: bool = False) -> None:
        start = time.monotonic()
        while not is_time():
            self._check(start, what, may_end=may_end)

    def _check(self, start: float, what: str, *, may_end: bool = False) -> None:
        time.sleep(POLL_SECONDS)
        assert may_end or self._process.poll() is None, self.report(f"the job ended before {what}")
        assert time.monotonic() < start + LIMIT_SECONDS, self.report(f"waited too long for {what}")

    def report(self, why: str) -> str:
        """``why``, what the job said and what the nodes did."""
        return f"{why}; at step {self.step}\n{self.said}\n{self._nodes.logs()}"

    def tensors(self) -> dict[str, np.ndarray]:
        """Everything that training changed, from the last checkpoint."""
        return {name: value.numpy() for name, value in load_state(find_checkpoint(self.folder))[0].items()}


def assert_equal(run: WatchedRun, undisturbed: WatchedRun) -> None:
    """All steps, the loss of each and the whole last state are the same, to the bit.

    A step that saw other rows, or the same in another order, would have another loss.
    """
    assert list(losses(run.folder)) == list(range(1, LAST_STEP + 1))
    assert losses(run.folder) == losses(undisturbed.folder)
    got, expected = run.tensors(), undisturbed.tensors()
    assert got.keys() == expected.keys()
    assert [name for name, value in got.items() if not np.array_equal(value, expected[name])] == []
