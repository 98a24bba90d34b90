"""Ordered batches from Ray Data, opened at any step by any number of workers.

Ray's own iterators forget their position. Here each worker opens its own stream over the coming steps: a task turns
steps into the worker's slices of those global batches. The step is the only state.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any, cast

import numpy as np
import pyarrow as pa
import ray

from passreid_ray.data.decode import BadImage
from passreid_ray.data.execution import DataShare, execute
from passreid_ray.data.order import EpochwiseOrder, Order
from passreid_ray.data.rows import Rows
from passreid_ray.data.substitutes import BadImages, usable_image

MakeViews = Callable[[np.ndarray, int, str], dict[str, np.ndarray]]
"""(image_HWC_uint8, draw, image_id) -> named arrays; a pure function. What a draw is, ``Order`` says."""

# Starting an execution of Ray Data takes seconds, and a plan of very many tasks takes memory.
TASKS_PER_EXECUTION = 4096
MAX_WINDOW_TASKS = 2
"""Tasks of one worker that each hold a window of encoded images: one is used while the next is read."""
SCATTERED_STEPS = 16
"""Steps that a task reads whose images lie one by one."""


@dataclass(frozen=True)
class Stream:
    """Views of one worker's slice of every global batch from some step on, made in tasks."""

    rows: Any
    """``ray.put`` reference to ``Rows``."""
    order: Order
    make_views: MakeViews
    rank: int
    world_size: int

    def batches(self, start_step: int, end_step: int, share: DataShare) -> Iterator[dict[str, np.ndarray]]:
        """Batches for steps ``start_step`` to ``end_step`` - 1, in order.

        A batch has the arrays of ``make_views``; ``row``, the number of each row; and ``bad``: for each row whose image
        could not be used, and was replaced as the order says, a JSON list of [image_id, reason]; "" for the others.
        """
        size = self.order.batch_size // self.world_size
        for first in range(start_step, end_step, TASKS_PER_EXECUTION):
            steps = range(first, min(first + TASKS_PER_EXECUTION, end_step))
            yield from execute(self._make, steps, share, batch_size=size, batch_format="numpy")

    def _make(self, step: int) -> dict[str, np.ndarray]:
        return read_batch(_rows(self.rows), self.order, step, self.make_views, self.rank, self.world_size)


@dataclass(frozen=True)
class EncodedStream:
    """Encoded images of one worker's slice of every global batch from some step on."""

    rows: Any
    """``ray.put`` reference to ``Rows``."""
    order: EpochwiseOrder
    rank: int
    world_size: int

    def batches(self, start_step: int, end_step: int, share: DataShare) -> Iterator[pa.Table]:
        """Batches for steps ``start_step`` to ``end_step`` - 1, in order: tables of ``row``, ``draw``, ``image_id``,
        ``image`` (bytes; null when it cannot be read) and ``reason`` (why not; else null).
        """
        size = self.order.batch_size // self.world_size
        runs = self._runs(start_step, end_step)
        max_tasks = MAX_WINDOW_TASKS if _rows(self.rows).reads_in_groups else None
        while plan := list(islice(runs, TASKS_PER_EXECUTION)):
            yield from execute(self._read, plan, share, batch_size=size, batch_format="pyarrow", max_tasks=max_tasks)

    def _runs(self, start_step: int, end_step: int) -> Iterator[range]:
        """Runs of steps, each to be read by one task."""
        reads_in_groups = _rows(self.rows).reads_in_groups
        step = start_step
        while step < end_step:
            last = self.order.window_end(step) if reads_in_groups else step + SCATTERED_STEPS
            yield range(step, min(last, end_step))
            step = last

    def _read(self, steps: range) -> Iterator[pa.Table]:
        yield from read_encoded(_rows(self.rows), self.order, steps, self.rank, self.world_size)


def read_encoded(rows: Rows, order: Order, steps: range, rank: int = 0, world_size: int = 1) -> Iterator[pa.Table]:
    """One worker's encoded batches of ``steps``, read in this process: what ``EncodedStream`` yields for them."""
    together = [steps] if rows.reads_in_groups else [range(step, step + 1) for step in steps]
    for own in together:
        batches = [order.batch(step, rank, world_size) for step in own]
        images = rows.read_many(np.concatenate([numbers for _, numbers in batches]))
        for place, (draws, numbers) in enumerate(batches):
            first = place * len(numbers)
            yield _encoded_table(rows, draws, numbers, images[first : first + len(numbers)])


def _encoded_table(rows: Rows, draws: np.ndarray, numbers: np.ndarray, images: list[bytes | BadImage]) -> pa.Table:
    return pa.table(
        {
            "row": numbers,
            "draw": draws,
            "image_id": rows.table["image_id"].take(pa.array(numbers)),
            "image": pa.array([None if isinstance(image, BadImage) else image for image in images], pa.binary()),
            "reason": pa.array([getattr(image, "reason", None) for image in images], pa.string()),
        }
    )


def read_batch(
    rows: Rows, order: Order, step: int, make_views: MakeViews, rank: int = 0, world_size: int = 1
) -> dict[str, np.ndarray]:
    """One worker's batch at ``step``, made in this process: what a stream yields for that step."""
    draws, numbers = order.batch(step, rank, world_size)
    drawn = zip(draws.tolist(), numbers.tolist(), strict=True)
    made = [_read_row(rows, order, draw, number, make_views) for draw, number in drawn]
    return {name: np.stack([one[name] for one in made]) for name in made[0]}


def bad_images(batch: dict[str, np.ndarray]) -> BadImages:
    """The images that a batch of ``Stream`` should have held and that could not be used."""
    return [(image_id, reason) for entry in batch["bad"] if entry for image_id, reason in json.loads(entry)]


def _read_row(rows: Rows, order: Order, draw: int, number: int, make_views: MakeViews) -> dict[str, np.ndarray]:
    image_HWC, used, bad = usable_image(rows, order, draw, number)
    return {
        **make_views(image_HWC, draw, str(rows.table["image_id"][used])),
        "row": np.array(used),
        "bad": np.array(json.dumps(bad) if bad else "", dtype=object),
    }


@lru_cache(maxsize=2)
def _rows(reference: Any) -> Rows:
    # One copy per worker process of Ray Data, not one per task.
    return cast(Rows, ray.get(reference))
