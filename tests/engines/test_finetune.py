"""Real supervised tuning runs on a real local cluster."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from passreid_ray.config import build, read_preset
from passreid_ray.engines import evaluate, finetune
from passreid_ray.engines.evaluate_config import EvaluateConfig
from passreid_ray.engines.finetune_config import FinetuneConfig
from passreid_ray.engines.finetune_worker import MakeUndistortedView, build_losses
from passreid_ray.engines.labelled_task import open_labelled_task
from passreid_ray.engines.tuning_config import build_model, with_start
from passreid_ray.errors import UserError
from passreid_ray.models import official_supervised_state_dict
from passreid_ray.train.run_log import read_jsonl
from passreid_ray.train.state_files import find_checkpoint, load_state
from tests.engines.finetune_micro import (
    EPOCHS,
    LAST_STEP,
    PEOPLE,
    REFRESH_STEPS,
    STEPS_PER_EPOCH,
    finetune_config,
    finetune_preset,
)
from tests.engines.killing import kill_a_worker_at, killed_and_given_again, losses
from tests.engines.micro import IN_PROCESS

END_OF_EPOCHS = EPOCHS * STEPS_PER_EPOCH


def assert_as_unbroken(folder: Path, unbroken: Path) -> None:
    assert losses(folder) == losses(unbroken)
    got, expected = load_state(find_checkpoint(folder)), load_state(find_checkpoint(unbroken))
    assert got[1]["step"] == expected[1]["step"] == LAST_STEP
    assert got[0].keys() == expected[0].keys()
    assert all(np.array_equal(value, expected[0][name]) for name, value in got[0].items())


@pytest.fixture(scope="module")
def unbroken(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of one worker that nothing disturbed: epochs, then mined triplets."""
    return finetune.run(finetune_config(tmp_path_factory.mktemp("unbroken")))


def test_a_run_leaves_everything_that_is_promised(unbroken: Path) -> None:
    records = read_jsonl(unbroken / "metrics.jsonl")
    assert [record["step"] for record in records if "loss" in record] == list(range(1, LAST_STEP + 1))
    steps = [record["step"] for record in records if "evaluation/mAP" in record]
    assert steps == [0, END_OF_EPOCHS, END_OF_EPOCHS + 3, END_OF_EPOCHS + 6, LAST_STEP]
    first = next(record for record in records if record["step"] == 1)
    assert {"loss/identity", "loss/triplet", "loss/center", "loss/am_softmax", "lr", "grad_norm"} <= first.keys()
    assert all(math.isfinite(value) for record in records for value in record.values())
    best = max((record for record in records), key=lambda record: record.get("evaluation/mAP", 0))
    assert load_state(find_checkpoint(unbroken / "best"))[1]["step"] == best["step"]


def test_triplets_are_mined_anew_exactly_every_refresh_steps_and_harder_than_by_chance(unbroken: Path) -> None:
    records = [record for record in read_jsonl(unbroken / "metrics.jsonl") if "ranking/mined_loss" in record]
    assert [record["step"] for record in records] == [END_OF_EPOCHS + 1 + REFRESH_STEPS * index for index in range(3)]
    assert all(record["ranking/mined_loss"] >= record["ranking/random_loss"] for record in records)
    staleness = [record.get("ranking/staleness_steps") for record in read_jsonl(unbroken / "metrics.jsonl")]
    assert max(value for value in staleness if value is not None) == REFRESH_STEPS


def test_the_resolved_settings_in_the_run_folder_are_those_of_the_run(unbroken: Path) -> None:
    written = build(FinetuneConfig, read_preset(str(unbroken / "config.toml")))
    assert written == with_start(finetune_config(unbroken.parent))


