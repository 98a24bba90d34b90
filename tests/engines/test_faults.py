"""Real runs that are disturbed, each equal to the bit to one that nothing disturbed."""

import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from passreid_ray.data import SyntheticSource, open_rows
from passreid_ray.engines import finetune, pretrain, usl
from passreid_ray.engines.embedding import embed_numbers
from passreid_ray.engines.features import FeatureConfig, extract
from passreid_ray.engines.loading import load_model
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.run_log import read_jsonl
from passreid_ray.train.state_files import load_state
from tests.engines.killing import ROOT, KillOne, losses
from tests.engines.micro import IN_PROCESS, SETTINGS, STEPS_PER_EPOCH, micro_config
from tests.engines.under_pressure import large_batches
from tests.engines.usl_micro import usl_config
from tests.train.full_disk import FullDisk, full_disk

__all__ = ["full_disk"]  # a fixture

EPOCHS = 3
LAST_STEP = EPOCHS * STEPS_PER_EPOCH
SHORT: dict[str, Any] = {"epochs": EPOCHS, "evaluation": {}, "workers": IN_PROCESS}


def run_and_hear(config: pretrain.PretrainConfig) -> str:
    """What a run prints."""
    heard = io.StringIO()
    pretrain.run(config, Console(file=heard, width=400))
    return heard.getvalue()


