"""What is said of an embedding without person ids."""

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import rankdata

from passreid_ray.errors import UserError
from passreid_ray.retrieval import LabelFreeScore, evaluate_ranking, label_free_score
from passreid_ray.retrieval.cluster_prior import (
    Assignment,
    cluster_distribution,
    kl_divergence,
    prior_distribution,
    unit_centroids,
)
from passreid_ray.retrieval.neighbours import unit_features
from passreid_ray.retrieval.spread import UNIFORMITY_ROWS, alignment, effective_rank, uniformity
from tests.reference.label_free import (
    literal_alignment,
    literal_effective_rank,
    literal_kl,
    literal_shares,
    literal_uniformity,
    literal_zipf,
)
from tests.retrieval.clustered import clustered_features

NOISES = (0.1, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.5, 6.0, 10.0)
NUM_PERSONS, NUM_ROWS, WIDTH = 20, 800, 128


def _uniform_to_zipf(num_clusters: int) -> float:
    return kl_divergence(np.full(num_clusters, 1 / num_clusters), prior_distribution(num_clusters, "zipf"))


def _identical(num_rows: int) -> NDArray[np.float32]:
    return np.tile(np.random.default_rng(0).standard_normal(16).astype(np.float32), (num_rows, 1))


def test_a_distribution_that_is_the_prior_diverges_by_nothing() -> None:
    zipf_k = prior_distribution(10, "zipf")
    assert kl_divergence(zipf_k, zipf_k) == 0


@pytest.mark.parametrize(("num_clusters", "divergence"), [(10, 0.28251), (100, 0.6785), (500, 0.9239)])
def test_uniform_shares_diverge_from_zipfs_by_the_known_constants(num_clusters: int, divergence: float) -> None:
    assert _uniform_to_zipf(num_clusters) == pytest.approx(divergence, abs=5e-5)


def test_all_rows_in_one_cluster_diverge_by_the_logarithm_of_the_largest_share() -> None:
    one_hot_k, zipf_k = np.eye(10)[3], prior_distribution(10, "zipf")
    assert kl_divergence(one_hot_k, zipf_k) == pytest.approx(1.0747, abs=5e-5)
    assert kl_divergence(one_hot_k, zipf_k) == pytest.approx(-np.log(zipf_k[0]))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 1000), min_size=2, max_size=30).filter(any), st.randoms(use_true_random=False))
def test_the_divergence_is_not_negative_and_blind_to_the_order_of_clusters(counts: list[int], random: Any) -> None:
    shares_k = np.array(counts) / sum(counts)
    shuffled_k = shares_k.copy()
    random.shuffle(shuffled_k)
    zipf_k = prior_distribution(len(counts), "zipf")
    assert kl_divergence(shuffled_k, zipf_k[::-1]) == kl_divergence(shares_k, zipf_k) >= -1e-12


def test_priors_are_descending_shares() -> None:
    np.testing.assert_allclose(prior_distribution(7, "zipf", exponent=1.3), literal_zipf(7, 1.3), atol=1e-15)
    np.testing.assert_allclose(prior_distribution(4, "uniform"), [0.25] * 4)
    np.testing.assert_allclose(prior_distribution(4, "zipf", exponent=0), [0.25] * 4)
    counts = torch.tensor([1, 5, 2])
    np.testing.assert_allclose(
        prior_distribution(3, "empirical", empirical_counts=counts), [5 / 8, 2 / 8, 1 / 8], atol=1e-15
    )


@pytest.mark.parametrize("assignment", ["soft", "hard"])
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_the_score_is_the_literal_one(assignment: Assignment, exponent: float) -> None:
    rng = np.random.default_rng(1)
    features_ND = 3 * clustered_features(6, 20, 12, noise=1.0, seed=1)
    positives_ND = features_ND + rng.standard_normal(features_ND.shape)
    score = label_free_score(
        features_ND, num_clusters=8, exponent=exponent, assignment=assignment, seed=5, positives_ND=positives_ND
    )
    unit_ND, unit_positives_ND = unit_features(features_ND), unit_features(positives_ND)
    rows = unit_ND.tolist()
    shares = literal_shares(rows, unit_centroids(unit_ND, 8, seed=5).tolist(), assignment)
    np.testing.assert_allclose(score.cluster_distribution_k, shares, atol=1e-10)
    assert score.kl_divergence == pytest.approx(literal_kl(shares, literal_zipf(8, exponent)), abs=1e-10)
    assert score.effective_rank == pytest.approx(literal_effective_rank(rows), abs=1e-10)
    assert score.uniformity == pytest.approx(literal_uniformity(rows), abs=1e-10)
    assert score.alignment == pytest.approx(literal_alignment(rows, unit_positives_ND.tolist()), abs=1e-10)