def test_the_evaluate_job_measures_the_moving_average_of_a_tuned_checkpoint(unbroken: Path, tmp_path: Path) -> None:
    data = finetune_config(tmp_path).evaluation.data
    assert data is not None
    config = EvaluateConfig(checkpoint=unbroken, output=tmp_path, data=data, num_actors=2)
    result = evaluate.run(config)[0].methods["cosine"]
    last = [record for record in read_jsonl(unbroken / "metrics.jsonl") if "evaluation/mAP" in record][-1]
    assert result.mAP == pytest.approx(last["evaluation/mAP"], abs=1e-6)


def test_two_workers_give_the_losses_of_one(unbroken: Path, tmp_path: Path) -> None:
    folder = finetune.run(finetune_config(tmp_path, workers={"num_workers": 2}))
    for step, loss in losses(folder).items():
        assert loss == pytest.approx(losses(unbroken)[step], rel=2e-4)


def test_a_worker_killed_between_minings_is_restarted_and_the_run_ends_as_if_unbroken(
    unbroken: Path, tmp_path: Path
) -> None:
    config = finetune_config(tmp_path)
    killer = kill_a_worker_at(END_OF_EPOCHS + REFRESH_STEPS + 1, config.run.folder)
    folder = finetune.run(config)
    assert not killer.is_alive()
    assert_as_unbroken(folder, unbroken)


def test_a_job_killed_in_an_epoch_and_given_again_ends_as_if_unbroken(unbroken: Path, tmp_path: Path) -> None:
    folder = tmp_path / "finetune"
    printed = killed_and_given_again(
        "finetune.py", finetune_preset(tmp_path), lambda: max(losses(folder), default=0) >= STEPS_PER_EPOCH + 2
    )
    assert re.search(rf"continuing after step \d+ of {LAST_STEP}", printed)
    assert_as_unbroken(folder, unbroken)


def test_a_tuned_checkpoint_of_other_people_starts_a_run_without_its_classifier(unbroken: Path, tmp_path: Path) -> None:
    known = {"start": {"checkpoint": str(unbroken), "necks": "loaded"}, "epochs": 1, "ranking": {}}
    console = Console(record=True, quiet=False, file=(tmp_path / "log.txt").open("w"), width=400)
    more = {**PEOPLE, "num_people": 16, "splits": ["train"]}
    finetune.run(finetune_config(tmp_path, **known, data=more, workers=IN_PROCESS), console)
    assert "its classifier of 6 people is left out, the data has 8" in console.export_text(clear=False)
    config = with_start(finetune_config(tmp_path, **known))
    task = open_labelled_task(config.data)
    model, _ = build_model(config)
    losses_, notes = build_losses(config, task, model)
    tensors, _ = load_state(find_checkpoint(unbroken))
    assert notes == "; classifier loaded"
    assert torch.equal(losses_.classifiers["identity"], tensors["losses.classifiers.identity"])
    public = tmp_path / "transformer.pth"
    torch.save(official_supervised_state_dict(model, losses_.classifiers["identity"]), public)
    again = finetune_config(tmp_path, **{**known, "start": {"checkpoint": str(public), "necks": "loaded"}})
    assert build_losses(with_start(again), task, model)[1] == "; classifier loaded"


def test_images_keep_their_shape_when_asked_and_the_checkpoint_says_so(cluster: None, tmp_path: Path) -> None:
    config = finetune_config(tmp_path, epochs=1, undistorted={"image_size_px": (64, 48)}, workers=IN_PROCESS)
    folder = finetune.run(config)
    assert all(math.isfinite(loss) for loss in losses(folder).values())
    data = config.evaluation.data
    assert data is not None
    result = evaluate.run(EvaluateConfig(checkpoint=folder, output=tmp_path / "e", data=data))[0]
    last = [record for record in read_jsonl(folder / "metrics.jsonl") if "evaluation/mAP" in record][-1]
    assert result.methods["cosine"].mAP == pytest.approx(last["evaluation/mAP"], abs=1e-6)


def people_csv(folder: Path, persons: list[str]) -> dict[str, Any]:
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    lines = ["image,person_id,camera_id,split"]
    for index, person in enumerate(persons):
        Image.new("RGB", (32, 64), (index * 7 % 255, 100, 50)).save(folder / f"{index}.png")
        lines.append(f"{index}.png,{person},1,train")
    (folder / "labels.csv").write_text("\n".join(lines))
    return {"kind": "labels_csv", "root": str(folder), "splits": ["train"]}


