from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval import expansion
from passreid_ray.retrieval.expansion import average_query_expansion, database_augmentation
from tests.retrieval.clustered import clustered_features


def unit(features_ND: NDArray) -> NDArray[np.float64]:
    features_ND = features_ND.astype(np.float64)
    return features_ND / np.linalg.norm(features_ND, axis=1, keepdims=True)


def literal(feature_D: NDArray, others_MD: NDArray, k: int, alpha: float) -> NDArray[np.float64]:
    """The whole row of cosines, sorted; a sum over the first k."""
    cosine_M = others_MD @ feature_D
    total_D = feature_D.copy()
    for row in np.argsort(-cosine_M, kind="stable")[:k]:
        total_D += (max(cosine_M[row], 0) ** alpha if alpha else 1) * others_MD[row]
    return total_D / np.linalg.norm(total_D)


def queries_and_gallery(seed: int, num_gallery: int = 60) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    features_ND = clustered_features(8, 10, 16, 0.7, seed)
    return 3 * features_ND[num_gallery:], 5 * features_ND[:num_gallery]


@settings(deadline=None, max_examples=30, derandomize=True)
@given(seed=st.integers(0, 2**32), k=st.integers(0, 60), alpha=st.sampled_from([0.0, 1.0, 3.0, 0.5]))
def test_expanded_queries_equal_the_literal_mean(seed: int, k: int, alpha: float) -> None:
    query_QD, gallery_GD = queries_and_gallery(seed)
    found = average_query_expansion(query_QD, gallery_GD, k, alpha)
    expected = [literal(query_D, unit(gallery_GD), k, alpha) for query_D in unit(query_QD)]
    assert found.shape == query_QD.shape
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=30, derandomize=True)
@given(seed=st.integers(0, 2**32), k=st.integers(0, 59), alpha=st.sampled_from([0.0, 1.0, 3.0, 0.5]))
def test_an_augmented_gallery_equals_the_literal_mean_with_the_other_rows(seed: int, k: int, alpha: float) -> None:
    gallery_GD = queries_and_gallery(seed)[1]
    rows_GD = unit(gallery_GD)
    expected = [literal(row_D, np.delete(rows_GD, row, axis=0), k, alpha) for row, row_D in enumerate(rows_GD)]
    np.testing.assert_allclose(database_augmentation(gallery_GD, k, alpha), expected, rtol=0, atol=1e-5)


def test_no_neighbours_leave_the_unit_feature() -> None:
    query_QD, gallery_GD = queries_and_gallery(0)
    np.testing.assert_allclose(average_query_expansion(query_QD, gallery_GD, k=0), unit(query_QD), atol=1e-6)
    np.testing.assert_allclose(database_augmentation(gallery_GD, k=0), unit(gallery_GD), atol=1e-6)


def test_a_query_moves_half_way_to_its_nearest() -> None:
    found = average_query_expansion([[2.0, 0.0]], [[0.0, 3.0], [-1.0, 0.1]], k=1)
    np.testing.assert_allclose(found, [[0.5**0.5, 0.5**0.5]], atol=1e-6)


def test_a_larger_alpha_moves_a_query_less() -> None:
    query_QD, gallery_GD = queries_and_gallery(1)
    kept = [
        (average_query_expansion(query_QD, gallery_GD, 5, alpha) * unit(query_QD)).sum(axis=1).mean()
        for alpha in (0.0, 1.0, 3.0, 30.0)
    ]
    assert kept == sorted(kept)
    assert kept[0] < kept[-1] - 0.01


def test_the_order_of_the_gallery_changes_nothing() -> None:
    query_QD, gallery_GD = queries_and_gallery(2)
    order = np.random.default_rng(0).permutation(len(gallery_GD))
    np.testing.assert_array_equal(
        average_query_expansion(query_QD, gallery_GD[order], 7, 2.0),
        average_query_expansion(query_QD, gallery_GD, 7, 2.0),
    )
    np.testing.assert_array_equal(
        database_augmentation(gallery_GD[order], 7, 2.0), database_augmentation(gallery_GD, 7, 2.0)[order]
    )


def test_a_row_with_many_copies_is_not_counted_as_its_own_neighbour() -> None:
    # Six copies: the five nearest of the last do not include it.
    gallery_GD = np.array([[1.0, 0.0]] * 6 + [[0.0, 1.0]])
    found = database_augmentation(gallery_GD, k=4)
    np.testing.assert_allclose(found[:6], gallery_GD[:6], atol=1e-6)
    np.testing.assert_allclose(found[6], np.array([4, 1]) / 17**0.5, atol=1e-6)


def test_rows_are_expanded_in_blocks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    query_QD, gallery_GD = queries_and_gallery(3)
    expected = average_query_expansion(query_QD, gallery_GD, 6, 1.0), database_augmentation(gallery_GD, 6, 1.0)
    monkeypatch.setattr(expansion, "_BLOCK_ROWS", 7)
    found = average_query_expansion(query_QD, gallery_GD, 6, 1.0), database_augmentation(gallery_GD, 6, 1.0)
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1], expected[1])


def test_tensors_are_taken_and_nothing_given_is_changed() -> None:
    query_QD, gallery_GD = queries_and_gallery(4)
    copies = query_QD.copy(), gallery_GD.copy()
    expected = average_query_expansion(query_QD, gallery_GD, 3)
    found = average_query_expansion(torch.tensor(query_QD), torch.tensor(gallery_GD), 3)
    np.testing.assert_array_equal(found, expected)
    database_augmentation(gallery_GD, 3)
    np.testing.assert_array_equal(query_QD, copies[0])
    np.testing.assert_array_equal(gallery_GD, copies[1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"query_QD": np.ones((2, 3))}, "query is 3 wide, gallery 2; they must be of one model"),
        ({"query_QD": np.zeros((1, 2))}, "query: 1 of 1 rows are all zero"),
        ({"gallery_GD": [[np.nan, 1.0]]}, "gallery: 1 of 1 rows are not finite"),
        ({"k": -1}, "k: -1 neighbours of 3 gallery rows; give 0 to 3"),
        ({"k": 4}, "k: 4 neighbours of 3 gallery rows; give 0 to 3"),
        ({"alpha": -1.0}, "alpha: expected 0"),
        ({"query_QD": [[0.0, 1.0]], "gallery_GD": [[0.0, -1.0]], "k": 1}, "mean of a feature and its neighbours: 1 of"),
    ],
)
def test_queries_that_cannot_be_expanded_are_refused(arguments: dict[str, Any], message: str) -> None:
    usable = {"query_QD": np.ones((2, 2)), "gallery_GD": np.ones((3, 2)), "k": 1}
    with pytest.raises(UserError, match=message):
        average_query_expansion(**(usable | arguments))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gallery_GD": np.zeros((1, 2))}, "gallery: 1 of 1 rows are all zero"),
        ({"k": 3}, "k: 3 other neighbours of 3 gallery rows; give 0 to 2"),
        ({"alpha": float("nan")}, "alpha: expected 0"),
    ],
)
def test_a_gallery_that_cannot_be_augmented_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        database_augmentation(**({"gallery_GD": np.ones((3, 2)), "k": 1} | arguments))
