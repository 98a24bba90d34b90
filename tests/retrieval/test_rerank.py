from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.dense_jaccard import dense_rerank
from passreid_ray.errors import UserError
from passreid_ray.retrieval import rerank
from tests.retrieval.clustered import clustered_features, squared_distances

GOLDEN = dict(np.load(Path(__file__).parents[1] / "golden" / "evaluation_rerank.npz", allow_pickle=False))
QUERY_QD, GALLERY_GD = GOLDEN["rr/feat_q"], GOLDEN["rr/feat_g"]


def literal(query_QD: np.ndarray, gallery_GD: np.ndarray, k1: int, k2: int, lambda_value: float) -> np.ndarray:
    features_ND = np.concatenate([query_QD, gallery_GD])
    euclidean_NN = np.sqrt(squared_distances(features_ND, features_ND)).astype(np.float32)
    query, gallery = slice(0, len(query_QD)), slice(len(query_QD), None)
    blocks = euclidean_NN[query, gallery], euclidean_NN[query, query], euclidean_NN[gallery, gallery]
    return dense_rerank(*blocks, k1, k2, lambda_value)


@pytest.mark.parametrize(
    ("name", "sizes", "squared_twice", "tolerance"),
    [
        ("pass_cc_on_euclid(sqrt input)", (20, 6, 0.3), False, 1e-5),
        ("pass_cc(k20,k2=6,l.3; input=squared dist, squared again)", (20, 6, 0.3), True, 1e-5),
        ("pass_cc_k10_k2_3_l0.5", (10, 3, 0.5), True, 1e-5),
        ("pass_transreid_fp16(k20,k2=6,l.3)", (20, 6, 0.3), False, 3e-3),
    ],
)
def test_distances_are_the_reference_codes(
    name: str, sizes: tuple[int, int, float], squared_twice: bool, tolerance: float
) -> None:
    found = rerank(QUERY_QD, GALLERY_GD, *sizes, squared_twice=squared_twice)
    assert found.shape == (30, 120)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, GOLDEN[f"rr/{name}"], rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    num_queries=st.integers(1, 40),
    noise=st.floats(0.3, 3),
    lambda_value=st.floats(0, 1),
    data=st.data(),
)
def test_distances_equal_the_literal_dense_version(
    seed: int, num_queries: int, noise: float, lambda_value: float, data: st.DataObject
) -> None:
    features_ND = clustered_features(12, 8, 16, noise, seed)
    k1 = data.draw(st.integers(1, 30), "k1")
    k2 = data.draw(st.integers(1, k1 + 1), "k2")
    split = features_ND[:num_queries], features_ND[num_queries:]
    np.testing.assert_allclose(
        rerank(*split, k1, k2, lambda_value), literal(*split, k1, k2, lambda_value), rtol=0, atol=1e-5
    )


def test_more_queries_than_a_block_holds_change_nothing() -> None:
    features_ND = clustered_features(100, 12, 16, 1.0, seed=1)
    split = features_ND[:1100], features_ND[1100:]
    np.testing.assert_allclose(rerank(*split, 10, 4), literal(*split, 10, 4, 0.3), rtol=0, atol=1e-5)


def test_the_order_of_the_gallery_only_permutes_columns() -> None:
    order = np.random.default_rng(0).permutation(120)
    found = rerank(QUERY_QD, GALLERY_GD[order])
    np.testing.assert_allclose(found, rerank(QUERY_QD, GALLERY_GD)[:, order], rtol=0, atol=1e-5)


def test_all_of_lambda_is_the_original_distance() -> None:
    features_ND = np.concatenate([QUERY_QD, GALLERY_GD])
    unit_ND = features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)
    squared = squared_distances(unit_ND[:30], unit_ND)
    expected = squared[:, 30:] / squared.max(axis=1, keepdims=True)
    np.testing.assert_allclose(rerank(QUERY_QD, GALLERY_GD, lambda_value=1), expected, rtol=0, atol=1e-6)


def test_lengths_of_features_and_kind_of_array_do_not_matter() -> None:
    lengths = np.random.default_rng(0).uniform(0.1, 10, (150, 1))
    found = rerank(torch.from_numpy(lengths[:30] * QUERY_QD), torch.from_numpy(lengths[30:] * GALLERY_GD))
    np.testing.assert_allclose(found, rerank(QUERY_QD, GALLERY_GD), rtol=0, atol=1e-5)


def test_a_copy_of_a_query_in_the_gallery_comes_first() -> None:
    found = rerank(QUERY_QD, np.concatenate([GALLERY_GD, QUERY_QD]))
    np.testing.assert_array_equal(found.argmin(axis=1), 120 + np.arange(30))
    assert found.min(axis=1).max() < 1e-5


@pytest.mark.parametrize(
    ("query", "gallery", "sizes", "message"),
    [
        (np.ones((2, 3)), np.ones((5, 4)), (2, 1), "query is 3 wide, gallery 4"),
        (np.ones((2, 3)), np.ones((5, 3)), (7, 1), "k1: expected 1 to 6 neighbours of 7 images, got 7"),
        (np.ones((2, 3)), np.ones((5, 3)), (0, 1), "k1: .* got 0"),
        (np.ones((2, 3)), np.ones((5, 3)), (3, 5), r"k2: .* 1 to k1 \+ 1 = 4 neighbours, got 5"),
        (np.ones((2, 3)), np.ones((5, 3)), (3, 0), "k2: .* got 0"),
        (np.eye(3)[:, :2], np.ones((5, 2)), (3, 2), "query: 1 of 3 rows are all zero, the first is row 2"),
        (np.ones((2, 3)), np.full((5, 3), np.nan), (3, 2), "gallery: 5 of 5 rows are not finite"),
    ],
)
def test_unusable_input_is_refused(
    query: np.ndarray, gallery: np.ndarray, sizes: tuple[int, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        rerank(query, gallery, *sizes)
