"""Same person or not, pair by pair: true accept rates at fixed false accept rates."""

# Shape letters: R queries of a block, Q queries, G gallery, M columns of the distances, B bins.

from typing import Protocol as Interface

import numba
import numpy as np
from numpy.typing import NDArray

from passreid_ray.retrieval.protocol import Protocol

EXACT_PAIRS = 2**24
"""Up to this many pairs every distance is kept."""
_MANTISSA_BITS = 14
_DROPPED_BITS = 23 - _MANTISSA_BITS
_NUM_BINS = 2 ** (32 - _DROPPED_BITS)


class AcceptRates(Interface):
    """Collects the distances of all pairs that count, and answers from them.

    A pair is accepted when its distance is not above a threshold. The true accept rate at a false accept rate is the
    largest share of matches that a threshold accepts which accepts no larger share of the non-matches.
    """

    def add(self, distance_RM: NDArray[np.floating], protocol: Protocol, first_query: int) -> None:
        """Count the pairs of the queries ``first_query``, ``first_query + 1``, ...: the rows of ``distance_RM``."""
        ...

    def at(self, false_accept_rates: tuple[float, ...]) -> dict[float, float]:
        """The true accept rate at each; nan without a match or without a non-match, which leaves no rate to fix."""
        ...


def accept_rates(num_queries: int, num_gallery: int, dtype: np.dtype) -> AcceptRates:
    """Exact up to ``EXACT_PAIRS`` pairs, from a histogram beyond."""
    num_pairs = num_queries * num_gallery
    return ExactRates(num_pairs, dtype) if num_pairs <= EXACT_PAIRS else BinnedRates()


class ExactRates:
    """``AcceptRates`` from every distance, kept in memory."""

    def __init__(self, num_pairs: int, dtype: np.dtype) -> None:
        self._others = np.empty(num_pairs, dtype)
        self._num_others = 0
        self._matches: list[NDArray[np.floating]] = []

    def add(self, distance_RM: NDArray[np.floating], protocol: Protocol, first_query: int) -> None:
        own = _own(protocol, first_query, len(distance_RM))
        left_M = protocol.items_M.copy()
        matches, num_others = _split(distance_RM, left_M, *own, self._others[self._num_others :])
        self._matches.append(matches)
        self._num_others += num_others

    def at(self, false_accept_rates: tuple[float, ...]) -> dict[float, float]:
        matches, others = np.concatenate(self._matches), self._others[: self._num_others]
        others.sort()
        return {rate: _exact_rate(matches, others, rate) for rate in false_accept_rates}


class BinnedRates:
    """``AcceptRates`` from counts in fine bins: a bin is 2**-14 as wide as the power of two that it is in, or less.

    Thresholds are at the bounds of bins, so the result is never above the exact one. For the usual cosine distances,
    from 0.25 to 2, a bin is 1.5e-5 to 6.1e-5 wide. Takes 8 bytes for each bin that is used, twice.
    """

    def __init__(self) -> None:
        # Zeros that are never written to take no memory, and most bins are for numbers that no distance has.
        self._matches_B = np.zeros(_NUM_BINS, np.int64)
        self._others_B = np.zeros(_NUM_BINS, np.int64)

    def add(self, distance_RM: NDArray[np.floating], protocol: Protocol, first_query: int) -> None:
        own = _own(protocol, first_query, len(distance_RM))
        _bin_pairs(distance_RM, protocol.items_M, *own, self._matches_B, self._others_B)

    def at(self, false_accept_rates: tuple[float, ...]) -> dict[float, float]:
        used = np.flatnonzero((self._matches_B > 0) | (self._others_B > 0))
        matches_B, others_B = self._matches_B[used], self._others_B[used]
        return {rate: _binned_rate(matches_B, others_B, rate) for rate in false_accept_rates}


def _exact_rate(matches: NDArray[np.floating], others_ascending: NDArray[np.floating], rate: float) -> float:
    if len(matches) == 0 or len(others_ascending) == 0:
        return float("nan")
    num_accepted = _most_accepted(rate, len(others_ascending))
    if num_accepted == len(others_ascending):
        return 1.0
    return float(np.mean(matches < others_ascending[num_accepted]))


def _binned_rate(matches_B: NDArray[np.int64], others_B: NDArray[np.int64], rate: float) -> float:
    num_matches, num_others = int(matches_B.sum()), int(others_B.sum())
    if num_matches == 0 or num_others == 0:
        return float("nan")
    is_accepted_B = np.cumsum(others_B) <= _most_accepted(rate, num_others)
    return int(matches_B[is_accepted_B].sum()) / num_matches


def _most_accepted(false_accept_rate: float, num_others: int) -> int:
    """The largest count whose share is at most the rate, as the division says: 29 of 100 is a rate of 0.29."""
    count = int(false_accept_rate * num_others)
    while count < num_others and (count + 1) / num_others <= false_accept_rate:
        count += 1
    while count / num_others > false_accept_rate:
        count -= 1
    return count


def _own(protocol: Protocol, first_query: int, num_queries: int) -> tuple[NDArray, NDArray, NDArray, NDArray, NDArray]:
    queries = slice(first_query, first_query + num_queries)
    first_R, end_R, cameras_R = protocol.first_Q[queries], protocol.end_Q[queries], protocol.cameras_Q[queries]
    return protocol.columns_G, protocol.cameras_G, first_R, end_R, cameras_R


@numba.njit(nogil=True, cache=True)
def _split(distance_RM, left_M, columns_G, cameras_G, first_R, end_R, cameras_R, others) -> tuple[NDArray, int]:
    matches = np.empty((end_R - first_R).sum(), distance_RM.dtype)
    num_matches, num_others = 0, 0
    for r in range(distance_RM.shape[0]):
        for e in range(first_R[r], end_R[r]):
            left_M[columns_G[e]] -= 1
            if cameras_G[e] != cameras_R[r]:
                matches[num_matches] = distance_RM[r, columns_G[e]]
                num_matches += 1
        for m in range(distance_RM.shape[1]):
            others[num_others : num_others + left_M[m]] = distance_RM[r, m]
            num_others += left_M[m]
        for e in range(first_R[r], end_R[r]):
            left_M[columns_G[e]] += 1
    return matches[:num_matches], num_others


@numba.njit(nogil=True, cache=True)
def _bin_pairs(distance_RM, items_M, columns_G, cameras_G, first_R, end_R, cameras_R, matches_B, others_B) -> None:
    for r in range(distance_RM.shape[0]):
        for m in range(distance_RM.shape[1]):
            others_B[_bin(distance_RM[r, m])] += items_M[m]
        for e in range(first_R[r], end_R[r]):
            own_bin = _bin(distance_RM[r, columns_G[e]])
            others_B[own_bin] -= 1
            matches_B[own_bin] += cameras_G[e] != cameras_R[r]


@numba.njit(nogil=True, cache=True)
def _bin(distance) -> np.uint32:
    """Number of the bin: rises with the distance, as the bits of a float32 do with its size."""
    bits = np.float32(distance + 0.0).view(np.uint32)
    is_negative = bits >> np.uint32(31)
    ordered = ~bits if is_negative else bits | np.uint32(0x80000000)
    return ordered >> np.uint32(_DROPPED_BITS)
