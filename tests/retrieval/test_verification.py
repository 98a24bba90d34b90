from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passreid_ray.errors import UserError
from passreid_ray.retrieval import cosine_distance, evaluate_ranking, verification
from tests.reference.literal_accept_rates import literal_accept_rate

RATES = (0.0, 1e-3, 0.01, 0.1, 0.29, 0.5, 1.0)


def accept_rates(distance: Any, labels: list[Any], rates: tuple[float, ...] = RATES) -> dict[float, float]:
    return evaluate_ranking(None, None, *labels, distance=distance, false_accept_rates=rates).true_accept_rates


def labels_of(rng: np.random.Generator, num_queries: int, num_gallery: int) -> list[np.ndarray]:
    """Ids and cameras; the first query has a match."""
    labels = [rng.integers(0, 4, size) for size in (num_queries, num_gallery) * 2]
    labels[1][0], labels[2][0], labels[3][0] = labels[0][0], 0, 1
    return labels


def literal(distance: np.ndarray, labels: list[np.ndarray], rates: tuple[float, ...] = RATES) -> dict[float, float]:
    query_ids, gallery_ids, query_cameras, gallery_cameras = labels
    return {
        rate: literal_accept_rate(distance, query_ids, gallery_ids, query_cameras, gallery_cameras, rate)
        for rate in rates
    }


def with_bins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "EXACT_PAIRS", 0)


@settings(deadline=None, max_examples=60)  # the machine may be busy
@given(
    seed=st.integers(0, 2**32),
    num_levels=st.integers(1, 200),
    dtype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_rates_equal_those_of_trying_every_threshold(seed: int, num_levels: int, dtype: type) -> None:
    rng = np.random.default_rng(seed)
    labels = labels_of(rng, int(rng.integers(1, 9)), int(rng.integers(1, 40)))
    distance = ((rng.integers(0, num_levels, [len(ids) for ids in labels[:2]]) - 20) / num_levels).astype(dtype)
    np.testing.assert_equal(accept_rates(distance, labels), literal(distance, labels))  # nan is equal to nan


def test_rates_from_features_equal_those_of_their_distances_also_with_repeated_features() -> None:
    rng = np.random.default_rng(0)
    query_QD = rng.standard_normal((9, 8))
    gallery_GD = rng.standard_normal((30, 8))[rng.integers(0, 30, 60)]
    labels = labels_of(rng, 9, 60)
    found = evaluate_ranking(query_QD, gallery_GD, *labels, false_accept_rates=RATES)
    distance = cosine_distance(query_QD, gallery_GD).round(12)  # equal features at equal distances
    assert found.true_accept_rates == literal(distance, labels)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bins_are_exact_for_distances_that_stand_in_different_bins(dtype: type, monkeypatch: Any) -> None:
    with_bins(monkeypatch)
    rng = np.random.default_rng(1)
    labels = labels_of(rng, 30, 70)
    distance = (rng.integers(-100, 200, (30, 70)) / 100).astype(dtype)
    found = accept_rates(distance, labels)
    assert found == literal(distance, labels)
    assert len(set(found.values())) >= 5


def test_bins_change_a_rate_by_no_more_than_their_width_and_never_upwards(monkeypatch: Any) -> None:
    rng = np.random.default_rng(2)
    labels = labels_of(rng, 40, 500)
    distance = rng.uniform(0.25, 2, (40, 500)).astype(np.float32)
    exact = accept_rates(distance, labels)
    nearer_others = np.where(labels[0][:, None] == labels[1], distance, distance - 2.0**-14)
    lowest = accept_rates(nearer_others, labels)
    with_bins(monkeypatch)
    found = accept_rates(distance, labels)
    assert all(lowest[rate] <= found[rate] <= exact[rate] for rate in RATES)


def test_a_tied_match_is_not_accepted_without_its_non_match() -> None:
    # One match at each of 0.1, 0.2 and 0.3, non-matches at 0.2 and 0.4.
    labels = [np.array([1]), np.array([1, 1, 1, 2, 2]), None, None]
    found = accept_rates([[0.1, 0.2, 0.3, 0.2, 0.4]], labels, (0.0, 0.49, 0.5, 1.0))
    assert found == {0.0: 1 / 3, 0.49: 1 / 3, 0.5: 1.0, 1.0: 1.0}


@pytest.mark.parametrize("bins", [False, True])
def test_pairs_of_the_same_person_and_camera_do_not_count(bins: bool, monkeypatch: Any) -> None:
    if bins:
        with_bins(monkeypatch)
    labels = [np.array([1]), np.array([1, 1, 2, 2]), np.array([0]), np.array([0, 1, 0, 1])]
    assert accept_rates([[0.05, 0.3, 0.2, 0.4]], labels, (0.0, 0.5)) == {0.0: 0.0, 0.5: 1.0}


@pytest.mark.parametrize("bins", [False, True])
def test_queries_without_a_match_bring_non_matches(bins: bool, monkeypatch: Any) -> None:
    if bins:
        with_bins(monkeypatch)
    labels = [np.array([1, 9]), np.array([1, 2]), None, None]
    assert accept_rates([[0.2, 0.5], [0.1, 0.5]], labels, (0.0, 0.34)) == {0.0: 0.0, 0.34: 1.0}


@pytest.mark.parametrize("bins", [False, True])
def test_without_a_non_match_no_rate_is_known(bins: bool, monkeypatch: Any) -> None:
    if bins:
        with_bins(monkeypatch)
    labels = [np.array([1]), np.array([1, 1]), None, None]
    assert np.isnan(accept_rates([[0.1, 0.2]], labels, (0.1,))[0.1])


def test_nothing_is_computed_unless_it_is_asked_for() -> None:
    assert accept_rates([[0.1, 0.2]], [np.array([1]), np.array([1, 2]), None, None], ()) == {}


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan")])
def test_a_rate_that_is_no_fraction_is_refused(rate: float) -> None:
    with pytest.raises(UserError, match="false_accept_rates: expected fractions from 0 to 1, got"):
        accept_rates([[0.1, 0.2]], [np.array([1]), np.array([1, 2]), None, None], (rate,))
