"""Real unsupervised tuning runs on a real local cluster."""

import math
import re
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rich.console import Console

from passreid_ray.config import build, read_preset
from passreid_ray.engines import evaluate, usl
from passreid_ray.engines.evaluate_config import EvaluateConfig
from passreid_ray.engines.usl import with_start
from passreid_ray.engines.usl_config import USLConfig
from passreid_ray.errors import UserError
from passreid_ray.train.run_log import read_jsonl
from passreid_ray.train.state_files import find_checkpoint, load_state
from tests.engines.killing import kill_a_worker_at, killed_and_given_again, losses
from tests.engines.micro import IN_PROCESS
from tests.engines.usl_micro import PEOPLE, ROUNDS, STEPS_PER_ROUND, usl_config, usl_preset

LAST_STEP = ROUNDS * STEPS_PER_ROUND


def round_labels(folder: Path) -> list[list[int]]:
    return [load_state(path)[0]["labels"].tolist() for path in sorted((folder / "rounds").glob("step_*"))]


def assert_as_unbroken(folder: Path, unbroken: Path) -> None:
    assert round_labels(folder) == round_labels(unbroken)
    assert losses(folder) == losses(unbroken)
    got, expected = load_state(find_checkpoint(folder)), load_state(find_checkpoint(unbroken))
    assert got[1]["round"] == expected[1]["round"] == ROUNDS
    assert all(np.array_equal(value, expected[0][name]) for name, value in got[0].items())


@pytest.fixture(scope="module")
def unbroken(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one worker that nothing disturbed."""
    return usl.run(usl_config(tmp_path_factory.mktemp("unbroken")))


def test_a_run_leaves_everything_that_is_promised(unbroken: Path) -> None:
    records = read_jsonl(unbroken / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, LAST_STEP + 1))
    assert [record["step"] for record in records if "evaluation/mAP" in record] == [0, 2 * STEPS_PER_ROUND, LAST_STEP]
    rounds = [record for record in records if "cluster/num_clusters" in record]
    assert [record["step"] for record in rounds] == [4, 8, 12]
    assert {"cluster/ari", "cluster/num_outliers", "cluster/eps"} <= rounds[0].keys()
    assert "cluster/nmi_to_last" not in rounds[0]
    assert "cluster/nmi_to_last" in rounds[1]
    assert all(math.isfinite(value) for record in records for value in record.values())
    with Image.open(unbroken / "clusters.png") as picture:
        assert picture.height > 200
    table = pq.read_table(unbroken / "labels.parquet")
    assert table.column_names == ["image_id", "cluster"]
    assert table["cluster"].to_pylist() == round_labels(unbroken)[-1]
    assert not list((unbroken / "rounds").glob("features_*"))
    best = max((record for record in records if record["step"]), key=lambda record: record.get("evaluation/mAP", 0))
    assert load_state(find_checkpoint(unbroken / "best"))[1]["step"] == best["step"]


def test_the_resolved_settings_in_the_run_folder_are_those_of_the_run(unbroken: Path) -> None:
    assert build(USLConfig, read_preset(str(unbroken / "config.toml"))) == with_start(usl_config(unbroken.parent))


def test_the_evaluate_job_reads_a_tuned_checkpoint(unbroken: Path, tmp_path: Path) -> None:
    data = usl_config(tmp_path).evaluation.data
    assert data is not None
    config = EvaluateConfig(checkpoint=unbroken, output=tmp_path, data=data, num_actors=2)
    result = evaluate.run(config)[0].methods["cosine"]
    last = [record for record in read_jsonl(unbroken / "metrics.jsonl") if "evaluation/mAP" in record][-1]
    assert result.mAP == pytest.approx(last["evaluation/mAP"], abs=1e-6)


def test_two_workers_give_the_labels_and_losses_of_one(unbroken: Path, tmp_path: Path) -> None:
    folder = usl.run(usl_config(tmp_path, workers={"num_workers": 2}))
    assert round_labels(folder) == round_labels(unbroken)
    for step, loss in losses(folder).items():
        assert loss == pytest.approx(losses(unbroken)[step], rel=2e-4)


def test_a_killed_worker_is_restarted_and_the_run_ends_as_if_unbroken(unbroken: Path, tmp_path: Path) -> None:
    config = usl_config(tmp_path)
    killer = kill_a_worker_at(STEPS_PER_ROUND + 2, config.run.folder)
    folder = usl.run(config)
    assert not killer.is_alive()
    assert_as_unbroken(folder, unbroken)


def test_a_job_killed_between_phases_and_given_again_ends_as_if_unbroken(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "usl"
    begun = "features_0001/*.parquet"  # features of the second round
    printed = killed_and_given_again("usl.py", usl_preset(tmp_path), lambda: list((folder / "rounds").glob(begun)))
    assert re.search(rf"continuing after step {STEPS_PER_ROUND} of {LAST_STEP}", printed)
    assert_as_unbroken(folder, unbroken)


def test_known_people_stay_in_the_memory_beside_the_clusters(cluster: None, tmp_path: Path) -> None:
    source = {**PEOPLE, "num_people": 6, "seed": 5, "splits": ["train"]}
    config = usl_config(tmp_path, rounds=1, source=source, evaluation={}, refine={"kind": "gcl"}, workers=IN_PROCESS)
    folder = usl.run(config)
    tensors, _ = load_state(find_checkpoint(folder / "rounds"))
    task = usl.open_task(config)
    num_clusters = tensors["found"].max() + 1
    known = tensors["labels"].numpy()[task.source_N >= 0]
    assert sorted(set(known - num_clusters.item())) == [0, 1, 2]
    assert len(tensors["centroids"]) == num_clusters + 3
    assert len(pq.read_table(folder / "labels.parquet")) == len(task.target)


def test_an_empty_round_stops_with_advice(cluster: None, tmp_path: Path) -> None:
    config = usl_config(tmp_path, cluster={"k1": 8, "k2": 3, "eps": 0.01, "max_eps_steps": 0}, workers=IN_PROCESS)
    with pytest.raises(UserError, match=r"no usable clusters among 96 images \(eps 0.01: 0 clusters, 100% outliers\)"):
        usl.run(config)


def test_what_can_be_known_is_told_before_ray_starts(tmp_path: Path) -> None:
    silent = Console(quiet=True)
    for changes, message in (
        ({"batch_size": 9}, "batch_size: 9 images cannot be divided by 2"),
        ({"cluster": {"k1": 96}}, "cluster.k1: 96 neighbours, but there are 96 images"),
        ({"start": {"checkpoint": str(tmp_path / "absent")}}, "start.checkpoint: .*absent does not exist"),
        ({"source": {"kind": "folder", "root": str(tmp_path)}}, "no image"),
        ({"views": {"image_size_px": (60, 32)}}, "image size 60x32 px is not a multiple"),
    ):
        with pytest.raises(UserError, match=message):
            usl.run(usl_config(tmp_path / "run", **changes), silent)
