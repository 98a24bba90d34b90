"""Ranks of a query's matches without sorting the gallery: only the matches are sorted, all others are counted."""

# Shape letters: R queries of a block, Q queries, G gallery, M columns of the distances, K matches of one query.

from typing import NamedTuple

import numba
import numpy as np
from numpy.typing import NDArray

from passreid_ray.retrieval.protocol import Protocol

_BINS = 1024
"""Equal bins between a query's nearest and farthest match; all but a few hold no match and need no comparison."""


class QueryRanks(NamedTuple):
    """How the matches of each query of a block rank. nan, nan and -1 for a query without a match."""

    average_precision_R: NDArray[np.float64]
    """Items at equal distance share the precision at their end, as scikit-learn's."""
    inverse_penalty_R: NDArray[np.float64]
    """Matches / rank of the last match; non-matches at its distance are before it."""
    before_first_R: NDArray[np.int64]
    """Non-matches before the first match, those at its distance included."""


def query_ranks(distance_RM: NDArray[np.floating], protocol: Protocol, first_query: int) -> QueryRanks:
    """Ranks for the queries ``first_query``, ``first_query + 1``, ... of the rows of ``distance_RM``.

    ``distance_RM``: finite, float32 or float64, contiguous; columns as in ``protocol``. Time is that of reading it.
    """
    queries = slice(first_query, first_query + len(distance_RM))
    ranks = QueryRanks(
        np.full(len(distance_RM), np.nan),
        np.full(len(distance_RM), np.nan),
        np.full(len(distance_RM), -1, np.int64),
    )
    _rank(
        distance_RM,
        protocol.items_M,
        protocol.columns_G,
        protocol.cameras_G,
        protocol.first_Q[queries],
        protocol.end_Q[queries],
        protocol.cameras_Q[queries],
        *ranks,
    )
    return ranks


@numba.njit(nogil=True, cache=True)
def _rank(
    distance_RM, items_M, columns_G, cameras_G, first_R, end_R, cameras_R, precision_R, penalty_R, before_R
) -> None:
    starts = np.empty(_BINS + 3, np.int32)
    for r in range(distance_RM.shape[0]):
        distance_M = distance_RM[r]
        is_match = cameras_G[first_R[r] : end_R[r]] != cameras_R[r]
        own = columns_G[first_R[r] : end_R[r]]
        matches_K = np.sort(distance_M[own[is_match]])
        if len(matches_K) == 0:
            continue
        counts_K = _counts(distance_M, items_M, matches_K, starts)
        for column in own[~is_match]:
            counts_K[np.searchsorted(matches_K, distance_M[column])] -= 1
        total, num_items, k = 0.0, 0, 0
        while k < len(matches_K):
            # One group of equal distances. Its items were all counted at its first match.
            num_items += counts_K[k]
            end = k + 1
            while end < len(matches_K) and matches_K[end] == matches_K[k]:
                end += 1
            if k == 0:
                before_R[r] = num_items - end
            total += (end - k) * (end / num_items)
            k = end
        precision_R[r] = total / len(matches_K)
        penalty_R[r] = len(matches_K) / num_items


@numba.njit(nogil=True, cache=True)
def _counts(distance_M, items_M, matches_K, starts) -> NDArray[np.int64]:
    """``(K + 1,)``: items whose first match at their distance or beyond is ``matches_K[k]``; the last is for none."""
    # Bins rise with the distance, whatever is rounded: a match in a lower bin is nearer. So only the matches of an
    # item's own bin are compared with it. Halves and float64, so that no difference of finite numbers overflows.
    lowest = 0.5 * np.float64(matches_K[0])
    span = 0.5 * np.float64(matches_K[-1]) - lowest
    scale = _BINS / span if span > 0 else 0.0
    scale = scale if scale < np.inf else 0.0
    starts[:] = 0
    for distance in matches_K:
        starts[_bin(distance, lowest, scale) + 1] += 1
    for b in range(len(starts) - 1):
        starts[b + 1] += starts[b]
    counts_K = np.zeros(len(matches_K) + 1, np.int64)
    for m in range(distance_M.shape[0]):
        distance = distance_M[m]
        own_bin = _bin(distance, lowest, scale)
        low, high = np.uint64(starts[own_bin]), np.uint64(starts[own_bin + np.uint64(1)])
        while low < high:
            middle = (low + high) >> np.uint64(1)
            if matches_K[middle] < distance:
                low = middle + np.uint64(1)
            else:
                high = middle
        counts_K[low] += items_M[m]
    return counts_K


@numba.njit(nogil=True, cache=True)
def _bin(distance, lowest, scale) -> np.uint64:
    place = (0.5 * np.float64(distance) - lowest) * scale
    return np.uint64(np.int64(min(max(place, 0.0), _BINS + 1.0)))
