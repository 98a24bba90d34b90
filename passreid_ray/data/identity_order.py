"""Batches of P identities with K images each: a pure function of the seed and the step, the same for every number of
workers.

Rules of the reference's ``RandomMultipleGallerySampler`` (an anchor, then images of other cameras), without its slips:
every identity gives exactly K images, so groups never shift, and an image comes twice only where there are too few.
"""

from dataclasses import InitVar, dataclass, field

import numpy as np
import pyarrow as pa

from passreid_ray.data.order import permutation
from passreid_ray.errors import UserError

# numpy seeds [a, b] and [a, b, 0] alike: the last number keeps images apart from the permutations of the passes.
_IMAGES_KEY = 1


@dataclass(frozen=True, eq=False)
class IdentityOrder:
    """Every pass is a permutation of the identities, cut into batches of P; the rest of the pass is dropped.

    With fewer than P identities a batch goes round all of them until it is full. The K images of an identity are a
    random anchor and K - 1 images of other cameras than the anchor's, or, where all have one camera, other images;
    no image comes twice while there is one that did not come. An identity with a single image gives it K times.
    """

    labels_N: InitVar[np.ndarray]
    """``(N,)`` ints: the identity of each row; rows below 0 are left out."""
    cameras_N: InitVar[np.ndarray | None]
    """``(N,)`` strings or numbers, None where unknown (all unknown count as one camera); None: no cameras."""
    batch_size: int
    """Images of a global batch, over all workers together: P * K."""
    images_per_identity: int
    """K."""
    seed: int

    num_rows: int = field(init=False)
    # Rows of identity i are _rows[_starts[i] : _starts[i + 1]], ordered by camera; _cameras runs beside _rows. Made
    # once: the order travels to the tasks of a stream with its index, as three arrays.
    _rows: np.ndarray = field(init=False, repr=False)
    _cameras: np.ndarray = field(init=False, repr=False)
    _starts: np.ndarray = field(init=False, repr=False)

    def __post_init__(self, labels_N: np.ndarray, cameras_N: np.ndarray | None) -> None:
        if self.batch_size % self.images_per_identity:
            raise UserError(
                f"batch_size: {self.batch_size} images cannot be made of identities with {self.images_per_identity} "
                f"images each (images_per_identity); make it a multiple of {self.images_per_identity}"
            )
        if cameras_N is not None and len(cameras_N) != len(labels_N):
            raise UserError(f"cameras: {len(cameras_N)} cameras for {len(labels_N)} labels; give one for each row")
        kept = np.flatnonzero(labels_N >= 0)
        if len(kept) == 0:
            raise UserError(
                f"labels: none of the {len(labels_N)} images has an identity to learn from (every label is below 0); "
                "loosen the clustering or give labelled data"
            )
        cameras = _camera_numbers(cameras_N, len(labels_N))[kept]
        labels = labels_N[kept]
        by_identity = np.lexsort((cameras, labels))  # stable: rows of one camera stay in order
        _, counts = np.unique(labels, return_counts=True)
        object.__setattr__(self, "num_rows", len(labels_N))
        object.__setattr__(self, "_rows", kept[by_identity].astype(np.int32))
        object.__setattr__(self, "_cameras", cameras[by_identity])
        object.__setattr__(self, "_starts", np.concatenate([[0], np.cumsum(counts)]))

    @property
    def num_identities(self) -> int:
        """Identities that have at least one row."""
        return len(self._starts) - 1

    @property
    def identities_per_batch(self) -> int:
        """P."""
        return self.batch_size // self.images_per_identity

    @property
    def steps_per_pass(self) -> int:
        """Batches in which every identity comes at most once; one, when there are fewer than P identities."""
        return max(1, self.num_identities // self.identities_per_batch)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """(draws, row numbers) of one worker's slice of the global batch at ``step``; no draw comes twice.

        The K rows of an identity stand side by side. Raises ``UserError`` when workers would get unequal slices.
        """
        if self.batch_size % world_size:
            raise UserError(
                f"batch_size: {self.batch_size} images cannot be divided among {world_size} workers; "
                f"make it a multiple of {world_size}"
            )
        share = self.batch_size // world_size
        start, end = rank * share, (rank + 1) * share
        first = start // self.images_per_identity
        last = (end - 1) // self.images_per_identity
        number, position = divmod(step, self.steps_per_pass)
        identities = permutation(self.num_identities, self.seed, number)[position * self.identities_per_batch :]
        turns, places = np.divmod(np.arange(first, last + 1), len(identities))
        images = {place: self._images(step, int(identities[place]), turns[-1] + 1) for place in set(places.tolist())}
        groups = [images[place][turn] for turn, place in zip(turns.tolist(), places.tolist(), strict=True)]
        begin = start - first * self.images_per_identity
        return step * self.batch_size + np.arange(start, end), np.concatenate(groups)[begin : begin + share]

    def substitute(self, draw: int, row: int, attempt: int) -> int:
        """The row that takes the place of one that cannot be read: the ``attempt``-th other one of its identity.

        After the last of them come the rows of the next identity, and so on.
        """
        place = int(np.flatnonzero(self._rows == row)[0])
        identity = int(np.searchsorted(self._starts, place, side="right")) - 1
        start, end = self._starts[identity : identity + 2].tolist()
        if attempt < end - start:
            return int(self._rows[start + (place - start + attempt) % (end - start)])
        return int(self._rows[(start + attempt) % len(self._rows)])

    def _images(self, step: int, identity: int, num_turns: int) -> list[np.ndarray]:
        """K rows of an identity for each time that it comes in the batch at ``step``."""
        own = slice(*self._starts[identity : identity + 2])
        rows, cameras = self._rows[own], self._cameras[own]
        rng = np.random.default_rng([self.seed, step, identity, _IMAGES_KEY])
        times_used = np.zeros(len(rows), np.int32)
        turns: list[np.ndarray] = []
        for turn in range(num_turns):
            num_drawn = turn * self.images_per_identity
            anchor = _least_used(times_used, 0, 0, 1, num_drawn, rng)
            times_used[anchor] += 1
            low, high = (int(np.searchsorted(cameras, cameras[anchor[0]], side)) for side in ("left", "right"))
            if len(rows) == 1:
                low, high = 0, 0
            elif high - low == len(rows):
                low, high = int(anchor[0]), int(anchor[0]) + 1
            others = _least_used(times_used, low, high, self.images_per_identity - 1, num_drawn + 1, rng)
            np.add.at(times_used, others, 1)
            turns.append(rows[np.concatenate([anchor, others])])
        return turns


def _least_used(
    times_used: np.ndarray, low: int, high: int, count: int, num_drawn: int, rng: np.random.Generator
) -> np.ndarray:
    """``count`` random positions outside ``low`` to ``high`` - 1, those used least first, over again when too few.

    ``num_drawn`` images were used before, so that many more candidates are enough to find the fresh ones among: an
    identity with very many images costs no more than a small one.
    """
    num_candidates = len(times_used) - (high - low)
    candidates = rng.choice(num_candidates, min(num_candidates, count + num_drawn), replace=False)
    candidates += (high - low) * (candidates >= low)
    return np.resize(candidates[np.argsort(times_used[candidates], kind="stable")], count)


def _camera_numbers(cameras_N: np.ndarray | None, num_rows: int) -> np.ndarray:
    if cameras_N is None:
        return np.zeros(num_rows, np.int32)
    return pa.array(cameras_N).dictionary_encode().indices.fill_null(-1).to_numpy()
