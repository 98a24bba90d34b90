"""In which order rows are seen: a pure function of the seed and the step, the same for every number of workers."""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from passreid_ray.errors import UserError


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

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[int, np.ndarray]:
        """(epoch, row numbers) of one worker's slice of the global batch at ``step``."""
        epoch, position = divmod(step, self.steps_per_epoch)
        share = self.batch_size // world_size
        start = position * self.batch_size + rank * share
        return epoch, self._permutation(epoch)[start : start + share]

    def substitute(self, epoch: int, row: int, attempt: int) -> int:
        """The row that takes the place of one that cannot be read: the ``attempt``-th after it in the epoch's order.

        It depends on nothing but the order, so it is the same for every number of workers.
        """
        order = self._permutation(epoch)
        return int(order[(int(np.flatnonzero(order == row)[0]) + attempt) % self.num_rows])

    def _permutation(self, epoch: int) -> np.ndarray:
        return _permutation(self.num_rows, self.seed, epoch)


@lru_cache(maxsize=2)
def _permutation(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(num_rows)
