"""Clustering spread over Ray gives the labels of one process, whatever happens to its workers."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from passreid_ray.engines import clustering
from passreid_ray.engines.clustering import CameraConfig, ClusterConfig, centroids, cluster_features
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.errors import UserError
from passreid_ray.models import NeighbourRefiner
from passreid_ray.retrieval import dbscan_labels, jaccard_distance


def silent(phase: str, done: int, total: int) -> None:
    """Progress that nobody looks at."""


def people(num: int = 40, images: int = 12, noise: float = 1.0, width: int = 32) -> NDArray[np.float32]:
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((num, width))
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    features = np.repeat(centers, images, axis=0) + noise / np.sqrt(width) * rng.standard_normal((num * images, width))
    return features.astype(np.float32)


CONFIG = ClusterConfig(k1=15, k2=4, eps=0.5)


def test_labels_are_those_of_the_plain_functions() -> None:
    features = people()
    found = cluster_features(features, CONFIG, silent)
    assert np.array_equal(found.labels_N, dbscan_labels(jaccard_distance(features, 15, 4), 0.5, 4))
    assert found.health.num_clusters > 10
    assert found.recall is None


@pytest.mark.parametrize("block_rows", [64, 111, 480])
def test_blocks_on_ray_change_nothing(cluster: None, block_rows: int) -> None:
    features = people(noise=1.5)
    alone = cluster_features(features, CONFIG, silent)
    spread = cluster_features(features, CONFIG.model_copy(update={"block_rows": block_rows}), silent)
    assert np.array_equal(spread.labels_N, alone.labels_N)
    assert spread.health == alone.health


def test_beside_workers_that_take_every_cpu_the_labels_are_the_same(cluster: None) -> None:
    features = people(noise=1.5)
    alone = cluster_features(features, CONFIG, silent)
    workers = WorkersConfig(cpus_per_worker=64)
    spread = cluster_features(features, CONFIG.model_copy(update={"block_rows": 64}), silent, workers=workers)
    assert np.array_equal(spread.labels_N, alone.labels_N)


def test_int8_and_inverted_lists_report_their_recall() -> None:
    for index in ("int8", "ivf"):
        found = cluster_features(people(), CONFIG.model_copy(update={"index": index}), silent)
        assert found.recall is not None
        assert found.recall > 0.95


def test_every_phase_is_reported_to_its_end() -> None:
    seen: dict[str, tuple[int, int]] = {}
    cluster_features(people(), CONFIG, lambda phase, done, total: seen.update({phase: (done, total)}))
    assert list(seen) == ["neighbours", "codes", "expansion", "distances"]
    assert set(seen.values()) == {(480, 480)}


REAL_OVERLAP_BLOCK = clustering._overlap_block


def dying_overlap_block(rows: slice, *shared: Any, mark: Path) -> Any:
    """The block function, whose process is killed in the middle of the job, once."""
    if rows.start == 120 and mark.exists():
        mark.unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return REAL_OVERLAP_BLOCK(rows, *shared)


def test_a_killed_worker_is_replaced_and_its_block_done_again(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = people(noise=1.5)
    alone = cluster_features(features, CONFIG, silent)
    mark = tmp_path / "mark"
    mark.touch()
    monkeypatch.setattr(clustering, "_overlap_block", partial(dying_overlap_block, mark=mark))
    spread = cluster_features(features, CONFIG.model_copy(update={"block_rows": 60}), silent)
    assert not mark.exists()
    assert np.array_equal(spread.labels_N, alone.labels_N)


def test_too_many_outliers_raise_eps_until_clusters_appear() -> None:
    low = CONFIG.model_copy(update={"eps": 0.1, "eps_step": 0.1})
    found = cluster_features(people(), low, silent)
    assert found.eps > 0.1
    assert found.notes[0].startswith("eps 0.1: ")
    assert found.health.outlier_share <= low.max_outlier_share


def test_one_cluster_that_swallows_the_data_lowers_eps() -> None:
    config = ClusterConfig(k1=15, k2=4, eps=0.99, eps_step=0.1, max_eps_steps=9)
    found = cluster_features(people(noise=1.5), config, silent)
    assert found.eps < 0.99
    assert "one cluster holds" in found.notes[0]
    assert found.health.largest_share <= 0.5


def test_without_usable_clusters_the_last_labels_are_kept_or_the_run_stops_with_advice() -> None:
    noise = np.random.default_rng(0).standard_normal((200, 64)).astype(np.float32)
    config = ClusterConfig(k1=10, k2=3, eps=0.1, max_eps_steps=1)
    last = np.repeat(np.arange(20), 10)
    found = cluster_features(noise, config, silent, last_N=last)
    assert np.array_equal(found.labels_N, last)
    assert found.notes[-1] == "the last round's labels are kept"
    with pytest.raises(UserError, match=r"no usable clusters among 200 images .* set cluster.eps"):
        cluster_features(noise, config, silent)


def test_eps_can_come_from_the_data() -> None:
    found = cluster_features(people(), CONFIG.model_copy(update={"eps_quantile": 0.5}), silent)
    distance = jaccard_distance(people(), 15, 4)
    nearest = [np.sort(distance[[row]].data)[3] for row in range(480)]
    assert found.eps == pytest.approx(np.quantile(nearest, 0.5), abs=1e-6)


def test_refined_features_cluster_at_least_as_well() -> None:
    features, persons = people(noise=2.0, width=64), np.repeat(np.arange(40).astype(str), 12).astype(object)
    plain = cluster_features(features, CONFIG, silent, persons_N=persons).health.ari
    refiner = NeighbourRefiner(64)
    refined = cluster_features(features, CONFIG, silent, persons_N=persons, refiner=refiner).health.ari
    assert refiner.training  # left as it was
    assert plain is not None
    assert refined is not None
    assert refined > plain


def test_camera_balanced_neighbours_join_what_cameras_keep_apart() -> None:
    rng = np.random.default_rng(0)
    persons = np.repeat(np.arange(30), 12)
    cameras = np.tile(np.repeat(["a", "b"], 6), 30).astype(object)
    shift = np.where(cameras == "a", 1.0, -1.0)[:, None] * rng.standard_normal((1, 32)).astype(np.float32) * 0.15
    features = (people(num=30) + shift).astype(np.float32)
    names = persons.astype(str).astype(object)
    plain = cluster_features(features, ClusterConfig(k1=12, k2=3), silent, cameras_N=cameras, persons_N=names)
    balanced = ClusterConfig(cameras=CameraConfig(enabled=True, k1_same=6, k1_other=6, k2_same=2, k2_other=2))
    joined = cluster_features(features, balanced, silent, cameras_N=cameras, persons_N=names)
    assert joined.health.ari is not None
    assert plain.health.ari is not None
    assert joined.health.ari > plain.health.ari


def test_what_cannot_be_clustered_is_told() -> None:
    features = people(num=3)
    with pytest.raises(UserError, match="k1: 36 neighbours, but there are 36 features"):
        cluster_features(features, ClusterConfig(k1=36), silent)
    with pytest.raises(UserError, match="not every image has a camera_id"):
        cluster_features(features, ClusterConfig(cameras=CameraConfig(enabled=True)), silent)
    features[7] = np.nan
    with pytest.raises(UserError, match="1 of 36 rows are not finite, the first is row 7"):
        cluster_features(features, CONFIG, silent)
    features[7] = 0
    with pytest.raises(UserError, match="1 of 36 rows are all zero, the first is row 7"):
        cluster_features(features, CONFIG, silent)


def test_centroids_are_normalised_means_without_outliers() -> None:
    features = np.array([[3, 0], [3, 3], [0, 1], [np.nan, np.nan]], np.float32)
    expected = np.array([[6, 3], [0, 1]]) / np.array([[np.sqrt(45)], [1]])
    np.testing.assert_allclose(centroids(features, np.array([0, 0, 1, -1])), expected, rtol=1e-6)
