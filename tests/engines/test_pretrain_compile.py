"""What a pre-training run makes of ``compile``."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from passreid_ray.engines.pretrain import PretrainConfig, check_compile, compile_trunks
from passreid_ray.errors import UserError
from passreid_ray.train import compiled
from passreid_ray.train.pass_step import StepSettings, train_step
from tests.train.pass_fixtures import RATES, random_views, tiny_state

VIEWS = {"global_size_px": (64, 32), "local_size_px": (32, 16), "local_views_per_part": 2}
CONFIG = PretrainConfig.model_validate({"batch_size": 16, "micro_batches": 2, "compile": "blocks", "views": VIEWS})


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch.compiler.set_stance("default")


def broken_backend(graph: object, inputs: object) -> Any:
    raise RuntimeError("no compiler here")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"workers": {"use_gpu": False}}, "needs GPUs"), ({"checkpoint_activations": True}, "checkpoint_activations")],
)
def test_settings_that_rule_out_cuda_graphs_are_refused(settings: dict[str, Any], expected: str) -> None:
    check_compile(PretrainConfig.model_validate({**settings, "compile": "blocks"}))
    with pytest.raises(UserError, match=expected):
        check_compile(PretrainConfig.model_validate({**settings, "compile": "cuda_graphs"}))


def test_pieces_of_weights_and_compiled_blocks_do_not_go_together() -> None:
    settings = {"compile": "blocks", "sharing": {"strategy": "fsdp"}}
    check_compile(PretrainConfig.model_validate(settings))  # one worker has all pieces
    with pytest.raises(UserError, match=r'compile: "blocks" does not go with sharing\.strategy = "fsdp"'):
        check_compile(PretrainConfig.model_validate({**settings, "workers": {"num_workers": 2}}))


def test_a_run_compiles_for_the_shapes_of_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    state = tiny_state(dtype=torch.float32)
    assert compile_trunks(state, CONFIG, world_size=2).startswith("compiled the blocks of student and teacher in ")
    with torch.compiler.set_stance("fail_on_recompile"):
        train_step(state, random_views(8, seed=0, dtype=torch.float32), RATES, StepSettings(num_micro_batches=2))


def test_what_a_run_is_told_names_the_setting_and_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", broken_backend)
    told = compile_trunks(tiny_state(dtype=torch.float32), CONFIG, world_size=1)
    assert told == "compile=blocks cannot be had, going on without: RuntimeError: no compiler here"


def test_a_run_that_asks_for_nothing_is_told_nothing() -> None:
    state = tiny_state(dtype=torch.float32)
    assert compile_trunks(state, CONFIG.model_copy(update={"compile": "off"}), world_size=1) == ""
    assert all(block._compiled_call_impl is None for block in state.student.backbone.blocks)