def assert_same_end(got: Path, expected: Path) -> None:
    assert losses(got) == losses(expected)
    name = f"step_{LAST_STEP:08d}"
    (tensors, _), (others, _) = load_state(got / name), load_state(expected / name)
    assert tensors.keys() == others.keys()
    assert all(np.array_equal(value, others[key]) for key, value in tensors.items())


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing disturbed."""
    return pretrain.run(micro_config(tmp_path_factory.mktemp("undisturbed"), **SHORT))


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def test_a_checkpoint_with_a_flipped_bit_costs_the_steps_since_the_one_before(
    undisturbed: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "pretrain"
    shutil.copytree(undisturbed, folder)
    flip_a_bit(folder / f"step_{LAST_STEP:08d}" / "state.safetensors")
    before = LAST_STEP - STEPS_PER_EPOCH
    said = run_and_hear(micro_config(tmp_path, **SHORT))
    assert "its SHA-256 is not the one in state.json; set aside as damaged-step_00000018, going on from step 12" in said
    assert f"continuing after step {before} of {LAST_STEP}" in said
    assert (folder / "damaged-step_00000018" / "state.safetensors").is_file()
    assert_same_end(folder, undisturbed)


@pytest.fixture
def full_at(full_disk: FullDisk, monkeypatch: pytest.MonkeyPatch) -> Callable[[Collection[int]], None]:
    """Has the disk full while the checkpoints of the given steps are written."""
    write = CheckpointStore.write

    def fill(steps: Collection[int]) -> None:
        def write_at(store: CheckpointStore, step: int, save: Any, **more: Any) -> str:
            with full_disk.full() if step in steps else nullcontext():
                return write(store, step, save, **more)

        monkeypatch.setattr(CheckpointStore, "write", write_at)

    return fill


def test_a_disk_that_is_full_at_one_checkpoint_costs_nothing(
    undisturbed: Path, tmp_path: Path, full_disk: FullDisk, full_at: Callable[[Collection[int]], None]
) -> None:
    full_at([12])
    config = micro_config(tmp_path, **SHORT, run={"output": str(tmp_path), "storage": str(full_disk.folder)})
    said = run_and_hear(config)
    assert "step_00000012: the checkpoint cannot be written: " in said
    assert "(step 12); the newest checkpoint is step_00000006; training goes on" in said
    assert config.run.checkpoints.names() == ["step_00000006", "step_00000018"]
    shutil.copytree(full_disk.folder / "pretrain", config.run.folder, dirs_exist_ok=True)
    assert_same_end(config.run.folder, undisturbed)


def test_a_disk_that_is_full_at_the_end_is_told_and_the_same_command_goes_on(
    undisturbed: Path, tmp_path: Path, full_disk: FullDisk, full_at: Callable[[Collection[int]], None]
) -> None:
    config = micro_config(tmp_path, **SHORT, run={"output": str(tmp_path), "storage": str(full_disk.folder)})
    full_at([18])
    message = r"step_00000018: .* cannot be written: .*; the newest checkpoint is step_00000012\. Make room; the same"
    with pytest.raises(UserError, match=message):
        pretrain.run(config)
    full_at([])
    assert "continuing after step 12 of 18" in run_and_hear(config)
    shutil.copytree(full_disk.folder / "pretrain", config.run.folder, dirs_exist_ok=True)
    assert_same_end(config.run.folder, undisturbed)


def test_a_disk_that_stays_full_ends_the_run_at_the_third_checkpoint(
    cluster: None, tmp_path: Path, full_disk: FullDisk, full_at: Callable[[Collection[int]], None]
) -> None:
    full_at(range(5, LAST_STEP))
    run = {"output": str(tmp_path), "storage": str(full_disk.folder), "checkpoint_every_steps": 2}
    config = micro_config(tmp_path, **SHORT, run=run)
    with pytest.raises(UserError, match=r"step_00000010: .*the newest checkpoint is step_00000004\. Make room"):
        pretrain.run(config)
    assert config.run.checkpoints.names() == ["step_00000002", "step_00000004"]


def test_damaged_labels_of_a_round_under_way_cost_the_steps_since_it_began(cluster: None, tmp_path: Path) -> None:
    run = {"name": "usl", "output": str(tmp_path), "checkpoint_every_steps": 2, "keep": 3}
    config = usl_config(tmp_path, run=run, rounds=2, evaluation={}, workers=IN_PROCESS)
    folder = usl.run(config)
    expected = losses(folder)
    labels = folder / "rounds" / "step_00000001" / "state.safetensors"
    shutil.rmtree(folder / "step_00000008")  # as if it had been killed in the middle of the second round
    before = labels.read_bytes()
    flip_a_bit(labels)
    heard = io.StringIO()
    usl.run(config, Console(file=heard, width=400))
    assert "step_00000006: its round's pseudo-labels: " in heard.getvalue()
    assert "going on from step 4: 2 steps are done again" in heard.getvalue()
    assert "set aside as damaged-step_00000001" in heard.getvalue()
    assert labels.read_bytes() == before
    assert losses(folder) == expected


@pytest.mark.slow
def test_a_data_task_that_is_killed_is_run_again(undisturbed: Path, tmp_path: Path) -> None:
    killer = KillOne("MapBatches(make_item)")
    folder = pretrain.run(micro_config(tmp_path, **SHORT))
    assert killer.killed is not None
    print(f"data task: at work again after {killer.seconds} s")
    assert_same_end(folder, undisturbed)


@pytest.mark.slow
def test_a_feature_actor_that_is_killed_is_started_again(cluster: None) -> None:
    config = FeatureConfig.model_validate({"model": SETTINGS["model"], "image_size_px": (64, 32), "num_actors": 1})
    rows = open_rows(SyntheticSource(num_people=16, images_per_person=12))
    loaded, numbers = load_model(config, "cat"), np.arange(len(rows))
    expected, _ = embed_numbers(
        loaded.model, rows, numbers, loaded.image_input, batch_size=4, device=torch.device("cpu")
    )
    killer = KillOne("FeatureActor))")
    features_ND, bad = extract(config, rows, loaded, 4, lambda *progress: None)
    assert killer.killed is not None
    print(f"feature actor: at work again after {killer.seconds} s")
    assert not bad
    assert np.array_equal(features_ND, expected.numpy())


@pytest.mark.slow
def test_an_object_store_that_is_too_small_changes_nothing(cluster: None, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.engines.under_pressure", str(tmp_path / "pressed")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "RAY_ADDRESS": ""}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        expected = losses(finetune.run(large_batches(tmp_path / "free")))
        printed = process.communicate()[0]
    assert process.returncode == 0
    figures = json.loads(printed.splitlines()[-1])
    print(f"object store: {figures}")
    assert figures["spilled"] > 2**20
    assert figures["restored"] > 2**20
    assert losses(tmp_path / "pressed" / "finetune") == expected
    assert len(expected) == 8


def test_a_clock_that_jumps_by_hours_changes_nothing(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, calls = time.time, iter(range(10**9))

    def jumping() -> float:
        return now() + 3600 * (-5, 0, 7, 2)[next(calls) // 20 % 4]

    monkeypatch.setattr(time, "time", jumping)
    folder = pretrain.run(micro_config(tmp_path, **SHORT))
    monkeypatch.undo()
    assert next(calls) > 80  # there was somebody to be misled
    assert_same_end(folder, undisturbed)
    for record in read_jsonl(folder / "metrics.jsonl"):
        assert all(math.isfinite(value) for value in record.values())
        assert 0 < record["images_per_second"] < 1e5
        assert 0 <= record["data_wait_share"] <= 1
