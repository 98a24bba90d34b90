"""In which order rows are seen: a pure function of the seed and the step, the same for every number of workers."""

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Literal, Protocol

import numpy as np

from passreid_ray.errors import UserError

Rest = Literal["drop", "carry"]
"""The rows of an epoch that do not fill a batch: left out, or put before those of the next epoch."""


class Order(Protocol):
    """What a stream asks: which rows make up the batch of a step, and which draw of their random views."""

    @property
    def batch_size(self) -> int:
        """Images of a global batch, over all workers together."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows of the data that is ordered."""
        ...

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(draws, row numbers) of one worker's slice of the global batch at ``step``: two int arrays of one length.

        A row's draw is the number that decides its random views, together with the seed and the image_id. The slices
        of all workers, in the order of their ranks, are the global batch.
        """
        ...

    def substitute(self, draw: int, row: int, attempt: int) -> int:
        """The row that takes the place of one that cannot be read, after ``attempt`` - 1 others could not either.

        It depends on nothing but the order, so it is the same for every number of workers.
        """
        ...


class EpochwiseOrder(Order, Protocol):
    """An order that goes through the data again and again."""

    @property
    def steps_per_epoch(self) -> Fraction:
        """Global batches in an epoch; whole unless the rest of an epoch is carried over."""
        ...

    def window_end(self, step: int) -> int:
        """End of the steps from ``step`` on whose rows lie together, and are best read in one go."""
        ...


@dataclass(frozen=True)
class EpochOrder:
    """Every epoch is a permutation of all rows, cut into global batches that any number of workers can share."""

    num_rows: int
    batch_size: int
    """Images of a global batch, over all workers together."""
    seed: int
    rest: Rest = "drop"

    def __post_init__(self) -> None:
        check_batch_size(self.batch_size, self.num_rows)

    @property
    def steps_per_epoch(self) -> Fraction:
        """Global batches in an epoch; whole unless the rest of an epoch is carried over."""
        return steps_per_epoch(self.num_rows, self.batch_size, self.rest)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(draws, row numbers) of one worker's slice of the global batch at ``step``; the draw is the epoch."""
        share = self.batch_size // world_size
        first = step * self.batch_size + rank * share
        epochs, offsets = np.divmod(np.arange(first, first + share), int(self.steps_per_epoch * self.batch_size))
        numbers = np.empty(share, np.int64)
        for epoch in np.unique(epochs).tolist():
            mask = epochs == epoch
            numbers[mask] = permutation(self.num_rows, self.seed, epoch)[offsets[mask]]
        return epochs, numbers

    def window_end(self, step: int) -> int:
        """The first step after ``step`` that begins in another epoch."""
        return first_step(step // self.steps_per_epoch + 1, self.steps_per_epoch)

    def substitute(self, draw: int, row: int, attempt: int) -> int:
        """The row that takes the place of one that cannot be read: the ``attempt``-th after it in the epoch's order.

        It depends on nothing but the order, so it is the same for every number of workers.
        """
        order = permutation(self.num_rows, self.seed, draw)
        return int(order[(int(np.flatnonzero(order == row)[0]) + attempt) % self.num_rows])


def check_batch_size(batch_size: int, num_rows: int) -> None:
    """Raise ``UserError`` when the data does not fill one batch."""
    if batch_size > num_rows:
        raise UserError(
            f"batch_size: {batch_size} images per batch, but the data has {num_rows}; "
            f"set batch_size to {num_rows} or less, or give more data"
        )


def steps_per_epoch(num_rows: int, batch_size: int, rest: Rest) -> Fraction:
    """Global batches in an epoch: whole ones, or with its rest carried over into the next epoch's first batch."""
    return Fraction(num_rows // batch_size) if rest == "drop" else Fraction(num_rows, batch_size)


def first_step(epoch: int, steps_per_epoch: Fraction | int) -> int:
    """The first step that begins in ``epoch``."""
    return math.ceil(epoch * steps_per_epoch)


@lru_cache(maxsize=2)
def permutation(num: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0 to ``num`` - 1 in the order of an epoch. Do not write to it: it is shared."""
    return np.random.default_rng([seed, epoch]).permutation(num)
