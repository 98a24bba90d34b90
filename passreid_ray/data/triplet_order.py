"""Batches of mined triplets: a pure function of the step, the same for every number of workers."""

from dataclasses import dataclass

import numpy as np

from passreid_ray.errors import UserError


@dataclass(frozen=True, eq=False)
class TripletOrder:
    """The triplets of some steps, in order; those of a worker are its share of the step's.

    A worker's batch is its queries, then their positives, then their negatives.
    """

    triplets_T3: np.ndarray
    """``(T, 3)`` row numbers of query, positive and negative: those of the first step, then those of the next."""
    labels_N: np.ndarray
    """``(N,)`` ints: the identity of each row."""
    triplets_per_step: int
    """Over all workers together."""
    first_step: int
    """The step that the first triplets are for."""
    first_draw: int = 0
    """Draws count from here on."""

    @property
    def batch_size(self) -> int:
        """Images of a global batch."""
        return 3 * self.triplets_per_step

    @property
    def num_rows(self) -> int:
        """Rows of the data."""
        return len(self.labels_N)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(draws, row numbers) of one worker's triplets of ``step``; no draw comes twice."""
        if self.triplets_per_step % world_size:
            raise UserError(
                f"ranking.triplets_per_step: {self.triplets_per_step} triplets cannot be divided among {world_size} "
                f"workers; make it a multiple of {world_size}"
            )
        share = self.triplets_per_step // world_size
        first = (step - self.first_step) * self.triplets_per_step + rank * share
        own_3T = self.triplets_T3[first : first + share].T
        place_3T = np.arange(3)[:, None] + 3 * (rank * share + np.arange(share))
        draws_3T = self.first_draw + (step - self.first_step) * self.batch_size + place_3T
        return draws_3T.ravel(), own_3T.ravel()

    def substitute(self, draw: int, row: int, attempt: int) -> int:
        """The row that takes the place of one that cannot be read: the ``attempt``-th other one of its identity.

        After the last of them come the rows of the others, from the next one on.
        """
        is_own_N = self.labels_N == self.labels_N[row]
        own, others = np.flatnonzero(is_own_N), np.flatnonzero(~is_own_N)
        if attempt < len(own):
            return int(own[(int(np.searchsorted(own, row)) + attempt) % len(own)])
        return int(others[(int(np.searchsorted(others, row)) + attempt - len(own)) % len(others)])
