import numpy as np
import pytest
import torch

from passreid_ray.errors import UserError
from passreid_ray.retrieval import nearest_neighbours
from passreid_ray.retrieval.neighbours import IndexKind, sampled_recall, unit_features
from tests.retrieval.clustered import brute_force, clustered_features, recall


@pytest.mark.parametrize("index", ["exact", "int8", "ivf"])
def test_neighbours_begin_with_the_row_itself_and_ascend(index: IndexKind) -> None:
    features_ND = clustered_features(20, 10, 32, 0.8, seed=1)
    distances, rows = nearest_neighbours(features_ND, 10, index=index)
    assert distances.dtype == np.float32
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows[:, 0], np.arange(200))
    assert not distances[:, 0].any()
    assert (np.diff(distances) >= 0).all()
    assert recall(rows, brute_force(features_ND, features_ND, 10)[1]) >= 0.95


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tensors_of_any_precision_give_what_numpy_gives(dtype: torch.dtype) -> None:
    features_ND = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    for found, expected in zip(
        nearest_neighbours(features_ND, 5), nearest_neighbours(features_ND.detach().float().numpy(), 5), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_features_need_not_lie_in_rows_in_memory() -> None:
    features_ND = np.random.default_rng(0).standard_normal((40, 16))
    found = nearest_neighbours(np.asfortranarray(features_ND)[:, ::2], 4)[1]
    np.testing.assert_array_equal(found, brute_force(features_ND[:, ::2], features_ND[:, ::2], 4)[1])


def test_recall_is_the_share_of_true_neighbours_that_were_found() -> None:
    features_ND = clustered_features(60, 10, 32, 1.0, seed=2)
    rows = brute_force(features_ND, features_ND, 10)[1]
    assert sampled_recall(features_ND, rows) == 1
    rows[:, 7:] = -1
    assert sampled_recall(features_ND, rows) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("features", "k", "message"),
    [
        (np.array([[1.0, 2], [np.nan, 1], [np.inf, 0]]), 1, "2 of 3 rows are not finite, the first is row 1"),
        (np.ones(3), 1, r"expected a matrix .* got shape \(3,\)"),
        (np.ones((0, 3)), 1, r"got shape \(0, 3\)"),
        (np.ones((4, 3)), 0, "k: 0 neighbours of 4 rows"),
        (np.ones((4, 3)), 5, "k: 5 neighbours of 4 rows"),
    ],
)
def test_unusable_input_is_refused(features: np.ndarray, k: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        nearest_neighbours(features, k)


def test_unit_features_refuse_zero_rows() -> None:
    with pytest.raises(UserError, match="query: 2 of 4 rows are all zero, the first is row 1"):
        unit_features(np.diag([1.0, 0, 2, 0]), "query")
    np.testing.assert_array_equal(unit_features(np.diag([1.0, 5, 2, 3])), np.eye(4))
