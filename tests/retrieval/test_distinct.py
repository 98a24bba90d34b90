import numpy as np
import pytest
import torch

from passreid_ray.errors import UserError
from passreid_ray.retrieval import distinct
from passreid_ray.retrieval.distances import normalized
from passreid_ray.retrieval.distinct import distinct_unit_features


def repeated_features(num_distinct: int, num_features: int, width: int = 5) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.standard_normal((num_distinct, width)).astype(np.float32)[rng.integers(0, num_distinct, num_features)]


@pytest.mark.parametrize("block_bytes", [1, 100, 10**7])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_every_feature_finds_its_normalised_self(
    block_bytes: int, dtype: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distinct, "_BLOCK_BYTES", block_bytes)
    features_GD = repeated_features(20, 90).astype(dtype)
    unit_MD, column_of_G = distinct_unit_features(features_GD, "features", np.float64)
    assert np.array_equal(unit_MD[column_of_G], normalized(features_GD, "features"))
    assert len(unit_MD) == len(np.unique(features_GD, axis=0))


def test_the_columns_do_not_depend_on_the_order_of_the_features() -> None:
    features_GD = repeated_features(50, 200)
    expected_MD, expected_G = distinct_unit_features(features_GD, "features", np.float32)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(200)
        unit_MD, column_of_G = distinct_unit_features(features_GD[order], "features", np.float32)
        assert np.array_equal(unit_MD, expected_MD)
        assert np.array_equal(column_of_G, expected_G[order])


def test_zeros_of_both_signs_and_powers_of_two_are_one_feature() -> None:
    features_GD = np.array([[0.0, 3.0, 1.0], [-0.0, 3.0, 1.0], [0.0, 6.0, 2.0]], np.float32)
    assert len(distinct_unit_features(features_GD, "features", np.float32)[0]) == 1


def test_features_without_length_stay_zero() -> None:
    unit_MD, column_of_G = distinct_unit_features(np.zeros((3, 4)), "features", np.float64)
    assert unit_MD.tolist() == [[0, 0, 0, 0]]
    assert column_of_G.tolist() == [0, 0, 0]


def test_different_features_of_one_hash_stay_different(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distinct, "_hashes", lambda words_NW: np.zeros(len(words_NW), np.uint64))
    features_GD = repeated_features(20, 90)
    unit_MD, column_of_G = distinct_unit_features(features_GD, "features", np.float32)
    assert np.array_equal(unit_MD[column_of_G], normalized(features_GD, "features"))


def test_features_that_differ_in_one_bit_have_different_hashes() -> None:
    words_NW = np.zeros((32 * 24, 24), np.uint32)
    for bit in range(32 * 24):
        words_NW[bit, bit // 32] = np.uint32(1) << np.uint32(bit % 32)
    assert len(np.unique(distinct._hashes(words_NW))) == len(words_NW)


def test_tensors_of_half_precision_are_taken() -> None:
    features_GD = torch.tensor(repeated_features(4, 9)).bfloat16()
    unit_MD, column_of_G = distinct_unit_features(features_GD, "features", np.float32)
    assert np.array_equal(unit_MD[column_of_G], normalized(features_GD, "features"))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_the_row_of_a_feature_that_is_not_finite_is_named(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distinct, "_BLOCK_BYTES", 100)
    features_GD = repeated_features(4, 9)
    features_GD[7, 2] = value
    with pytest.raises(UserError, match="gallery features: row 7 is not finite"):
        distinct_unit_features(features_GD, "gallery features", np.float32)


def test_features_that_are_no_matrix_are_refused() -> None:
    with pytest.raises(UserError, match=r"gallery features: expected a matrix .* got shape \(3,\)"):
        distinct_unit_features(np.ones(3), "gallery features", np.float32)
