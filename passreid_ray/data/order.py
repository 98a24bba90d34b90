"""In which order rows are seen: a pure function of the seed and the step, the same for every number of workers."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from passreid_ray.errors import UserError


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


@dataclass(frozen=True)
class EpochOrder:
    """Every epoch is a permutation of the rows, cut into global batches of one size; the rest of it is dropped."""

    num_rows: int
    batch_size: int
    """Images of a global batch, over all workers together."""
    seed: int

    def __post_init__(self) -> None:
        if self.batch_size > self.num_rows:
            raise UserError(
                f"batch_size: {self.batch_size} images per batch, but the data has {self.num_rows}; "
                f"set batch_size to {self.num_rows} or less, or give more data"
            )

    @property
    def steps_per_epoch(self) -> int:
        """Whole global batches in an epoch."""
        return self.num_rows // self.batch_size

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(draws, row numbers) of one worker's slice of the global batch at ``step``; the draw is the epoch."""
        epoch, position = divmod(step, self.steps_per_epoch)
        share = self.batch_size // world_size
        start = position * self.batch_size + rank * share
        return np.full(share, epoch), permutation(self.num_rows, self.seed, epoch)[start : start + share]

    def substitute(self, draw: int, row: int, attempt: int) -> int:
        """The row that takes the place of one that cannot be read: the ``attempt``-th after it in the epoch's order.

        It depends on nothing but the order, so it is the same for every number of workers.
        """
        order = permutation(self.num_rows, self.seed, draw)
        return int(order[(int(np.flatnonzero(order == row)[0]) + attempt) % self.num_rows])


@lru_cache(maxsize=2)
def permutation(num: int, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0 to ``num`` - 1 in the order of an epoch. Do not write to it: it is shared."""
    return np.random.default_rng([seed, epoch]).permutation(num)
