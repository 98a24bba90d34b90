from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passreid_ray.retrieval.scan import exact_index, int8_index, order_by_distance
from tests.retrieval.clustered import brute_force, recall, squared_distances

MAKERS = [exact_index, int8_index]


def gaussian(num_rows: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((num_rows, width)).astype(np.float32)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32),
    num_rows=st.integers(1, 700),
    num_levels=st.integers(1, 4),
    width=st.integers(1, 20),
    offset=st.sampled_from([0, 100, -1000]),
    scale=st.sampled_from([2.0**-20, 1.0, 2.0**20]),
)
def test_exact_search_is_brute_force_with_duplicates_and_ties_in_row_order(
    seed: int, num_rows: int, num_levels: int, width: int, offset: int, scale: float
) -> None:
    rng = np.random.default_rng(seed)
    # Whole numbers: float32 holds their distances exactly, so ties are ties. A power of two keeps that.
    features_ND = (scale * (rng.integers(0, num_levels, (num_rows, width)) + offset)).astype(np.float32)
    queries_QD = features_ND[rng.integers(0, num_rows, 30)]
    k = int(rng.integers(1, num_rows + 1))
    distances, rows = exact_index(features_ND).search(queries_QD, k)
    expected_distances, expected_rows = brute_force(queries_QD, features_ND, k)
    np.testing.assert_array_equal(rows, expected_rows)
    np.testing.assert_array_equal(distances, expected_distances)


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (100, 1), (0, 1e-6), (0, 1e6), (1e4, 1e2)])
def test_exact_search_finds_the_nearest_at_any_offset_and_scale(offset: float, scale: float) -> None:
    features_ND = (scale * gaussian(3000, 24) + offset).astype(np.float32)
    distances, rows = exact_index(features_ND).search(features_ND[:200], 20)
    expected, _ = brute_force(features_ND[:200], features_ND, 20)
    true = np.take_along_axis(squared_distances(features_ND[:200], features_ND), rows, 1)
    np.testing.assert_allclose(true, expected, rtol=1e-5)
    np.testing.assert_allclose(distances, expected, rtol=1e-5)
    assert all(len(set(row)) == 20 for row in rows.tolist())


@pytest.mark.parametrize("make", MAKERS)
def test_all_rows_can_be_asked_for(make: type) -> None:
    features_ND = gaussian(300, 8)
    distances, rows = make(features_ND).search(features_ND, 300)
    np.testing.assert_array_equal(np.sort(rows), np.tile(np.arange(300), (300, 1)))
    assert (np.diff(distances) >= 0).all()


@pytest.mark.parametrize("scale", [1.0, 1e6])
@pytest.mark.parametrize("make", MAKERS)
def test_more_neighbours_than_rows_leave_infinity_and_minus_one(make: type, scale: float) -> None:
    features_ND = np.float32(scale) * gaussian(5, 8)
    distances, rows = make(features_ND).search(features_ND, 8)
    assert (rows[:, 5:] == -1).all()
    assert np.isinf(distances[:, 5:]).all()
    np.testing.assert_array_equal(np.sort(rows[:, :5]), np.tile(np.arange(5), (5, 1)))


@pytest.mark.parametrize("make", MAKERS)
def test_equal_rows_are_found_in_their_order(make: type) -> None:
    features_ND = np.full((400, 8), 3.0, np.float32)
    distances, rows = make(features_ND).search(features_ND[:3], 10)
    np.testing.assert_array_equal(rows, np.tile(np.arange(10), (3, 1)))
    assert not distances.any()


@settings(deadline=None, max_examples=10, derandomize=True)
@given(cuts=st.lists(st.integers(0, 900), max_size=6))
@pytest.mark.parametrize("make", MAKERS)
def test_blocks_of_queries_do_not_change_a_bit(make: type, cuts: list[int]) -> None:
    features_ND = gaussian(900, 33) + 1
    index = make(features_ND)
    whole = index.search_rows(slice(0, len(features_ND)), 7)
    edges = [0, *sorted(cuts), 900]
    parts = [index.search_rows(slice(start, end), 7) for start, end in pairwise(edges)]
    for found, expected in zip(zip(*parts, strict=True), whole, strict=True):
        np.testing.assert_array_equal(np.concatenate(found), expected)


@pytest.mark.parametrize("widest", [1, 100])
def test_8_bit_codes_find_99_of_100_neighbours_with_exact_distances(widest: float) -> None:
    features_ND = gaussian(5000, 64)
    features_ND[:, 3] *= widest
    distances, rows = int8_index(features_ND).search(features_ND[:300], 30)
    _, expected = brute_force(features_ND[:300], features_ND, 30)
    assert recall(rows, expected) >= 0.99
    true = np.take_along_axis(squared_distances(features_ND[:300], features_ND), rows, 1)
    np.testing.assert_allclose(distances, true, rtol=1e-5)


@pytest.mark.parametrize("offset", [0, 10])
def test_the_farthest_distance_is_the_largest_of_all(offset: float) -> None:
    features_ND = gaussian(2500, 24) + np.float32(offset)
    distances, rows, largest = exact_index(features_ND).search_rows_and_farthest(slice(0, 300), 5)
    np.testing.assert_allclose(largest, squared_distances(features_ND[:300], features_ND).max(1), rtol=1e-5)
    for found, expected in zip((distances, rows), exact_index(features_ND).search(features_ND[:300], 5), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_found_rows_are_put_in_order_and_missing_ones_last() -> None:
    features_ND = np.array([[0.0], [2], [1], [-1]], np.float32)
    distances, rows = order_by_distance(features_ND[:1], features_ND, np.array([[3, -1, 1, 2, 0]], np.int32))
    np.testing.assert_array_equal(rows, [[0, 2, 3, 1, -1]])
    np.testing.assert_array_equal(distances, [[0, 1, 1, 4, np.inf]])
