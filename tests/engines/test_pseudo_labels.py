"""The job that only clusters: from crops or from a feature file, and what wrong input gets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from passreid_ray.config import build
from passreid_ray.engines import features, pseudo_labels
from passreid_ray.engines.pseudo_labels import PseudoLabelsConfig
from passreid_ray.errors import UserError
from passreid_ray.retrieval import dbscan_labels, jaccard_distance

SILENT = Console(quiet=True)
MODEL: dict[str, Any] = {"trunk": "vit_tiny_patch16_224", "embed_dim": 24, "depth": 2, "num_heads": 2}
CROPS: dict[str, Any] = {
    "data": {"kind": "synthetic", "num_people": 8, "images_per_person": 6, "splits": ["train"]},
    "model": MODEL,
    "image_size_px": (64, 32),
    "cluster": {"k1": 6, "k2": 2},
    "batch_size": 8,
}


def people(num: int = 20, images: int = 8) -> np.ndarray:
    rng = np.random.default_rng(0)
    return (
        np.repeat(rng.standard_normal((num, 16)), images, axis=0) + 0.6 * rng.standard_normal((num * images, 16))
    ).astype(np.float32)


def feature_file(path: Path, features_ND: np.ndarray, **columns: Any) -> str:
    ids = [f"i{number:04d}" for number in range(len(features_ND))]
    pq.write_table(pa.table({"image_id": ids, "feature": list(features_ND), **columns}), path)
    return str(path)


def config(output: Path, **settings: Any) -> PseudoLabelsConfig:
    return build(PseudoLabelsConfig, {"output": str(output), **settings})


def test_a_feature_file_gives_the_labels_of_the_plain_functions(cluster: None, tmp_path: Path) -> None:
    persons = [f"p{number}" for number in np.repeat(np.arange(20), 8)]
    path = feature_file(tmp_path / "mine.parquet", people(), person_id=persons)
    pseudo_labels.run(config(tmp_path / "out", features=path, cluster={"k1": 8, "k2": 3}), SILENT)
    table = pq.read_table(tmp_path / "out" / "labels.parquet")
    assert table["cluster"].to_pylist() == dbscan_labels(jaccard_distance(people(), 8, 3)).tolist()
    health = json.loads((tmp_path / "out" / "health.json").read_text())
    assert health["num_clusters"] == max(table["cluster"].to_pylist()) + 1
    assert health["ari"] > 0.8


def test_an_image_without_a_feature_is_an_outlier(cluster: None, tmp_path: Path) -> None:
    values: list[Any] = [row.tolist() for row in people()]
    values[5] = None
    table = pa.table({"image_id": [f"i{n:04d}" for n in range(len(values))], "feature": pa.array(values)})
    pq.write_table(table, tmp_path / "mine.parquet")
    pseudo_labels.run(config(tmp_path, features=str(tmp_path / "mine.parquet"), cluster={"k1": 8, "k2": 3}), SILENT)
    labels = pq.read_table(tmp_path / "labels.parquet")["cluster"].to_pylist()
    assert labels[5] == -1
    assert json.loads((tmp_path / "health.json").read_text())["unusable_images"] == 1


def test_crops_are_embedded_clustered_and_pictured_and_features_are_used_again(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pseudo_labels.run(config(tmp_path, **CROPS), SILENT)
    first = pq.read_table(tmp_path / "labels.parquet")
    assert len(first) == 24
    assert (tmp_path / "clusters.png").stat().st_size > 1000
    shards = sorted(tmp_path.glob("features/*/*.parquet"))
    before = [(shard.name, shard.stat().st_mtime_ns) for shard in shards]
    shards[3].unlink()  # as if the job had been stopped before
    computed: list[int] = []
    real = features._feature_batches

    def counted(*arguments: Any) -> Any:
        computed.append(len(arguments[2]))
        return real(*arguments)

    monkeypatch.setattr(features, "_feature_batches", counted)
    pseudo_labels.run(config(tmp_path, **CROPS), SILENT)
    assert computed == [2]  # the rows of one shard
    assert pq.read_table(tmp_path / "labels.parquet").equals(first)
    after = {shard.name: shard.stat().st_mtime_ns for shard in tmp_path.glob("features/*/*.parquet")}
    assert [name for name, time in before if after[name] != time] == [shards[3].name]


def test_other_weights_do_not_take_the_features_that_are_there(cluster: None, tmp_path: Path) -> None:
    for seed in (0, 1):
        pseudo_labels.run(config(tmp_path, seed=seed, **CROPS), SILENT)
    assert len(list((tmp_path / "features").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * np.where(np.arange(len(x)) == 3, np.inf, 1)[:, None], "rows are not finite, the first is row 3"),
        (lambda x: x * (np.arange(len(x)) != 3)[:, None], "rows are all zero, the first is row 3"),
        (lambda x: x[:8], "k1: 8 neighbours, but there are 8 features"),
    ],
    ids=["not finite", "zero", "too few"],
)
def test_features_that_cannot_be_clustered_are_told(cluster: None, tmp_path: Path, change: Any, message: str) -> None:
    path = feature_file(tmp_path / "mine.parquet", change(people()).astype(np.float32))
    with pytest.raises(UserError, match=message):
        pseudo_labels.run(config(tmp_path, features=path, cluster={"k1": 8, "k2": 3}), SILENT)


def test_a_feature_file_of_other_images_is_refused(tmp_path: Path) -> None:
    path = feature_file(tmp_path / "mine.parquet", people(3))
    with pytest.raises(UserError, match=r"is not of this data: 24 of its 24 image ids are not in the data"):
        pseudo_labels.run(config(tmp_path, features=path, data=CROPS["data"]), SILENT)


def test_camera_balance_needs_cameras(cluster: None, tmp_path: Path) -> None:
    path = feature_file(tmp_path / "mine.parquet", people())
    with pytest.raises(UserError, match="not every image has a camera_id"):
        pseudo_labels.run(config(tmp_path, features=path, cluster={"cameras": {"enabled": True}}), SILENT)


@pytest.mark.parametrize("eps", [0.0, 1.5, -0.1])
def test_eps_outside_of_0_to_1_is_refused(tmp_path: Path, eps: float) -> None:
    with pytest.raises(UserError, match=r"cluster\.eps"):
        config(tmp_path, cluster={"eps": eps})
