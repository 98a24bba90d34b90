"""Images whose difference hashes are nearly the same, among millions; pure functions of the hashes."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

QUARTER_BITS = 16
NUM_QUARTERS = 4
MAX_NEAR_BITS = NUM_QUARTERS - 1
"""Hashes that differ in at most 3 bits agree in at least one of four quarters (pigeonhole)."""
MAX_STEPS = 500
"""A hash is compared with so many followers that share a quarter. More share one where many images look alike."""
MAX_PAIRS = 10_000_000
"""After so many pairs no more are looked for: they take 24 bytes each, and the data is a video anyway."""


@dataclass(frozen=True)
class NearDuplicates:
    """Hashes within ``MAX_NEAR_BITS`` bits of each other."""

    groups_N: NDArray[np.int64]
    """Number of each image's group, -1 for images that are like no other. A group is connected by ``pairs_P2``."""
    pairs_P2: NDArray[np.int64]
    """Positions of pairs, the smaller first. Of images that share one hash only neighbours are paired."""
    bits_P: NDArray[np.int64]
    """How many bits the hashes of each pair differ in."""
    num_skipped: int
    """Comparisons that were left out because too many hashes share a quarter, or too many pairs were found."""


def near_duplicates(
    hashes_N: NDArray[np.uint64],
    max_bits: int = MAX_NEAR_BITS,
    *,
    max_steps: int = MAX_STEPS,
    max_pairs: int = MAX_PAIRS,
) -> NearDuplicates:
    """Groups and pairs of images whose 64-bit hashes differ in at most ``max_bits`` bits; no N x N matrix.

    Hashes are only compared with those that share a 16-bit quarter, in the order of the rest of their bits, and each
    with its next ``max_steps`` ones. With random hashes that is about N^2 / 32,768 comparisons.

    Raises:
        ValueError: ``max_bits`` is above 3, where quarters would miss pairs.
    """
    if not 0 <= max_bits <= MAX_NEAR_BITS:
        raise ValueError(f"max_bits: expected 0 to {MAX_NEAR_BITS}, got {max_bits}")
    by_hash = np.argsort(hashes_N, kind="stable")
    is_new = np.ones(len(by_hash), bool)
    is_new[1:] = hashes_N[by_hash[1:]] != hashes_N[by_hash[:-1]]
    firsts_U = by_hash[is_new]
    unique_U = hashes_N[firsts_U]
    repeats = np.flatnonzero(~is_new)
    parts = [np.stack([by_hash[repeats - 1], by_hash[repeats]], axis=1)]
    bits = [np.zeros(len(repeats), np.int64)]
    num_skipped, num_pairs = 0, len(repeats)
    for quarter in range(NUM_QUARTERS):
        order_U = np.argsort(_turned(unique_U, quarter), kind="stable")
        keys_U = _quarter(unique_U[order_U], quarter)
        num_skipped += _num_beyond(keys_U, max_steps)
        for here, there in _within_runs(keys_U, max_steps):
            if num_pairs >= max_pairs:
                num_skipped += len(here)
                continue
            left, right = unique_U[order_U[here]], unique_U[order_U[there]]
            distance = np.bitwise_count(left ^ right).astype(np.int64)
            is_near = distance <= max_bits
            for earlier in range(quarter):  # found there already
                is_near &= _quarter(left, earlier) != _quarter(right, earlier)
            pairs = np.stack([firsts_U[order_U[here[is_near]]], firsts_U[order_U[there[is_near]]]], axis=1)
            parts.append(np.sort(pairs, axis=1))
            bits.append(distance[is_near])
            num_pairs += len(pairs)
    pairs_P2 = np.concatenate(parts).astype(np.int64)
    return NearDuplicates(_groups(pairs_P2, len(hashes_N)), pairs_P2, np.concatenate(bits), num_skipped)


def _within_runs(keys_N: NDArray[np.uint64], max_steps: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Positions with one key in sorted keys, paired one step apart, then two, and so on up to ``max_steps``."""
    here = np.arange(len(keys_N))
    for step in range(1, max_steps + 1):
        here = here[: np.searchsorted(here, len(keys_N) - step)]
        here = here[keys_N[here] == keys_N[here + step]]
        if not len(here):
            return
        yield here, here + step


def _num_beyond(keys_N: NDArray[np.uint64], max_steps: int) -> int:
    """Pairs with one key that are more than ``max_steps`` apart."""
    _, counts = np.unique(keys_N, return_counts=True)
    beyond = np.maximum(counts.astype(np.int64) - 1 - max_steps, 0)
    return int((beyond * (beyond + 1) // 2).sum())


def _turned(hashes_N: NDArray[np.uint64], quarter: int) -> NDArray[np.uint64]:
    """Hashes with a quarter's bits in front and the others behind them in their order."""
    shift = np.uint64(quarter * QUARTER_BITS)
    if quarter == 0:
        return hashes_N
    return (hashes_N << shift) | (hashes_N >> (np.uint64(64) - shift))


def _quarter(hashes_N: NDArray[np.uint64], quarter: int) -> NDArray[np.uint64]:
    """Quarter 0 is the highest 16 bits."""
    return (hashes_N >> np.uint64(64 - (quarter + 1) * QUARTER_BITS)) & np.uint64(0xFFFF)


def _groups(pairs_P2: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    edges = coo_array((np.ones(len(pairs_P2), bool), (pairs_P2[:, 0], pairs_P2[:, 1])), shape=(size, size))
    labels_N = connected_components(edges, directed=False)[1].astype(np.int64) if size else np.empty(0, np.int64)
    is_grouped_N = np.zeros(size, bool)
    is_grouped_N[pairs_P2] = True
    groups_N = np.full(size, -1, np.int64)
    groups_N[is_grouped_N] = np.unique(labels_N[is_grouped_N], return_inverse=True)[1]
    return groups_N
