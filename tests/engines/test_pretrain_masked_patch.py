"""The masked-patch loss as a setting of a pre-training run, without a cluster."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from passreid_ray.config import build
from passreid_ray.data.order import EpochOrder
from passreid_ray.engines.pretrain import (
    MUST_AGREE,
    PretrainConfig,
    build_state,
    check_model,
    load_checkpoint,
    save_checkpoint,
)
from passreid_ray.engines.run_folder import prepare
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.pass_state import PassState
from passreid_ray.train.pass_step import StepSettings, train_step
from passreid_ray.train.state_files import save_state
from passreid_ray.train.worker import WorkerContext
from tests.engines.micro import micro_config
from tests.train.pass_fixtures import RATES, random_views

ON = {"masked_patch": {"weight": 1.0, "num_prototypes": 16}}


def built(config: PretrainConfig) -> tuple[PassState, StepSettings]:
    worker = WorkerContext(0, 1, torch.device("cpu"), board=None, checkpoints=cast(CheckpointStore, None))
    return build_state(config, EpochOrder(80, config.batch_size, config.seed), worker)


def step(state: PassState, settings: StepSettings) -> None:
    train_step(state, random_views(4, state.step, torch.float32), RATES, settings)


def test_a_run_that_continues_ends_as_if_unbroken(tmp_path: Path) -> None:
    config = micro_config(tmp_path, precision="bf16", micro_batches=2, **ON)
    check_model(config)
    state, settings = built(config)
    step(state, settings)
    save_checkpoint(state, config, "data", tmp_path / "step")
    step(state, settings)
    again, settings = built(config)
    load_checkpoint(again, "data", tmp_path / "step")
    step(again, settings)
    expected = state.tensors()
    assert "patch_centers" in expected
    assert all(torch.equal(value, expected[name]) for name, value in again.tensors().items())


def test_the_patch_head_changes_no_other_first_weight(tmp_path: Path) -> None:
    plain, with_head = (built(micro_config(tmp_path, **changes))[0].tensors() for changes in ({}, ON))
    assert with_head.keys() - plain.keys()
    assert all(torch.equal(value, with_head[name]) for name, value in plain.items())


def without_section(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "masked_patch"}


def test_a_checkpoint_from_before_there_was_a_patch_head_continues_without_one_only(tmp_path: Path) -> None:
    config = micro_config(tmp_path)
    state, settings = built(config)
    step(state, settings)
    meta = {**state.meta(), "config": without_section(config.model_dump(mode="json")), "fingerprint": "data"}
    config.run.checkpoints.write(1, lambda folder: save_state(folder, state.tensors(), meta))
    prepare(config.run, config, MUST_AGREE, "data")
    again = built(config)[0]
    load_checkpoint(again, "data", config.run.folder / "step_00000001")
    assert again.step == 1
    with pytest.raises(UserError, match=r"masked_patch\.num_prototypes = 8192, now it is 16"):
        prepare(config.run, micro_config(tmp_path, **ON), MUST_AGREE, "data")


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"weight": -1}, "weight"), ({"share": 0}, "share"), ({"ratio": [0.5, 0.1]}, "low <= high"), ({"k": 1}, "k")],
)
def test_settings_that_make_no_sense_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(PretrainConfig, {"masked_patch": settings})