def test_what_can_be_known_is_told_before_ray_starts(tmp_path: Path) -> None:
    silent = Console(quiet=True)
    one = people_csv(tmp_path / "one", ["a"] * 8)
    unknown = people_csv(tmp_path / "unknown", ["a", "", "b", "b"])
    single = people_csv(tmp_path / "single", ["a", "b", "c", "d"])
    off = {"identity": {"weight": 0}, "triplet": {"weight": 0}}
    for changes, message in (
        ({"batch_size": 9}, "batch_size: 9 images cannot be divided by 2"),
        ({"data": one}, "data: all 8 images are of one person"),
        ({"data": unknown}, "data: 1 of 4 images have no person_id"),
        ({"data": single}, "ranking: nobody has two images"),
        ({"losses": off}, "losses: all weights are 0"),
        ({"epochs": 0, "ranking": {}}, "epochs: 0, and ranking.steps too"),
        ({"losses": {"average_k": {"weight": 1, "k": 6}}}, "losses.average_k.k: 6 candidates of 6 people"),
        ({"workers": {"num_workers": 8}}, "ranking.triplets_per_step: 4 triplets cannot be divided among 8 workers"),
        ({"start": {"checkpoint": str(tmp_path / "absent")}}, "start.checkpoint: .*absent does not exist"),
        ({"views": {"image_size_px": (60, 32)}}, "views.image_size_px: image size 60x32 px is not a multiple"),
        ({"feature": "after"}, "feature: after the neck, but the ranking loss"),
        ({"undistorted": {}, "model": {"stem": "ics"}}, "undistorted: the convolutional stem mixes padding"),
    ):
        with pytest.raises(UserError, match=message):
            finetune.run(finetune_config(tmp_path / "run", **changes), silent)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"losses": {"triplet": {"weight": 0.5}}}, "losses.am_softmax.weight"),
        ({"optimizer": {"kind": "adamw"}}, "optimizer.kind"),
        ({"ranking": {}, "epochs": 9}, "ranking.steps"),
    ],
)
def test_a_run_is_not_continued_as_another_one(changes: dict[str, Any], key: str, unbroken: Path) -> None:
    before = (unbroken / "config.toml").read_text()
    with pytest.raises(UserError, match=f"this run was made with {key} = "):
        finetune.run(finetune_config(unbroken.parent, **changes), Console(quiet=True))
    assert (unbroken / "config.toml").read_text() == before


def test_the_cut_out_grows_evenly_over_both_stages() -> None:
    config = finetune_config(Path("x"), undistorted={})
    view = MakeUndistortedView(config, 16, END_OF_EPOCHS)
    per_ranking_step, first = 3 * config.ranking.triplets_per_step, END_OF_EPOCHS * config.batch_size
    draws = [step * config.batch_size for step in range(END_OF_EPOCHS)]
    draws += [first + step * per_ranking_step for step in range(config.ranking.steps)]
    np.testing.assert_allclose([view.progress(draw) for draw in draws], np.linspace(0, 1, LAST_STEP))


def test_people_with_one_image_and_small_data_are_told_and_trained_on(cluster: None, tmp_path: Path) -> None:
    data = people_csv(tmp_path / "data", ["a", "b", "c", "c"])
    console = Console(record=True, file=(tmp_path / "log.txt").open("w"), width=400)
    changes = {"epochs": 2, "batch_size": 16, "workers": IN_PROCESS}
    folder = finetune.run(finetune_config(tmp_path, data=data, ranking={}, evaluation={}, **changes), console)
    text = console.export_text()
    assert "2 of 3 people have a single image, which stands 2 times in their group" in text
    assert "a batch has room for 8 people, the data has 3: they come again" in text
    assert all(math.isfinite(loss) for loss in losses(folder).values())
