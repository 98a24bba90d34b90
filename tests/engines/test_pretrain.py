"""Real runs on a real local cluster."""

import json
import math
import re
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from passreid_ray.config import build, read_preset
from passreid_ray.engines import evaluate, pretrain
from passreid_ray.engines.evaluate_config import EvaluateConfig
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.errors import UserError
from passreid_ray.train.run_log import read_jsonl
from passreid_ray.train.state_files import find_checkpoint, load_state
from tests.engines.killing import kill_a_worker_at, killed_and_given_again, losses, stop_a_worker_at
from tests.engines.micro import IN_PROCESS, SETTINGS, STEPS_PER_EPOCH, micro_config, micro_preset

LAST_STEP = SETTINGS["epochs"] * STEPS_PER_EPOCH


def tensors(folder: Path) -> dict[str, np.ndarray]:
    return {name: value.numpy() for name, value in load_state(find_checkpoint(folder))[0].items()}


@pytest.fixture(scope="module")
def unbroken(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one worker that nothing disturbed."""
    return pretrain.run(micro_config(tmp_path_factory.mktemp("unbroken")))


def test_a_run_leaves_everything_that_is_promised(unbroken: Path) -> None:
    records = read_jsonl(unbroken / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, LAST_STEP + 1))
    assert [record["step"] for record in records if "evaluation/mAP" in record] == [
        epoch * STEPS_PER_EPOCH for epoch in (0, 2, 4, 6)
    ]
    logged = next(record for record in records if "loss" in record)
    for token in ("cls", "part0", "part1", "part2"):
        assert {f"{kind}/{token}" for kind in ("loss", "teacher_entropy", "kl", "feature_std")} <= logged.keys()
    assert {"grad_norm", "lr", "images_per_second", "data_wait_share", "peak_memory_bytes"} <= logged.keys()
    assert all(math.isfinite(value) for record in records for value in record.values())
    assert list((unbroken / "tensorboard").glob("events.*"))
    with Image.open(unbroken / "attention.png") as picture:
        assert picture.height > 200


def test_the_resolved_settings_in_the_run_folder_are_those_of_the_run(unbroken: Path) -> None:
    assert build(PretrainConfig, read_preset(str(unbroken / "config.toml"))) == micro_config(unbroken.parent)


def test_only_the_newest_checkpoints_are_kept(unbroken: Path) -> None:
    kept = sorted(folder.name for folder in unbroken.glob("step_*"))
    assert kept == [f"step_{step:08d}" for step in (LAST_STEP - STEPS_PER_EPOCH, LAST_STEP)]


def test_a_finished_run_given_again_does_no_more_steps(unbroken: Path) -> None:
    before = losses(unbroken)
    pretrain.run(micro_config(unbroken.parent))
    assert losses(unbroken) == before


@pytest.fixture(scope="module")
def unbroken_by_two(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the same run by two workers."""
    return pretrain.run(micro_config(tmp_path_factory.mktemp("unbroken_by_two"), workers={"num_workers": 2}))


def test_two_workers_give_the_losses_and_weights_of_one(unbroken: Path, unbroken_by_two: Path) -> None:
    np.testing.assert_allclose(list(losses(unbroken_by_two).values()), list(losses(unbroken).values()), rtol=1e-5)
    got, expected = tensors(unbroken_by_two), tensors(unbroken)
    for name, value in got.items():
        if "attn.qkv.bias" not in name:  # its K third has no gradient but rounding, which Adam turns into steps
            np.testing.assert_allclose(value, expected[name], atol=1e-4, err_msg=name)


def test_a_worker_killed_twice_is_restarted_and_the_run_ends_as_if_unbroken(unbroken: Path, tmp_path: Path) -> None:
    config = micro_config(tmp_path)
    killers = [kill_a_worker_at(epoch * STEPS_PER_EPOCH + 2, config.run.folder) for epoch in (1, 3)]
    folder = pretrain.run(config)
    assert not any(killer.is_alive() for killer in killers)
    assert [own["failures/count"] for own in read_jsonl(folder / "metrics.jsonl") if "failures/count" in own] == [1, 2]
    assert losses(folder) == losses(unbroken)
    got, expected = tensors(folder), tensors(unbroken)
    assert all(np.array_equal(value, expected[name]) for name, value in got.items())


def test_a_stopped_worker_is_named_and_replaced_and_the_run_ends_as_if_unbroken(
    unbroken_by_two: Path, tmp_path: Path
) -> None:
    # Longer than a busy machine makes a healthy worker wait for its first batch.
    config = micro_config(tmp_path, workers={"num_workers": 2, "hang_seconds": 15})
    stopped = stop_a_worker_at(STEPS_PER_EPOCH + 2, config.run.folder)
    console = Console(file=StringIO(), soft_wrap=True)
    folder = pretrain.run(config, console)
    assert isinstance(console.file, StringIO)
    named = re.search(
        r"^rank (\d) on \S+ \(pid (\d+)\) hangs after step (\d+): it has not answered for \d+ s "
        r"\(stopped by a signal\)\..* It was killed and counts as a crash$",
        console.file.getvalue(),
        re.MULTILINE,
    )
    assert named is not None, console.file.getvalue()
    rank, pid, step = map(int, named.groups())
    assert [pid] == stopped
    assert step >= STEPS_PER_EPOCH + 2
    stacks = (folder / f"stacks-{step}.txt").read_text().split("\n== rank ")
    assert len(stacks) == 3
    assert "as read from outside" in stacks[1 + rank]
    assert "in train_worker" in stacks[2 - rank]
    assert losses(folder) == losses(unbroken_by_two)


def test_a_relative_output_is_relative_to_where_the_user_stands(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pretrain.run(micro_config(Path("outputs"), epochs=1, evaluation={}))
    assert [folder.name for folder in (tmp_path / "outputs" / "pretrain").glob("step_*")] == ["step_00000006"]


def test_a_killed_process_given_again_continues_and_ends_as_if_unbroken(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pretrain"
    printed = killed_and_given_again(
        "pretrain.py", micro_preset(tmp_path), lambda: max(losses(folder), default=0) >= STEPS_PER_EPOCH + 2
    )
    # The kill comes a while after the step that it waits for.
    assert re.search(rf"continuing after step (6|12|18|24|30) of {LAST_STEP}", printed)
    assert losses(folder) == losses(unbroken)


def test_a_killed_run_goes_on_with_another_number_of_workers_where_it_was(unbroken: Path, tmp_path: Path) -> None:
    config = micro_config(tmp_path, workers={"max_failures": 0})
    kill_a_worker_at(STEPS_PER_EPOCH + 2, config.run.folder)
    with pytest.raises(UserError, match="restarts did not help"):
        pretrain.run(config)
    assert max(losses(config.run.folder)) < LAST_STEP
    folder = pretrain.run(micro_config(tmp_path, workers={"num_workers": 2}))
    np.testing.assert_allclose(list(losses(folder).values()), list(losses(unbroken).values()), rtol=1e-5)


def test_the_evaluate_job_agrees_with_the_evaluation_of_the_run(unbroken: Path, tmp_path: Path) -> None:
    data = micro_config(tmp_path).evaluation.data
    assert data is not None
    config = EvaluateConfig(checkpoint=unbroken, output=tmp_path, data=data, num_actors=2)
    result = evaluate.run(config)[0].methods["cosine"]
    last = [record for record in read_jsonl(unbroken / "metrics.jsonl") if "evaluation/mAP" in record][-1]
    assert result.mAP == pytest.approx(last["evaluation/mAP"], abs=1e-6)
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["mAP"] == pytest.approx(result.mAP)
    assert len(written["cmc"]) == 50


def write_crops(folder: Path, *, good: int, bad: int) -> dict[str, Any]:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(good):
        Image.fromarray(generator.integers(0, 255, (64, 32, 3), np.uint8)).save(folder / f"good{number:02d}.png")
    for number in range(bad):
        (folder / f"bad{number:02d}.jpg").write_bytes(b"\xff\xd8\xff not an image")
    return {"kind": "folder", "root": str(folder)}


def test_bad_images_are_quarantined_and_the_run_goes_on(cluster: None, tmp_path: Path) -> None:
    data = write_crops(tmp_path / "crops", good=39, bad=1)
    config = micro_config(tmp_path, data=data, evaluation={}, epochs=2, max_bad_share=0.1, workers=IN_PROCESS)
    folder = pretrain.run(config)
    assert [record["image_id"] for record in read_jsonl(folder / "quarantine.jsonl")] == ["bad00.jpg"]
    assert max(losses(folder)) == 10


def test_too_many_bad_images_stop_the_run_with_the_reason(cluster: None, tmp_path: Path) -> None:
    data = write_crops(tmp_path / "crops", good=200, bad=3)
    config = micro_config(tmp_path, data=data, evaluation={}, epochs=50, max_bad_share=0.005, workers=IN_PROCESS)
    with pytest.raises(UserError, match=r"[23] of 203 images cannot be used.*quarantine\.jsonl"):
        pretrain.run(config)


def test_a_loss_that_stays_not_finite_stops_the_run_with_the_last_good_weights(cluster: None, tmp_path: Path) -> None:
    diverging = {"optimizer": {"lr": 1e30, "warmup_epochs": 0}, "max_refused_in_a_row": 3, "epochs": 20}
    config = micro_config(tmp_path, evaluation={}, workers=IN_PROCESS, **diverging)
    with pytest.raises(UserError, match="not finite 3 times in a row"):
        pretrain.run(config)
    state, meta = load_state(find_checkpoint(config.run.folder))
    assert meta["refused_steps"] >= 3
    assert all(value.isfinite().all() for name, value in state.items() if name.startswith("student."))
