"""The benchmark of a step refuses to time two sides that do not agree."""

from functools import partial

import pytest
import torch

from benchmarks.literal_pass import literal_step
from benchmarks.pass_step import SIDES, Setting, check_equal, measured_rows
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.train.precision import Precision


def tiny_setting() -> Setting:
    config = PretrainConfig.model_validate(
        {
            "batch_size": 2,
            "views": {"global_size_px": (64, 32), "local_size_px": (32, 16)},
            "model": {
                "trunk": "vit_tiny_patch16_224",
                "embed_dim": 24,
                "depth": 2,
                "num_heads": 2,
                "drop_path": 0.0,
                "official_pos_resize": True,
            },
            "head": {"num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
        }
    )
    return Setting(config, torch.device("cpu"), threads=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_starts_from_a_state_that_steps_like_the_published_structure(precision: Precision) -> None:
    operations = check_equal(tiny_setting().changed(drop_path=0.0, precision=precision))
    literal, ours = (operations[side] for side in SIDES)
    assert 0 < ours <= literal  # the published structure computes the last block's patches, which nobody reads


def test_compiled_blocks_are_compared_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("passreid_ray.train.compiled.BACKEND", "eager")
    setting = tiny_setting().changed(drop_path=0.0, precision="fp32", compile="blocks")
    try:
        assert check_equal(setting, counts=False) == dict.fromkeys(SIDES, 0.0)
    finally:
        torch.compiler.set_stance("default")
    assert "compiled the blocks" in capsys.readouterr().out


def test_sides_that_differ_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.pass_step.literal_step", partial(literal_step, student_temp=0.11))
    with pytest.raises(AssertionError, match="loss differs"):
        check_equal(tiny_setting())


def test_both_sides_are_timed_with_stochastic_depth() -> None:
    rows, sizes = measured_rows(tiny_setting().changed(drop_path=0.1, precision="fp32"), repeats=1)
    assert [row["side"] for row in rows] == list(SIDES)
    assert sizes.drop_path == pytest.approx(0.1)
