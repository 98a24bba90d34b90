"""k-reciprocal encoding (Zhong et al., arXiv:1701.08398) on sparse rows: steps that clustering and re-ranking share.

1. Row i's set: its neighbours that have i among theirs, and the sets of its members' nearer halves that overlap enough.
2. Its code: a weight for each member of the set, falling with the distance, of sum 1.
3. Its expanded code: the mean of its nearest neighbours' codes.
4. Distance of two rows: 1 - sum of minima / (2 - sum of minima) of their expanded codes.

Every step works on a block of rows and reads the step before it for all rows, so blocks can be computed anywhere.
"""

# Shape letters: N rows, K columns of the neighbour lists, D width.

from dataclasses import dataclass
from typing import TypeAlias, cast

import numba
import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from passreid_ray.retrieval.scan import squared_distance

_BLOCK_ROWS = 4096
"""Rows that are encoded at once: what is set aside for the largest sets they could have stays small."""

_Rows: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.float32]]
"""Length of each sparse row; columns and values of all of them, one row after the other."""


@dataclass(frozen=True)
class Neighbourhood:
    """Neighbour lists of all rows, and which of their columns each step reads."""

    rows_NK: NDArray[np.int32]
    """Neighbours of every row, itself included; -1 where there are fewer."""
    is_half_K: NDArray[np.bool_]
    """Columns of the nearer half, whose sets are added."""
    is_expansion_K: NDArray[np.bool_]
    """Columns whose codes are averaged."""


@dataclass(frozen=True)
class Weighting:
    """How the weight of a member falls: ``exp(-(d^2 / scale))``, or ``exp(-(d^2 / scale)^2)`` if ``squared``."""

    scale_N: NDArray[np.float32]
    squared: bool = False


def half_size(k1: int) -> int:
    """Columns of the nearer half, the row itself included; half numbers are rounded to even, as the reference does."""
    return round(k1 / 2) + 1


def reciprocal_half(neighbourhood: Neighbourhood) -> NDArray[np.bool_]:
    """``(N, K)``: whether a column of the nearer half is a mutual neighbour within the halves."""
    return _mutual(neighbourhood.rows_NK, neighbourhood.is_half_K)


def encode(
    neighbourhood: Neighbourhood,
    is_mutual_half_NK: NDArray[np.bool_],
    features_ND: NDArray[np.float32],
    weighting: Weighting,
    rows: slice,
) -> sp.csr_array:
    """Codes of the rows of a block, ``(rows, N)``; ``is_mutual_half_NK`` is ``reciprocal_half`` of all rows."""
    scratch_N = np.full(len(features_ND), -1, np.int32)
    members_N = np.full(len(features_ND), -1, np.int32)
    blocks = [
        _encode(
            neighbourhood.rows_NK,
            is_mutual_half_NK,
            features_ND,
            weighting.scale_N,
            weighting.squared,
            first,
            min(first + _BLOCK_ROWS, rows.stop),
            scratch_N,
            members_N,
        )
        for first in range(rows.start, rows.stop, _BLOCK_ROWS)
    ]
    return _stacked(blocks, len(features_ND))


def expanded_codes(
    neighbourhood: Neighbourhood, features_ND: NDArray[np.float32], weighting: Weighting
) -> sp.csr_array:
    """Expanded codes of all rows, ``(N, N)``, in this process."""
    everything = slice(0, len(features_ND))
    codes_NN = encode(neighbourhood, reciprocal_half(neighbourhood), features_ND, weighting, everything)
    return expand(codes_NN, neighbourhood, everything)


def expand(codes_NN: sp.csr_array, neighbourhood: Neighbourhood, rows: slice) -> sp.csr_array:
    """Expanded codes of the rows of a block, ``(rows, N)``."""
    columns = np.flatnonzero(neighbourhood.is_expansion_K)
    if len(columns) == 1:
        return codes_NN[rows]  # its own code alone
    num_rows = len(codes_NN.indptr) - 1
    sums_N = np.zeros(num_rows, np.float32)
    blocks = [
        _expand(
            codes_NN.indptr,
            codes_NN.indices,
            codes_NN.data,
            neighbourhood.rows_NK[first : min(first + _BLOCK_ROWS, rows.stop)][:, columns],
            sums_N,
        )
        for first in range(rows.start, rows.stop, _BLOCK_ROWS)
    ]
    return _stacked(blocks, num_rows)


