"""Compiled blocks compute what the blocks compute, or are not there at all."""

from collections.abc import Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch.nn.parallel import DistributedDataParallel

from passreid_ray import distributed
from passreid_ray.train import compiled
from passreid_ray.train.compiled import TrunkCall, compile_blocks
from passreid_ray.train.pass_state import PassState
from passreid_ray.train.pass_step import StepSettings, train_step
from passreid_ray.train.precision import Precision
from tests.ranks import run_on_ranks
from tests.train.pass_fixtures import RATES, random_views, rank_slice, tiny_state

BATCH = 4


def broken_backend(graph: object, inputs: object) -> Any:
    raise RuntimeError("no compiler here\nsee the log")


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch.compiler.set_stance("default")


@pytest.fixture
def cheap_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs as inductor gets them, run operation by operation."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


def state_of(*, checkpoints: bool = False, depth: int = 2) -> PassState:
    state = tiny_state(dtype=torch.float32, depth=depth)
    state.student.backbone.use_activation_checkpointing(checkpoints)
    return state


def compile_state(
    state: PassState,
    *,
    how: Literal["blocks", "cuda_graphs"] = "blocks",
    precision: Precision = "fp32",
    images: int = BATCH,
) -> str | None:
    student = state.student.backbone
    calls = TrunkCall.of_views(student, 2 * images, (64, 32), 4), TrunkCall.of_views(student, 6 * images, (32, 16), 2)
    return compile_blocks(student, state.teacher.backbone, *calls, how, precision)


def loss_and_gradients(
    state: PassState, monkeypatch: pytest.MonkeyPatch, settings: StepSettings
) -> tuple[float, dict[str, Tensor]]:
    """Of one step on noise."""
    found: dict[str, Tensor] = {}

    def remember(*_: object) -> None:
        found.update({name: own.grad.clone() for name, own in state.student.named_parameters() if own.grad is not None})

    with monkeypatch.context() as patch:
        patch.setattr("passreid_ray.train.pass_step.clip_gradients", remember)
        loss = train_step(state, random_views(BATCH, seed=3, dtype=torch.float32), RATES, settings)["loss"]
    return float(loss), found


def assert_equal_to_eager(
    state: PassState, eager: PassState, monkeypatch: pytest.MonkeyPatch, settings: StepSettings, tolerance: float
) -> None:
    loss, gradients = loss_and_gradients(state, monkeypatch, settings)
    expected_loss, expected = loss_and_gradients(eager, monkeypatch, settings)
    assert loss == pytest.approx(expected_loss, rel=tolerance)
    assert gradients.keys() == expected.keys()
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in gradients.items():
        assert float((gradient - expected[name]).norm()) <= tolerance * (float(expected[name].norm()) + largest), name


def num_graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("checkpoints", [False, True])
@pytest.mark.usefixtures("cheap_backend")
def test_a_step_has_the_loss_and_gradients_of_eager_blocks(checkpoints: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    state, eager = state_of(checkpoints=checkpoints), state_of(checkpoints=checkpoints)
    assert compile_state(state) is None
    assert num_graphs() > 0
    assert_equal_to_eager(state, eager, monkeypatch, StepSettings(), 1e-5)


@pytest.mark.slow
def test_inductor_gives_the_loss_and_gradients_of_eager_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    state, eager = state_of(), state_of()
    assert compile_state(state) is None
    assert_equal_to_eager(state, eager, monkeypatch, StepSettings(), 1e-5)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.usefixtures("cheap_backend")
def test_steps_compile_nothing_and_run_nothing_but_what_was_compiled(precision: Precision) -> None:
    state = state_of()
    assert compile_state(state, precision=precision) is None
    before = num_graphs()
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in range(2):
            views = random_views(BATCH, seed=step, dtype=torch.float32)
            train_step(state, views, RATES, StepSettings(precision=precision), diagnose=True)
    assert num_graphs() == before


@pytest.mark.usefixtures("cheap_backend")
def test_other_shapes_run_without_being_compiled() -> None:
    state, eager = state_of(), state_of()
    assert compile_state(state) is None
    before, images_BCHW = num_graphs(), torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        got = state.teacher.backbone.eval()(images_BCHW)
        torch.testing.assert_close(got, eager.teacher.backbone.eval()(images_BCHW))
    assert num_graphs() == before


@pytest.mark.usefixtures("cheap_backend")
def test_blocks_that_drop_at_different_rates_share_their_graphs() -> None:
    assert compile_state(state_of(depth=5)) is None
    # Global and local views: the first block, where nothing is dropped, those between, the last. And the teacher's.
    assert num_graphs() == 3 + 3 + 2


@pytest.mark.usefixtures("cheap_backend")
def test_names_and_gradients_of_weights_stay() -> None:
    state, eager = state_of(), state_of()
    assert compile_state(state) is None
    assert list(state.tensors()) == list(eager.tensors())
    assert all(own.grad is None for own in state.student.parameters())
    for name, value in eager.tensors().items():
        torch.testing.assert_close(state.tensors()[name], value, rtol=0, atol=0)


def test_a_failure_is_told_and_leaves_eager_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", broken_backend)
    state, eager = state_of(), state_of()
    assert compile_state(state) == "RuntimeError: no compiler here"
    assert_equal_to_eager(state, eager, monkeypatch, StepSettings(), 0.0)


def test_a_machine_without_a_compiler_is_told_so() -> None:
    without_compiler = inductor_config.patch({"cpp.cxx": ("no-such-compiler",), "fx_graph_cache": False})
    with without_compiler, functorch_config.patch(enable_autograd_cache=False):
        reason = compile_state(state_of())
    assert reason is not None
    assert "C++ compiler" in reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for what a machine without a GPU lacks")
def test_cuda_graphs_on_a_cpu_are_told_to_be_off() -> None:
    assert compile_state(state_of(), how="cuda_graphs") == "CUDA graphs need a GPU, and this worker computes on a CPU"
    assert num_graphs() == 0


def compile_on_a_rank(broken: int | None) -> tuple[str | None, float, int]:
    """The reason, the loss of a step through DDP, and how often the graphs were asked for."""
    rank = distributed.rank()
    compiled.BACKEND = broken_backend if rank == broken else "eager"  # a process of its own
    state = state_of()
    reason = compile_state(state, images=BATCH // 2)
    state.forward = DistributedDataParallel(state.forward, forward_sync_buffers=False)
    before = num_graphs()
    views = rank_slice(random_views(BATCH, seed=3, dtype=torch.float32), rank, 2)
    loss = train_step(state, views, RATES, StepSettings())["loss"]
    is_compiled = any(block._compiled_call_impl is not None for block in state.student.backbone.blocks)
    assert is_compiled == (reason is None)
    return reason, float(loss), num_graphs() - before


@pytest.mark.parametrize("broken", [None, 1])
def test_ranks_agree_and_compute_what_one_does(broken: int | None) -> None:
    eager = train_step(state_of(), random_views(BATCH, seed=3, dtype=torch.float32), RATES, StepSettings())["loss"]
    reason = None if broken is None else "worker 1: RuntimeError: no compiler here"
    for own_reason, loss, new_graphs in run_on_ranks(compile_on_a_rank, broken):
        assert own_reason == reason
        assert loss == pytest.approx(float(eager), rel=1e-5)
        assert new_graphs == 0
