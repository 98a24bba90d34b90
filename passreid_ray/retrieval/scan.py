"""Brute-force neighbour search on CPUs: matrix products find candidates, exact distances decide among them.

Every feature is compared with every other by a matrix product, in float32 or in 8 bits. A pair whose product says that
it may be among the k nearest is compared again by its exact distance, and only that is kept. So the result does not
depend on how the rows are cut into blocks, and equal distances are ordered by index.
"""

# Shape letters: N rows of the base, Q queries, D width, K neighbours, M columns of a tile.

import warnings
from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray

_QUERY_TILE = 256
_FIRST_TILE = 256
"""Columns of the first tile, whose pairs are all candidates: narrow."""
_BASE_TILE = 2048
"""Columns of the others: one tile of products stays in a core's cache."""
_CHUNK = 64
_LEVELS = 127
_SAFE_DEVIATIONS = 3.0
"""Rounding errors of 8-bit products are allowed for up to this many standard deviations."""


_Codes = NDArray[np.float32] | NDArray[np.int8]


@dataclass(frozen=True)
class ScanIndex:
    """All rows of a base, coded for matrix products. Made by ``exact_index`` or ``int8_index``."""

    features_ND: NDArray[np.float32]
    """The base itself, for exact distances."""
    codes_ND: _Codes
    """Centred rows as they are multiplied."""
    offsets_N: NDArray[np.float32] | NDArray[np.int32]
    """Half the squared length of every centred row, in units of the products."""
    center_D: NDArray[np.float32]
    rotation_DD: NDArray[np.float32] | None
    unit: float
    """What a product of 1 stands for."""
    relative_error: float
    """Largest error of a squared distance that is allowed for, relative to the rows' lengths and their squares."""
    absolute_error: float

    def search(self, queries_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """The ``k`` nearest rows of every query: squared Euclidean distances ``(Q, k)`` ascending, row numbers.

        Equal distances are in the order of the rows. With fewer than ``k`` rows the rest is infinity and -1.
        """
        return self._scan(queries_QD, None, k, farthest=False)[:2]

    def search_rows(self, rows: slice, k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """``search`` for rows of the base itself."""
        return self._scan(self.features_ND[rows], self.codes_ND[rows], k, farthest=False)[:2]

    def search_rows_and_farthest(
        self, rows: slice, k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
        """``search_rows``, and each one's largest squared distance to any row, ``(Q,)``."""
        return self._scan(self.features_ND[rows], self.codes_ND[rows], k, farthest=True)

    def _scan(
        self, queries_QD: NDArray[np.float32], codes_QD: _Codes | None, k: int, *, farthest: bool
    ) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.float32]]:
        distances_QK = np.full((len(queries_QD), k), np.inf, np.float32)
        rows_QK = np.full((len(queries_QD), k), -1, np.int32)
        largest_Q = np.zeros(len(queries_QD) if farthest else 0, np.float32)
        products = torch.empty(_QUERY_TILE * _BASE_TILE, dtype=torch.int32 if self._is_int8 else torch.float32)
        base_ND = _tensor(self.codes_ND)
        for first in range(0, len(queries_QD), _QUERY_TILE):
            own = slice(first, min(first + _QUERY_TILE, len(queries_QD)))
            centred_QD = queries_QD[own] - self.center_D
            squared_norms_Q = np.einsum("qd,qd->q", centred_QD, centred_QD)
            tile_QD = _tensor(self._coded(centred_QD) if codes_QD is None else codes_QD[own])
            slack_Q = (self.relative_error * squared_norms_Q + self.absolute_error).astype(np.float32)
            lowest_Q = torch.full((len(tile_QD),), torch.inf)
            for start, end in _tiles(len(base_ND)):
                products_QM = products[: len(tile_QD) * (end - start)].view(len(tile_QD), end - start)
                multiply = torch.ops.aten._int_mm.out if self._is_int8 else torch.mm
                multiply(tile_QD, base_ND[start:end].T, out=products_QM)
                offsets_M = self.offsets_N[start:end]
                _keep_nearest(
                    products_QM.numpy(),
                    offsets_M,
                    start,
                    queries_QD[own],
                    self.features_ND,
                    squared_norms_Q,
                    slack_Q,
                    self.unit,
                    distances_QK[own],
                    rows_QK[own],
                )
                if farthest:
                    brackets_QM = products_QM.sub_(torch.from_numpy(offsets_M))
                    lowest_Q = torch.minimum(lowest_Q, brackets_QM.amin(dim=1).float())
            if farthest:
                largest_Q[own] = squared_norms_Q - 2 * self.unit * lowest_Q.numpy()
        return distances_QK, rows_QK, largest_Q

    @property
    def _is_int8(self) -> bool:
        return self.codes_ND.dtype == np.int8

    def _coded(self, centred_QD: NDArray[np.float32]) -> _Codes:
        if self.rotation_DD is None:
            return centred_QD
        return _quantized(centred_QD, self.rotation_DD, np.sqrt(self.unit))


def exact_index(features_ND: NDArray[np.float32]) -> ScanIndex:
    """An index that finds exactly the nearest rows."""
    center_D = features_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
    centred_ND = features_ND - center_D
    squared_norms_N = np.einsum("nd,nd->n", centred_ND, centred_ND)
    # A dot product of D float32 numbers is off by at most D times the rounding of one, times both lengths.
    rounding = 4 * features_ND.shape[1] * np.finfo(np.float32).eps
    largest = float(squared_norms_N.max(initial=0))
    return ScanIndex(features_ND, centred_ND, squared_norms_N / 2, center_D, None, 1.0, rounding, rounding * largest)


def int8_index(features_ND: NDArray[np.float32]) -> ScanIndex:
    """An index that compares 8-bit codes: several times as fast, and finds almost all of the nearest rows.

    Rows are centred and turned by a fixed random rotation, so that no coordinate is much wider than the others.
    """
    center_D = features_ND.mean(axis=0, dtype=np.float64).astype(np.float32)
    width = features_ND.shape[1]
    rotation_DD = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0].astype(np.float32)
    scale, largest = 0.0, 0.0
    squared_norms_N = np.empty(len(features_ND), np.float32)
    blocks = [slice(start, start + 65536) for start in range(0, len(features_ND), 65536)]
    for block in blocks:
        centred = features_ND[block] - center_D
        squared_norms_N[block] = np.einsum("nd,nd->n", centred, centred)
        scale = max(scale, float(np.abs(centred @ rotation_DD).max()) / _LEVELS)
    largest = float(squared_norms_N.max(initial=0))
    scale = scale or 1.0  # all rows are equal
    codes_ND = np.empty(features_ND.shape, np.int8)
    for block in blocks:
        codes_ND[block] = _quantized(features_ND[block] - center_D, rotation_DD, scale)
    offsets_N = np.rint(squared_norms_N / (2 * scale**2)).astype(np.int32)
    # Rounding to a step of `scale` is off by scale / sqrt(12) in every coordinate, independently; a product with a row
    # of length 1 by as much. It counts twice in the squared distance, for either of the two rows.
    deviation = 2 * scale / np.sqrt(12) * np.sqrt(2 * largest)
    return ScanIndex(
        features_ND, codes_ND, offsets_N, center_D, rotation_DD, scale**2, 0.0, _SAFE_DEVIATIONS * deviation
    )