def overlap_distance(block_RN: sp.csr_array, columns_NN: sp.csc_array, max_distance: float) -> sp.csr_array:
    """Distances of the rows of a block to all rows, ``(R, N)``: those below 1 and not above ``max_distance``.

    ``columns_NN`` holds the expanded codes of all rows by column. Pairs that are not stored are farther away; a stored
    zero is a distance of zero.
    """
    num_rows = len(block_RN.indptr) - 1
    num_others, _ = cast("tuple[int, int]", columns_NN.shape)  # scipy's own type allows None
    sums_N = np.zeros(num_others, np.float32)
    blocks = []
    for first in range(0, num_rows, _BLOCK_ROWS):
        end = min(first + _BLOCK_ROWS, num_rows)
        blocks.append(
            _overlap(
                block_RN.indptr[first : end + 1],
                block_RN.indices,
                block_RN.data,
                columns_NN.indptr,
                columns_NN.indices,
                columns_NN.data,
                np.float32(max_distance),
                sums_N,
            )
        )
    return _stacked(blocks, num_others)


def _stacked(blocks: list[_Rows], num_columns: int) -> sp.csr_array:
    lengths = np.concatenate([lengths for lengths, _, _ in blocks])
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    indices = np.concatenate([indices for _, indices, _ in blocks])
    data = np.concatenate([data for _, _, data in blocks])
    narrow = indptr if indptr[-1] > np.iinfo(np.int32).max else indptr.astype(np.int32)
    return sp.csr_array((data, indices, narrow), shape=(len(lengths), num_columns))


@numba.njit(nogil=True, cache=True)
def _contains(row_K, is_wanted_K, value) -> bool:
    k = 0
    while k < row_K.shape[0] and not (is_wanted_K[k] and row_K[k] == value):
        k += 1
    return k < row_K.shape[0]


@numba.njit(nogil=True, cache=True)
def _mutual(rows_NK, is_wanted_K) -> NDArray[np.bool_]:
    mutual_NK = np.zeros(rows_NK.shape, np.bool_)
    for i in range(rows_NK.shape[0]):
        for k in range(rows_NK.shape[1]):
            j = rows_NK[i, k]
            if is_wanted_K[k] and j >= 0:
                mutual_NK[i, k] = _contains(rows_NK[j], is_wanted_K, i)
    return mutual_NK


@numba.njit(nogil=True, cache=True)
def _encode(rows_NK, is_mutual_half_NK, features_ND, scale_N, squared, first, end, in_core_N, in_set_N) -> _Rows:
    width = rows_NK.shape[1]
    is_any_K = np.ones(width, np.bool_)
    lengths = np.zeros(end - first, np.int64)
    most = width * (1 + width)
    indices = np.empty(1024 + (end - first) * 64, np.int32)
    weights = np.empty(len(indices), np.float32)
    core = np.empty(width, np.int32)
    members = np.empty(most, np.int32)
    used = 0
    for i in range(first, end):
        num_core = 0
        for k in range(width):
            j = rows_NK[i, k]
            if j >= 0 and in_core_N[j] != i and _contains(rows_NK[j], is_any_K, i):
                in_core_N[j] = i
                in_set_N[j] = i
                core[num_core] = j
                num_core += 1
        members[:num_core] = core[:num_core]
        num_members = num_core
        for c in range(num_core):
            j = core[c]
            size, shared = 0, 0
            for k in range(width):
                if is_mutual_half_NK[j, k]:
                    size += 1
                    shared += in_core_N[rows_NK[j, k]] == i
            if 3 * shared <= 2 * size:
                continue
            for k in range(width):
                other = rows_NK[j, k]
                if is_mutual_half_NK[j, k] and in_set_N[other] != i:
                    in_set_N[other] = i
                    members[num_members] = other
                    num_members += 1
        if used + num_members > len(indices):
            indices = np.concatenate((indices, np.empty(len(indices) + num_members, np.int32)))
            weights = np.concatenate((weights, np.empty(len(indices) - len(weights), np.float32)))
        own = np.sort(members[:num_members])
        total = np.float32(0)
        for m in range(num_members):
            ratio = squared_distance(features_ND[i], features_ND[own[m]]) / scale_N[i]
            weight = np.float32(np.exp(-(ratio * ratio if squared else ratio)))
            indices[used + m] = own[m]
            weights[used + m] = weight
            total += weight
        for m in range(num_members):
            weights[used + m] /= total
        lengths[i - first] = num_members
        used += num_members
    return lengths, indices[:used].copy(), weights[:used].copy()


