"""Near duplicates by quarters of the hash, against all pairs."""

import numpy as np
import pytest
from numpy.typing import NDArray

from passreid_ray.data.image_hash import differing_bits
from passreid_ray.engines.near_duplicates import near_duplicates


def hashes(num_groups: int = 60, seed: int = 0) -> NDArray[np.uint64]:
    """Random hashes, most of them with relatives that differ in 0 to 5 bits anywhere."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(num_groups):
        value = int(rng.integers(2**64, dtype=np.uint64))
        made.append(value)
        for _ in range(int(rng.integers(4))):
            flipped = rng.choice(64, size=int(rng.integers(6)), replace=False)
            made.append(value ^ sum(1 << int(bit) for bit in flipped))
    return rng.permutation(np.array(made, np.uint64))


def all_pairs(hashes_N: NDArray[np.uint64], max_bits: int) -> dict[tuple[int, int], int]:
    values = hashes_N.tolist()
    bits = {(i, j): differing_bits(values[i], values[j]) for j in range(len(values)) for i in range(j)}
    return {pair: distance for pair, distance in bits.items() if distance <= max_bits}


def partition(groups_N: NDArray[np.int64]) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(groups_N == group).tolist()) for group in set(groups_N.tolist()) - {-1}}


def connected(pairs: dict[tuple[int, int], int]) -> set[frozenset[int]]:
    group_of: dict[int, frozenset[int]] = {}
    for i, j in pairs:
        union = group_of.get(i, frozenset([i])) | group_of.get(j, frozenset([j]))
        group_of |= dict.fromkeys(union, union)
    return set(group_of.values())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("max_bits", [0, 1, 2, 3])
def test_groups_and_pairs_are_those_of_all_pairs(seed: int, max_bits: int) -> None:
    hashes_N = hashes(seed=seed)
    found = near_duplicates(hashes_N, max_bits)
    expected = all_pairs(hashes_N, max_bits)
    assert partition(found.groups_N) == connected(expected)
    pairs = dict(zip(map(tuple, found.pairs_P2.tolist()), found.bits_P.tolist(), strict=True))
    assert len(pairs) == len(found.pairs_P2)  # none twice
    assert pairs.items() <= expected.items()
    _, firsts = np.unique(hashes_N, return_index=True)
    between_firsts = {pair: bits for pair, bits in expected.items() if {*pair} <= {*firsts.tolist()}}
    assert between_firsts.items() <= pairs.items()
    assert found.num_skipped == 0


def test_images_of_one_hash_are_one_group_without_all_their_pairs() -> None:
    found = near_duplicates(np.full(1000, 77, np.uint64))
    assert partition(found.groups_N) == {frozenset(range(1000))}
    assert len(found.pairs_P2) == 999


def test_what_is_not_compared_is_counted() -> None:
    # All share three quarters, and no two of them are near: the fourth differs in many bits.
    fourth = np.array([0, 0x00FF, 0x0FF0, 0xFF00, 0xF00F, 0xFFFF], np.uint64)
    assert near_duplicates(fourth).num_skipped == 0
    assert near_duplicates(fourth, max_steps=2).num_skipped == 3 * (3 + 2 + 1)


def test_no_more_pairs_are_looked_for_than_asked() -> None:
    many = np.arange(256, dtype=np.uint64)
    every, few = near_duplicates(many), near_duplicates(many, max_pairs=300)
    assert every.num_skipped == 0
    assert 300 <= len(few.pairs_P2) < 600 < len(every.pairs_P2)
    assert few.num_skipped > 0


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_is_near_to_nothing(count: int) -> None:
    found = near_duplicates(np.zeros(count, np.uint64))
    assert found.groups_N.tolist() == [-1] * count
    assert found.pairs_P2.shape == (0, 2)


def test_more_bits_than_quarters_can_find_are_refused() -> None:
    with pytest.raises(ValueError, match="max_bits: expected 0 to 3, got 4"):
        near_duplicates(hashes(), 4)
