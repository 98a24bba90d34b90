"""Ordered batches of views from Ray Data, opened at any step by any number of workers.

Ray's own iterators forget their position. Here each worker opens its own stream over the numbers of the coming steps: a
task turns a step's number into the worker's slice of that global batch, reads and decodes its rows and makes their views.
The step is the only state.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import numpy as np
import ray

from passreid_ray.data.decode import BadImage
from passreid_ray.data.order import EpochOrder
from passreid_ray.data.rows import Rows

MakeViews = Callable[[np.ndarray, int, str], dict[str, np.ndarray]]
"""(image_HWC_uint8, epoch, image_id) -> named arrays; a pure function."""

# One execution of Ray Data costs seconds to start, and plans one task per step: this many steps per execution keep both small.
STEPS_PER_EXECUTION = 4096
MAX_SUBSTITUTES = 100


@dataclass(frozen=True)
class Stream:
    """What one worker reads: its slice of every global batch from some step on."""

    rows: Any
    """``ray.put`` reference to ``Rows``."""
    order: EpochOrder
    make_views: MakeViews
    rank: int
    world_size: int

    def batches(self, start_step: int, end_step: int, *, num_cpus: float) -> Iterator[dict[str, np.ndarray]]:
        """Batches for steps ``start_step`` to ``end_step`` - 1, in order; at most ``num_cpus`` CPUs make them.

        A batch has the arrays of ``make_views``, and under ``bad`` a JSON-able record ("" for none) for each row whose
        image could not be used and was replaced by the next one of the epoch.
        """
        for first in range(start_step, end_step, STEPS_PER_EXECUTION):
            last = min(first + STEPS_PER_EXECUTION, end_step)
            steps = ray.data.range(last - first, override_num_blocks=last - first)
            views = steps.map_batches(
                _make_batch, batch_size=1, fn_kwargs={"stream": self, "first": first}, num_cpus=1, zero_copy_batch=True
            )
            options = views.context.execution_options
            options.preserve_order = True
            # Without a limit every worker's stream believes that it owns all CPUs.
            options.resource_limits = options.resource_limits.copy(cpu=max(1.0, num_cpus))
            yield from views.iter_batches(
                batch_size=self.order.batch_size // self.world_size, batch_format="numpy", prefetch_batches=2
            )


def read_batch(
    rows: Rows, order: EpochOrder, step: int, make_views: MakeViews, rank: int = 0, world_size: int = 1
) -> dict:
    """One worker's batch at ``step``, made in this process: what a stream yields for that step."""
    epoch, numbers = order.batch(step, rank, world_size)
    made = [_read_row(rows, order, epoch, int(number), make_views) for number in numbers]
    return {name: np.stack([one[name] for one in made]) for name in made[0]}


def _make_batch(batch: dict[str, np.ndarray], stream: Stream, first: int) -> dict[str, np.ndarray]:
    step = first + int(batch["id"][0])
    rows = _rows(stream.rows)
    return read_batch(rows, stream.order, step, stream.make_views, stream.rank, stream.world_size)


@lru_cache(maxsize=2)
def _rows(reference: Any) -> Rows:
    # One copy per worker process of Ray Data, not one per task.
    return cast(Rows, ray.get(reference))


def _read_row(rows: Rows, order: EpochOrder, epoch: int, number: int, make_views: MakeViews) -> dict[str, np.ndarray]:
    bad: list[str] = []
    for attempt in range(min(MAX_SUBSTITUTES, order.num_rows)):
        candidate = order.substitute(epoch, number, attempt) if attempt else number
        image_id = str(rows.image_ids[candidate])
        try:
            image = rows.image(candidate)
        except BadImage as error:
            bad.append(f"{image_id}\t{error}")
            continue
        return {**make_views(image, epoch, image_id), "bad": np.array("\n".join(bad), dtype=object)}
    raise BadImage(f"{MAX_SUBSTITUTES} images in a row cannot be used, the first: {bad[0]}")
