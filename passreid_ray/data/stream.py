"""Ordered batches of views from Ray Data, opened at any step by any number of workers.

Ray's own iterators forget their position. Here each worker opens its own stream over the numbers of the coming steps:
a task turns a step's number into the worker's slice of that global batch, reads and decodes its rows and makes their
views. The step is the only state.
"""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, cast

import numpy as np
import ray
from ray.data._internal.execution.execution_callback import ExecutionCallback

from passreid_ray.data.decode import BadImage
from passreid_ray.data.order import Order
from passreid_ray.data.rows import Rows
from passreid_ray.errors import UserError

MakeViews = Callable[[np.ndarray, int, str], dict[str, np.ndarray]]
"""(image_HWC_uint8, draw, image_id) -> named arrays; a pure function. What a draw is, ``Order`` says."""

# One execution of Ray Data costs seconds to start, and plans one task per step: this many steps keep both small.
STEPS_PER_EXECUTION = 4096
MAX_SUBSTITUTES = 100
SCHEDULING_PAUSE_SECONDS = 0.01


class _Pause(ExecutionCallback):
    """Lets go of the core and of Python's lock between the scheduling steps of a stream.

    While a stream is ahead of its reader, Ray Data's loop runs without waiting for anything: on a small machine it took
    twice the CPU time of the training that it was feeding, in the same process.
    """

    def on_execution_step(self, executor: Any) -> None:
        time.sleep(SCHEDULING_PAUSE_SECONDS)


@dataclass(frozen=True)
class Stream:
    """What one worker reads: its slice of every global batch from some step on."""

    rows: Any
    """``ray.put`` reference to ``Rows``."""
    order: Order
    make_views: MakeViews
    rank: int
    world_size: int

    def batches(self, start_step: int, end_step: int, *, num_cpus: float) -> Iterator[dict[str, np.ndarray]]:
        """Batches for steps ``start_step`` to ``end_step`` - 1, in order; at most ``num_cpus`` CPUs make them.

        A batch has the arrays of ``make_views``; ``row``, the number of each row; and ``bad``: for each row whose image
        could not be used, and was replaced as the order says, a JSON list of [image_id, reason]; "" for the others.
        """
        for first in range(start_step, end_step, STEPS_PER_EXECUTION):
            last = min(first + STEPS_PER_EXECUTION, end_step)
            steps = ray.data.range(last - first, override_num_blocks=last - first)
            views = steps.map_batches(partial(_make_batch, self, first), batch_size=1, num_cpus=1, zero_copy_batch=True)
            views.context.custom_execution_callback_classes = [_Pause]
            options = views.context.execution_options
            options.preserve_order = True
            # Without a limit every worker's stream believes that it owns all CPUs.
            options.resource_limits = options.resource_limits.copy(cpu=max(1.0, num_cpus))
            batches = views.iter_batches(
                batch_size=self.order.batch_size // self.world_size, batch_format="numpy", prefetch_batches=2
            )
            yield from cast(Iterator[dict[str, np.ndarray]], batches)


def read_batch(
    rows: Rows, order: Order, step: int, make_views: MakeViews, rank: int = 0, world_size: int = 1
) -> dict[str, np.ndarray]:
    """One worker's batch at ``step``, made in this process: what a stream yields for that step."""
    draws, numbers = order.batch(step, rank, world_size)
    drawn = zip(draws.tolist(), numbers.tolist(), strict=True)
    made = [_read_row(rows, order, draw, number, make_views) for draw, number in drawn]
    return {name: np.stack([one[name] for one in made]) for name in made[0]}


def _make_batch(stream: Stream, first: int, batch: Any) -> dict[str, np.ndarray]:
    step = first + int(batch["id"][0])
    rows = _rows(stream.rows)
    return read_batch(rows, stream.order, step, stream.make_views, stream.rank, stream.world_size)


@lru_cache(maxsize=2)
def _rows(reference: Any) -> Rows:
    # One copy per worker process of Ray Data, not one per task.
    return cast(Rows, ray.get(reference))


def _read_row(rows: Rows, order: Order, draw: int, number: int, make_views: MakeViews) -> dict[str, np.ndarray]:
    bad: list[tuple[str, str]] = []
    for attempt in range(min(MAX_SUBSTITUTES, order.num_rows)):
        candidate = order.substitute(draw, number, attempt) if attempt else number
        image_id = str(rows.image_ids[candidate])
        try:
            image = rows.image(candidate)
        except BadImage as error:
            bad.append((image_id, error.reason))
            continue
        return {
            **make_views(image, draw, image_id),
            "row": np.array(candidate),
            "bad": np.array(json.dumps(bad) if bad else "", dtype=object),
        }
    image_id, reason = bad[0]
    raise UserError(f"data: {len(bad)} images in a row cannot be used, the first: {image_id}: {reason}")