def _quantized(centred_QD: NDArray[np.float32], rotation_DD: NDArray[np.float32], scale: float) -> NDArray[np.int8]:
    return np.clip(np.rint(centred_QD @ rotation_DD / scale), -_LEVELS, _LEVELS).astype(np.int8)


def _tensor(codes_ND: _Codes) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of arrays that must not be written to; nobody does
        return torch.from_numpy(codes_ND)


def _tiles(length: int) -> list[tuple[int, int]]:
    starts = [0, *range(_FIRST_TILE, length, _BASE_TILE)]
    return list(zip(starts, [*starts[1:], length], strict=True))


def order_by_distance(
    queries_QD: NDArray[np.float32], features_ND: NDArray[np.float32], rows_QK: NDArray[np.int32]
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """(exact squared distances, row numbers) of found rows, ascending, ties by row; -1 (none) comes last."""
    distances_QK = _distances(queries_QD, features_ND, rows_QK)
    order_QK = np.lexsort((rows_QK, distances_QK))
    return np.take_along_axis(distances_QK, order_QK, 1), np.take_along_axis(rows_QK, order_QK, 1)


@numba.njit(nogil=True, cache=True)
def _distances(queries_QD, features_ND, rows_QK) -> NDArray[np.float32]:
    distances_QK = np.full(rows_QK.shape, np.inf, np.float32)
    for q in range(rows_QK.shape[0]):
        for k in range(rows_QK.shape[1]):
            if rows_QK[q, k] >= 0:
                distances_QK[q, k] = squared_distance(queries_QD[q], features_ND[rows_QK[q, k]])
    return distances_QK


@numba.njit(nogil=True, fastmath=True, cache=True)
def squared_distance(first_D: NDArray[np.float32], second_D: NDArray[np.float32]) -> np.float32:
    """Squared Euclidean distance of two float32 rows."""
    total = np.float32(0)
    for d in range(first_D.shape[0]):
        difference = first_D[d] - second_D[d]
        total += difference * difference
    return total


@numba.njit(nogil=True, cache=True)
def _keep_nearest(
    products_QM, offsets_M, start, queries_QD, base_ND, norms_Q, slack_Q, unit, distances_QK, rows_QK
) -> None:
    """Move what is nearer than the farthest kept neighbour into the kept ones, for one tile of products."""
    num_queries, num_columns = products_QM.shape
    last = distances_QK.shape[1] - 1
    number = products_QM.dtype.type
    is_whole = number(0.5) == 0  # 8-bit codes
    for q in range(num_queries):
        products_M = products_QM[q]
        bound = number(_bound(norms_Q[q], distances_QK[q, last], slack_Q[q], unit, is_whole))
        for chunk in range(-(-num_columns // _CHUNK)):
            first = chunk * _CHUNK
            if first + _CHUNK <= num_columns:
                # Most chunks end here. Written so that it becomes vector instructions: ten times as fast as a maximum.
                is_candidate = False
                for m in range(_CHUNK):
                    is_candidate |= number(products_M[first + m] - offsets_M[first + m]) > bound
                if not is_candidate:
                    continue
            for m in range(first, min(first + _CHUNK, num_columns)):
                if number(products_M[m] - offsets_M[m]) <= bound:
                    continue
                distance = squared_distance(queries_QD[q], base_ND[start + m])
                # Columns come in ascending order, so an equal distance stays behind those that are there.
                if not distance < distances_QK[q, last]:
                    continue
                k = last
                while k > 0 and distances_QK[q, k - 1] > distance:
                    distances_QK[q, k] = distances_QK[q, k - 1]
                    rows_QK[q, k] = rows_QK[q, k - 1]
                    k -= 1
                distances_QK[q, k] = distance
                rows_QK[q, k] = start + m
                bound = number(_bound(norms_Q[q], distances_QK[q, last], slack_Q[q], unit, is_whole))


@numba.njit(nogil=True, cache=True)
def _bound(norm, distance, slack, unit, is_whole) -> float:
    # |q - b|^2 = |q|^2 - 2 (q.b - |b|^2 / 2): nearer than `distance` means a larger bracket than this, in units of the
    # products. Two units less for the rounding of 8-bit offsets to whole numbers, which cannot be minus infinity.
    bound = (norm - distance - slack) / (2 * unit)
    return max(bound - 2.0, -2.0e9) if is_whole else bound