def test_large_inputs_are_scored_block_by_block_as_at_once() -> None:
    features_ND = clustered_features(9, 1000, 8, noise=0.8, seed=2)
    assert effective_rank(features_ND) == pytest.approx(literal_effective_rank(features_ND.tolist()), abs=1e-10)
    positives_ND = np.roll(features_ND, 1, axis=0)
    squared_N = np.square(features_ND.astype(np.float64) - positives_ND).sum(axis=1)
    assert alignment(features_ND, positives_ND) == pytest.approx(squared_N.mean(), abs=1e-10)
    centroids_kD = unit_centroids(features_ND[:500], 300, seed=0)  # so many that the rows take several blocks
    logits_Nk = 2.0 * features_ND.astype(np.float64) @ centroids_kD.T
    soft_Nk = np.exp(logits_Nk) / np.exp(logits_Nk).sum(axis=1, keepdims=True)
    found_k = cluster_distribution(features_ND, centroids_kD, "soft")
    np.testing.assert_allclose(found_k, np.sort(soft_Nk.mean(axis=0))[::-1], atol=1e-10)


def test_uniformity_of_many_rows_is_near_that_of_all() -> None:
    features_ND = clustered_features(12, UNIFORMITY_ROWS // 8, 16, noise=1.5, seed=3)
    cosines_NN = features_ND.astype(np.float64) @ features_ND.T.astype(np.float64)
    potentials_NN = np.exp(4 * cosines_NN - 4)
    num_rows = len(features_ND)
    exact = np.log((potentials_NN.sum() - np.trace(potentials_NN)) / (num_rows * (num_rows - 1)))
    assert uniformity(features_ND, seed=0) == pytest.approx(exact, abs=0.02)
    assert uniformity(features_ND, seed=0) != uniformity(features_ND, seed=1)


def test_centroids_of_separate_persons_are_their_normalised_means() -> None:
    rng = np.random.default_rng(4)
    person_N = rng.permutation(np.repeat(np.arange(5), 30))
    features_ND = unit_features(np.eye(5, 16)[person_N] + 0.02 * rng.standard_normal((150, 16)))
    means = np.stack([features_ND[person_N == person].mean(axis=0, dtype=np.float64) for person in range(5)])
    means /= np.linalg.norm(means, axis=1, keepdims=True)
    centroids_kD = unit_centroids(features_ND, 5, seed=0)
    cluster_of_person = (means @ centroids_kD.T).argmax(axis=1)
    np.testing.assert_allclose(centroids_kD[cluster_of_person], means, atol=1e-6)


@pytest.mark.parametrize("num_clusters", [10, 100, 500])
def test_collapsed_features_score_as_uniform_shares(num_clusters: int) -> None:
    score = label_free_score(_identical(600), num_clusters=num_clusters, seed=0)
    assert score.kl_divergence == pytest.approx(_uniform_to_zipf(num_clusters), abs=1e-5)
    assert score.effective_rank == pytest.approx(1)
    assert score.uniformity == 0


def test_collapsed_features_are_one_cluster_when_assigned_hard() -> None:
    score = label_free_score(_identical(600), num_clusters=10, assignment="hard", seed=0)
    assert score.cluster_distribution_k.tolist() == [1.0] + [0.0] * 9


@pytest.mark.parametrize("assignment", ["soft", "hard"])
def test_more_clusters_than_different_features_still_score(assignment: Assignment) -> None:
    score = label_free_score(np.tile(np.eye(3, 8), (20, 1)), num_clusters=40, assignment=assignment, seed=0)
    assert score.cluster_distribution_k.sum() == pytest.approx(1)
    assert np.isfinite(score.kl_divergence)


def test_a_cluster_for_each_row_is_uniform_when_assigned_hard() -> None:
    features_ND = clustered_features(4, 5, 16, noise=0.5, seed=0)
    score = label_free_score(features_ND, num_clusters=20, prior="uniform", assignment="hard", seed=0)
    assert score.cluster_distribution_k.tolist() == [0.05] * 20
    assert score.kl_divergence == pytest.approx(0, abs=1e-15)


def test_orthogonal_features_use_every_direction() -> None:
    assert effective_rank(np.eye(12, dtype=np.float32)) == pytest.approx(12)
    assert uniformity(np.eye(12, dtype=np.float32), seed=0) == pytest.approx(-4)
    assert alignment(np.eye(4, dtype=np.float32), -np.eye(4, dtype=np.float32)) == pytest.approx(4)


def test_the_score_is_a_function_of_the_directions_and_the_seed() -> None:
    features_ND = clustered_features(30, 20, 32, noise=2.0, seed=6)
    first = label_free_score(features_ND, num_clusters=15, seed=3)
    scaled = label_free_score(torch.from_numpy(4 * features_ND).requires_grad_(), num_clusters=15, seed=3)
    other = label_free_score(features_ND, num_clusters=15, seed=4)
    assert scaled.cluster_distribution_k.tolist() == first.cluster_distribution_k.tolist()
    assert scaled.as_metrics() == first.as_metrics()
    assert other.kl_divergence != first.kl_divergence


def test_the_score_of_several_starts_is_their_mean_and_depends_less_on_the_seed() -> None:
    features_ND = clustered_features(30, 20, 32, noise=4.0, seed=6)
    alone = [label_free_score(features_ND, num_clusters=15, seed=3 + start) for start in range(4)]
    together = label_free_score(features_ND, num_clusters=15, seed=3, num_starts=4)
    assert together.kl_divergence == pytest.approx(np.mean([own.kl_divergence for own in alone]), abs=1e-12)
    shares_Sk = [own.cluster_distribution_k for own in alone]
    np.testing.assert_allclose(together.cluster_distribution_k, np.mean(shares_Sk, axis=0), atol=1e-12)
    of_one, of_eight = (
        np.std([label_free_score(features_ND, num_clusters=15, seed=s, num_starts=n).kl_divergence for s in seeds])
        for n, seeds in ((1, range(64)), (8, range(0, 64, 8)))
    )
    assert of_eight < 0.6 * of_one


def test_an_empirical_prior_that_is_met_scores_zero() -> None:
    counts = [50, 30, 20]
    features_ND = np.repeat(np.eye(3, 8), counts, axis=0)
    score = label_free_score(
        features_ND, num_clusters=3, prior="empirical", empirical_counts=counts[::-1], assignment="hard", seed=0
    )
    assert score.kl_divergence == pytest.approx(0, abs=1e-15)


def test_what_is_known_becomes_a_metric() -> None:
    score = LabelFreeScore(0.5, 3.0, -2.0, None, np.array([0.7, 0.3]))
    metrics = {"label_free/kl": 0.5, "label_free/effective_rank": 3.0, "label_free/uniformity": -2.0}
    assert score.as_metrics() == metrics
    with_views = LabelFreeScore(0.5, 3.0, -2.0, 0.1, np.array([0.7, 0.3]))
    assert with_views.as_metrics() == metrics | {"label_free/alignment": 0.1}


def _noisy_persons(noise: float, seed: int, *, zipfian: bool) -> tuple[NDArray[np.floating], NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((NUM_PERSONS, WIDTH))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    shares = literal_zipf(NUM_PERSONS, 1.0) if zipfian else [1 / NUM_PERSONS] * NUM_PERSONS
    counts = np.round(NUM_ROWS * np.array(shares)).astype(int)
    counts[0] += NUM_ROWS - counts.sum()
    person_N = np.repeat(np.arange(NUM_PERSONS), counts)
    return centers[person_N] + noise / np.sqrt(WIDTH) * rng.standard_normal((NUM_ROWS, WIDTH)), person_N


@cache
def _noise_sweep(*, zipfian: bool) -> tuple[NDArray, NDArray, NDArray]:
    """(mAP, soft KL, hard KL) of every seed and noise, least noise first: ``(3, noises)`` each."""
    rows = []
    for seed in range(3):
        for noise in NOISES:
            features_ND, person_N = _noisy_persons(noise, seed, zipfian=zipfian)
            halves = features_ND[::2], features_ND[1::2], person_N[::2], person_N[1::2]
            soft = label_free_score(features_ND, num_clusters=NUM_PERSONS, seed=0).kl_divergence
            hard = label_free_score(features_ND, num_clusters=NUM_PERSONS, assignment="hard", seed=0).kl_divergence
            rows.append((evaluate_ranking(*halves, None, None).mAP, soft, hard))
    mean_ap, soft, hard = np.array(rows).T.reshape(3, 3, len(NOISES))
    return mean_ap, soft, hard


def _spearman(first: NDArray, second: NDArray) -> float:
    return float(np.corrcoef(rankdata(first), rankdata(second))[0, 1])


def test_the_soft_score_follows_map_where_persons_are_zipfian() -> None:
    mean_ap, soft, _ = _noise_sweep(zipfian=True)
    assert _spearman(mean_ap, soft) <= -0.93
    assert all(_spearman(*of_seed) <= -0.9 for of_seed in zip(mean_ap, soft, strict=True))


def test_the_hard_score_does_not_follow_map_where_persons_are_equally_frequent() -> None:
    mean_ap, soft, hard = _noise_sweep(zipfian=False)
    of_soft, of_hard = _spearman(mean_ap, soft), _spearman(mean_ap, hard)
    assert of_soft <= -0.8
    assert of_hard >= max(-0.7, of_soft + 0.15)
    # The better the clusters, the nearer to uniform their shares: an embedding without an error scores worst of all.
    assert hard[mean_ap > 0.999].max() > hard[mean_ap < 0.5].max() + 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_clusters": 11}, "num_clusters: 11 clusters of 10 features; lower it"),
        ({"num_clusters": 1}, "num_clusters: 1 say nothing"),
        ({"num_clusters": 0}, "give at least 2"),
        ({"num_starts": 0}, "num_starts: expected 1 or more, got 0"),
        ({"seed": -1}, "seed: expected a whole number from 0"),
        ({"features_ND": np.full((10, 4), np.nan)}, "features: 10 of 10 rows are not finite"),
        ({"features_ND": np.zeros((10, 4))}, "features: 10 of 10 rows are all zero"),
        ({"features_ND": np.ones(10)}, "expected a matrix"),
        ({"positives_ND": np.ones((9, 4))}, "positives: expected the shape"),
        ({"positives_ND": np.full((10, 4), np.inf)}, "positives: 10 of 10 rows are not finite"),
        ({"prior": "pareto"}, "prior: expected 'zipf', 'uniform' or 'empirical', got 'pareto'"),
        ({"assignment": "fuzzy"}, "assignment: expected 'soft' or 'hard', got 'fuzzy'"),
        ({"exponent": -1.0}, "exponent: expected a number from 0 on"),
        ({"exponent": float("nan")}, "exponent: expected a number from 0 on"),
        ({"exponent": 1e4}, "the smallest of 3 shares is 0; give a lower one"),
        ({"prior": "empirical"}, "empirical_counts: prior='empirical' needs them"),
        ({"prior": "empirical", "empirical_counts": [1, 2]}, "empirical_counts: expected 3"),
        ({"prior": "empirical", "empirical_counts": [1, 2, 0]}, "1 of 3 are not positive numbers, the first is 0.0"),
        ({"empirical_counts": [1, 2, 3]}, "given with prior='zipf', which ignores them"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_words(arguments: dict[str, Any], message: str) -> None:
    valid: dict[str, Any] = {"features_ND": np.random.default_rng(0).standard_normal((10, 4)), "num_clusters": 3}
    given_arguments: dict[str, Any] = valid | {"seed": 0} | arguments
    with pytest.raises(UserError, match=message):
        label_free_score(**given_arguments)


def test_an_unknown_assignment_is_refused_before_clusters_are_looked_for() -> None:
    with pytest.raises(UserError, match="assignment: expected 'soft' or 'hard', got 'fuzzy'"):
        label_free_score(np.eye(3), num_clusters=4, assignment="fuzzy", seed=0)  # pyright: ignore[reportArgumentType]
