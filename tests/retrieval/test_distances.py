import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist

from passreid_ray.errors import UserError
from passreid_ray.retrieval import cosine_distance


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (np.float64, 1e-14)])
def test_distances_are_scipys_in_the_precision_given(dtype: type, tolerance: float) -> None:
    rng = np.random.default_rng(0)
    features_ND, others_MD = rng.standard_normal((5, 16)).astype(dtype), 3 * rng.standard_normal((7, 16)).astype(dtype)
    found = cosine_distance(features_ND, others_MD)
    assert found.dtype == dtype
    np.testing.assert_allclose(found, cdist(features_ND, others_MD, "cosine"), atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_tensors_of_any_precision_are_taken(dtype: torch.dtype) -> None:
    features_ND = torch.randn(4, 8).to(dtype).requires_grad_()
    found = cosine_distance(features_ND, features_ND)
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found, cosine_distance(features_ND.detach().float().numpy(), features_ND.detach().float().numpy())
    )


def test_a_zero_feature_is_at_distance_one() -> None:
    assert cosine_distance(np.zeros((1, 3)), np.eye(3)).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.array([[1.0, 2], [np.nan, 1]]), "features: row 1 is not finite"),
        (np.array([[1.0, np.inf]]), "features: row 0 is not finite"),
        (np.ones((2, 3)), "3 and 2 wide"),
        (np.ones(2), "expected a matrix"),
    ],
)
def test_unusable_features_are_refused(features: np.ndarray, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cosine_distance(features, np.ones((1, 2)))
