from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import adjusted_rand_score

from benchmarks.dense_jaccard import dense_jaccard_distance
from passreid_ray.errors import UserError
from passreid_ray.retrieval import dbscan_labels, jaccard_distance, nearest_neighbours
from passreid_ray.retrieval.jaccard import CameraSizes, plain_neighbourhood, unit_weighting
from passreid_ray.retrieval.k_reciprocal import encode, expand, overlap_distance, reciprocal_half
from passreid_ray.retrieval.neighbours import unit_features
from tests.reference.literal_camera_jaccard import literal_camera_jaccard
from tests.retrieval.clustered import brute_force, clustered_features

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "jaccard_dbscan.npz", allow_pickle=False))
SIZES = [(30, 6), (20, 6), (25, 4), (30, 1)]


def dense(distance: sp.csr_array) -> np.ndarray:
    """1 where nothing is stored."""
    row = np.repeat(np.arange(len(distance.indptr) - 1), np.diff(distance.indptr))
    filled = np.ones((len(distance.indptr) - 1,) * 2, np.float32)
    filled[row, distance.indices] = distance.data
    return filled


def assert_identical(found: sp.csr_array, expected: sp.csr_array) -> None:
    for name in ("indptr", "indices", "data"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize(("k1", "k2"), SIZES)
def test_distances_are_the_reference_codes(k1: int, k2: int) -> None:
    found = dense(jaccard_distance(GOLDEN["features"], k1, k2))
    first_rows = GOLDEN[f"jaccard_k{k1}_{k2}_first8rows"]
    np.testing.assert_allclose(found[:8], first_rows, rtol=0, atol=2e-6)
    np.testing.assert_allclose(found.sum(1, np.float64), GOLDEN[f"jaccard_k{k1}_{k2}_rowsum"], rtol=0, atol=400 * 2e-6)
    if (whole := GOLDEN.get(f"jaccard_k{k1}_{k2}")) is not None:
        np.testing.assert_allclose(found, whole, rtol=0, atol=2e-6)


@pytest.mark.parametrize("eps", [0.4, 0.5, 0.6, 0.7])
@pytest.mark.parametrize(("k1", "k2"), SIZES)
def test_labels_and_their_numbers_are_the_reference_codes(k1: int, k2: int, eps: float) -> None:
    found = dbscan_labels(jaccard_distance(GOLDEN["features"], k1, k2, max_distance=eps), eps)
    np.testing.assert_array_equal(found, GOLDEN[f"dbscan_k{k1}_{k2}_eps{eps}"])


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    num_persons=st.integers(2, 12),
    num_each=st.integers(2, 12),
    noise=st.floats(0.2, 3),
    data=st.data(),
)
def test_distances_equal_the_literal_dense_version(
    seed: int, num_persons: int, num_each: int, noise: float, data: st.DataObject
) -> None:
    features_ND = clustered_features(num_persons, num_each, 16, noise, seed)
    k1 = data.draw(st.integers(1, min(35, len(features_ND) - 1)), "k1")
    k2 = data.draw(st.integers(1, k1), "k2")
    _, neighbours = brute_force(features_ND, features_ND, k1)
    expected = dense_jaccard_distance(features_ND, neighbours, k2)
    np.testing.assert_allclose(dense(jaccard_distance(features_ND, k1, k2)), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("noise", [0.7, 1.6])
def test_the_order_of_rows_only_permutes_the_matrix(noise: float) -> None:
    features_ND = clustered_features(25, 12, 32, noise, seed=3)
    order = np.random.default_rng(0).permutation(len(features_ND))
    expected, found = jaccard_distance(features_ND, 15), jaccard_distance(features_ND[order], 15)
    np.testing.assert_allclose(dense(found), dense(expected)[np.ix_(order, order)], rtol=0, atol=2e-6)
    labels, permuted = dbscan_labels(expected), dbscan_labels(found)
    np.testing.assert_array_equal(permuted == -1, labels[order] == -1)
    assert adjusted_rand_score(permuted, labels[order]) == 1


@pytest.mark.parametrize("num_blocks", [1, 3, 7])
def test_blocks_of_rows_do_not_change_a_bit(num_blocks: int) -> None:
    given_ND = clustered_features(30, 10, 32, 1.3, seed=4)
    features_ND = unit_features(given_ND)
    neighbourhood = plain_neighbourhood(nearest_neighbours(features_ND, 20)[1], 6)
    edges = np.linspace(0, len(features_ND), num_blocks + 1, dtype=int).tolist()
    blocks = [slice(start, end) for start, end in pairwise(edges)]
    half, weighting = reciprocal_half(neighbourhood), unit_weighting(features_ND)
    codes = stacked(encode(neighbourhood, half, features_ND, weighting, block) for block in blocks)
    expanded = stacked(expand(codes, neighbourhood, block) for block in blocks)
    columns = sp.csc_array(expanded)
    found = stacked(overlap_distance(sp.csr_array(expanded[block]), columns, 0.9) for block in blocks)
    assert_identical(found, jaccard_distance(given_ND, 20, 6, 0.9))


def stacked(blocks: Any) -> sp.csr_array:
    return sp.csr_array(sp.vstack(list(blocks), format="csr"))


def test_the_matrix_is_symmetric_with_a_stored_zero_diagonal() -> None:
    distance = jaccard_distance(clustered_features(30, 10, 32, 1.3, seed=5), 20)
    filled = dense(distance)
    np.testing.assert_allclose(filled, filled.T, rtol=0, atol=1e-6)
    row = np.repeat(np.arange(300), np.diff(distance.indptr))
    diagonal = distance.data[row == distance.indices]
    assert len(diagonal) == 300
    assert diagonal.max() < 1e-6
    assert all((np.diff(distance.indices[start:end]) > 0).all() for start, end in pairwise(distance.indptr))
    assert distance.data.min() >= 0
    assert distance.data.max() < 1


def test_duplicates_are_stored_at_distance_zero() -> None:
    single_ND = clustered_features(40, 1, 32, 0.0, seed=6)
    distance = jaccard_distance(np.repeat(single_ND, 4, axis=0), 4, 1)
    assert np.diff(distance.indptr).tolist() == [4] * 160
    assert distance.data.max() < 1e-6
    np.testing.assert_array_equal(
        distance.indices.reshape(40, 4, 4), np.tile(np.arange(160).reshape(40, 1, 4), (1, 4, 1))
    )
    np.testing.assert_array_equal(dbscan_labels(distance), np.repeat(np.arange(40), 4))


@pytest.mark.parametrize("max_distance", [0.0, 0.3, 0.6, 0.95])
def test_just_the_pairs_up_to_max_distance_are_kept(max_distance: float) -> None:
    features_ND = clustered_features(30, 10, 32, 1.3, seed=7)
    everything, found = jaccard_distance(features_ND, 20), jaccard_distance(features_ND, 20, max_distance=max_distance)
    kept = everything.data <= np.float32(max_distance)
    row = np.repeat(np.arange(300), np.diff(everything.indptr))
    np.testing.assert_array_equal(found.data, everything.data[kept])
    np.testing.assert_array_equal(found.indices, everything.indices[kept])
    np.testing.assert_array_equal(np.diff(found.indptr), np.bincount(row[kept], minlength=300))


def test_lengths_of_features_and_kind_of_array_do_not_matter() -> None:
    features_ND = clustered_features(20, 10, 32, 1.0, seed=8)
    lengths = np.random.default_rng(0).uniform(0.1, 10, (200, 1))
    expected = jaccard_distance(features_ND, 15)
    np.testing.assert_allclose(dense(jaccard_distance(lengths * features_ND, 15)), dense(expected), rtol=0, atol=2e-6)
    assert_identical(jaccard_distance(torch.from_numpy(features_ND), 15), expected)


@pytest.mark.parametrize("k1", [10, 30])
@pytest.mark.parametrize("noise", [0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_ten_persons_of_twelve_images_are_ten_clusters_without_outliers(k1: int, noise: float, seed: int) -> None:
    labels = dbscan_labels(jaccard_distance(clustered_features(10, 12, 128, noise, seed), k1))
    assert np.bincount(labels + 1).tolist() == [0] + [12] * 10


@settings(deadline=None, max_examples=15, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    num_cameras=st.integers(1, 5),
    k1_same=st.integers(1, 6),
    k1_other=st.integers(2, 12),
    data=st.data(),
)
def test_camera_aware_distances_equal_the_literal_version(
    seed: int, num_cameras: int, k1_same: int, k1_other: int, data: st.DataObject
) -> None:
    features_ND = clustered_features(8, 6, 16, 1.0, seed)
    cameras_N = np.random.default_rng(seed).integers(0, num_cameras, len(features_ND))
    sizes = (
        k1_same,
        k1_other,
        data.draw(st.integers(1, k1_same), "k2_same"),
        data.draw(st.integers(0, k1_other), "k2_other"),
    )
    expected = literal_camera_jaccard(features_ND, cameras_N, *sizes)
    found = jaccard_distance(features_ND, cameras_N=cameras_N, camera_sizes=CameraSizes(*sizes))
    np.testing.assert_allclose(dense(found), expected, rtol=0, atol=2e-6)


def test_cameras_with_fewer_images_than_neighbours_are_taken() -> None:
    features_ND = clustered_features(6, 6, 16, 0.8, seed=9)
    cameras_N = np.array(["lone", "pair", "pair"] + ["rest"] * 33)
    expected = literal_camera_jaccard(features_ND, cameras_N, 5, 20, 2, 4)
    np.testing.assert_allclose(dense(jaccard_distance(features_ND, cameras_N=cameras_N)), expected, rtol=0, atol=2e-6)


def test_with_one_camera_all_neighbours_are_of_it() -> None:
    features_ND = clustered_features(10, 8, 16, 1.0, seed=10)
    sizes = CameraSizes(k1_same=12, k1_other=7, k2_same=3, k2_other=2)
    expected = literal_camera_jaccard(features_ND, np.zeros(80), 12, 7, 3, 2)
    found = jaccard_distance(features_ND, cameras_N=np.zeros(80), camera_sizes=sizes)
    np.testing.assert_allclose(dense(found), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k1": 40}, "k1: 40 neighbours, but there are 40 features"),
        ({"k1": 0}, "k1: 0 neighbours"),
        ({"k1": 10, "k2": 11}, "k2: the query expansion averages 1 to k1=10 neighbours, got 11"),
        ({"k1": 10, "k2": 0}, "k2: .* got 0"),
        ({"cameras_N": [0, 1]}, "cameras: 2 cameras for 40 features"),
    ],
)
def test_unusable_sizes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        jaccard_distance(clustered_features(10, 4, 8, 1.0, seed=0), **arguments)


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "1 of 40 rows are not finite"), (0, "1 of 40 rows are all zero")]
)
def test_unusable_features_are_refused(value: float, message: str) -> None:
    features_ND = clustered_features(10, 4, 8, 1.0, seed=0)
    features_ND[17] = value
    with pytest.raises(UserError, match=f"features: {message}, the first is row 17"):
        jaccard_distance(features_ND)