@numba.njit(nogil=True, cache=True)
def _expand(indptr, indices, data, neighbours_RK, sums_N) -> _Rows:
    num_rows = neighbours_RK.shape[0]
    lengths = np.zeros(num_rows, np.int64)
    capacity = 0
    for r in range(num_rows):
        for j in neighbours_RK[r]:
            if j >= 0:
                capacity += indptr[j + 1] - indptr[j]
    columns = np.empty(capacity, np.int32)
    values = np.empty(capacity, np.float32)
    used = 0
    for r in range(num_rows):
        start, count = used, np.float32(0)
        for j in neighbours_RK[r]:
            if j < 0:
                continue
            count += 1
            for e in range(indptr[j], indptr[j + 1]):
                column = indices[e]
                if sums_N[column] == 0 and data[e] > 0:
                    columns[used] = column
                    used += 1
                sums_N[column] += data[e]
        columns[start:used] = np.sort(columns[start:used])
        for e in range(start, used):
            values[e] = sums_N[columns[e]] / count
            sums_N[columns[e]] = 0
        lengths[r] = used - start
    return lengths, columns[:used].copy(), values[:used].copy()


@numba.njit(nogil=True, cache=True)
def _overlap(indptr_R, indices, data, column_starts, column_rows, column_data, max_distance, sums_N) -> _Rows:
    num_rows = len(indptr_R) - 1
    lengths = np.zeros(num_rows, np.int64)
    columns = np.empty(1024 + num_rows * 64, np.int32)
    values = np.empty(len(columns), np.float32)
    touched = np.empty(len(sums_N) + 1, np.int32)
    # The sum of minima that a distance of `max_distance` needs, less the rounding of this bound itself.
    least = 2 * (1 - max_distance) / (2 - max_distance) * np.float32(1 - 1e-5)
    used = 0
    for r in range(num_rows):
        num_touched = 0
        for e in range(indptr_R[r], indptr_R[r + 1]):
            weight, column = data[e], indices[e]
            # The innermost loop of all, four times as fast without a branch and without looking for negative indices.
            for c in range(np.uint64(column_starts[column]), np.uint64(column_starts[column + 1])):
                j = np.uint64(column_rows[c])
                total = sums_N[j]
                touched[np.uint64(num_touched)] = j
                num_touched += total == 0
                sums_N[j] = total + min(weight, column_data[c])
        num_near = 0
        for t in range(num_touched):
            if sums_N[touched[t]] >= least:
                touched[num_near], touched[t] = touched[t], touched[num_near]
                num_near += 1
        near = np.sort(touched[:num_near])
        if used + num_near > len(columns):
            columns = np.concatenate((columns, np.empty(len(columns) + num_near, np.int32)))
            values = np.concatenate((values, np.empty(len(columns) - len(values), np.float32)))
        start = used
        for j in near:
            distance = max(np.float32(0), np.float32(1) - sums_N[j] / (np.float32(2) - sums_N[j]))
            if distance <= max_distance and distance < 1:
                columns[used] = j
                values[used] = distance
                used += 1
        for t in range(num_touched):
            sums_N[touched[t]] = 0
        lengths[r] = used - start
    return lengths, columns[:used].copy(), values[:used].copy()
