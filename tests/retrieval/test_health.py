"""What is said of a clustering."""

import numpy as np
import pytest

from passreid_ray.retrieval.health import cluster_health


def test_sizes_and_shares() -> None:
    health = cluster_health(np.array([0, 0, 0, 1, 1, -1, -1, -1, -1, -1]))
    assert (health.num_clusters, health.num_outliers) == (2, 5)
    assert (health.outlier_share, health.largest_share, health.mean_size) == (0.5, 0.3, 2.5)
    assert health.nmi_to_last is None
    assert health.ari is None


def test_nothing_but_outliers() -> None:
    health = cluster_health(np.full(4, -1))
    assert (health.num_clusters, health.outlier_share, health.largest_share, health.mean_size) == (0, 1.0, 0.0, 0.0)


def test_perfect_labels_score_one_and_unknown_people_do_not_count() -> None:
    persons = np.array(["ann", "ann", "bob", "bob", None], object)
    health = cluster_health(np.array([3, 3, 1, 1, 1]), persons_N=persons)
    assert health.ari == pytest.approx(1)
    assert health.nmi == pytest.approx(1)


def test_outliers_are_no_cluster_of_their_own() -> None:
    persons = np.array(["ann", "ann", "bob", "bob"], object)
    ari = cluster_health(np.array([-1, -1, 0, 0]), persons_N=persons).ari
    assert ari is not None
    assert ari < 1


def test_equal_labels_under_other_numbers_have_not_changed() -> None:
    labels = np.array([0, 0, 1, 1, -1])
    assert cluster_health(labels, last_N=np.array([5, 5, 2, 2, -1])).nmi_to_last == pytest.approx(1)
    changed = cluster_health(labels, last_N=np.array([0, 1, 0, 1, -1])).nmi_to_last
    assert changed is not None
    assert changed < 0.9


def test_only_what_is_known_becomes_a_metric() -> None:
    assert "ari" not in cluster_health(np.array([0, 0])).as_metrics()
