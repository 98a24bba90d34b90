"""What every tuning run carries, and how its gradients are applied or refused."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import SGD

from passreid_ray import distributed
from passreid_ray.errors import UserError
from passreid_ray.train.precision import load_scaler
from passreid_ray.train.tuning_state import TuningState, apply_gradients, buffers_of
from tests.ranks import run_on_ranks

LR = 0.1


class TinyNetwork(nn.Module):
    """A linear map behind a batch norm."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.neck = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, 1)

    def forward(self, rows_ND: Tensor) -> Tensor:
        return self.head(self.neck(rows_ND)).square().mean()


def new_state(width: int = 4, *, loss_scale: float | None = None, momentum: float = 0.9) -> TuningState[TinyNetwork]:
    torch.manual_seed(0)
    network = TinyNetwork(width)
    scaler = GradScaler("cpu", enabled=loss_scale is not None, init_scale=loss_scale or 1.0, growth_interval=2)
    return TuningState(network, network, SGD(network.parameters(), lr=LR, momentum=momentum), scaler)


def rows(seed: int) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def step(state: TuningState[TinyNetwork], rows_ND: Tensor, **options: Any) -> dict[str, Tensor]:
    buffers = buffers_of(state.network)
    loss = state.forward(rows_ND)
    state.scaler.scale(loss).backward()
    return apply_gradients(state, {"loss": loss, "twice": 2 * loss}, buffers, **options)


def snapshot(state: TuningState[TinyNetwork]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in state.tensors().items()}


def assert_same_bits(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


def test_tensors_are_those_of_the_network_and_the_momentum_of_each_parameter() -> None:
    state = new_state()
    network = set(state.network.state_dict())
    assert set(state.tensors()) == network
    step(state, rows(0))
    momenta = {f"optimizer.momentum_buffer.{name}" for name, _ in state.network.named_parameters()}
    assert set(state.tensors()) == network | momenta


def test_what_is_put_back_is_what_was_given_also_through_json() -> None:
    state = new_state(loss_scale=8.0)
    for seed in range(3):
        step(state, rows(seed))
    step(state, rows(3) * torch.inf)
    state.best_mAP = 0.5
    again = new_state(loss_scale=8.0)
    again.load(snapshot(state), json.loads(json.dumps(state.meta())), "here")
    assert again.meta() == state.meta()
    assert (again.step, again.best_mAP, again.refused_in_a_row, again.refused_steps) == (4, 0.5, 1, 1)
    assert again.scaler.get_scale() == state.scaler.get_scale() == 8.0  # doubled once, halved once
    for own in (state, again):
        step(own, rows(4))
    assert_same_bits(snapshot(again), snapshot(state))


def test_loading_copies_and_shares_no_memory() -> None:
    state, again = new_state(), new_state()
    step(state, rows(0))
    given = snapshot(state)
    again.load(given, state.meta(), "here")
    expected = {name: value.clone() for name, value in given.items()}
    step(again, rows(1))
    assert_same_bits(given, expected)


def test_a_checkpoint_of_another_width_is_refused_and_changes_nothing() -> None:
    state = new_state()
    before = snapshot(state)
    with pytest.raises(UserError, match=r"run/step_1: neck\.weight is \(5,\), expected \(4,\)"):
        state.load(new_state(5).tensors(), new_state(5).meta(), "run/step_1")
    assert_same_bits(snapshot(state), before)


def test_a_checkpoint_without_a_tensor_is_refused() -> None:
    state = new_state()
    tensors = snapshot(state)
    del tensors["head.bias"]
    with pytest.raises(UserError, match=r"run/step_1 has no tensor 'head\.bias'"):
        state.load(tensors, state.meta(), "run/step_1")


def test_a_checkpoint_with_a_tensor_too_many_is_refused() -> None:
    state = new_state()
    tensors = snapshot(state) | {"head.scale": torch.ones(1)}
    with pytest.raises(UserError, match=r"here has an unexpected tensor 'head\.scale'"):
        state.load(tensors, state.meta(), "here")


def test_the_device_is_that_of_the_weights() -> None:
    state = new_state()
    assert state.device == torch.device("cpu")
    state.network.to("meta")
    assert state.device == torch.device("meta")


def test_a_step_is_that_of_the_optimizer_alone() -> None:
    state, twin = new_state(), new_state()
    loss = twin.network(rows(0))
    loss.backward()
    twin.optimizer.step()
    metrics = step(state, rows(0))
    assert_same_bits(snapshot(state), snapshot(twin))
    norm = torch.cat([own.grad.ravel() for own in twin.network.parameters() if own.grad is not None]).norm()
    torch.testing.assert_close(metrics, {"loss": loss.detach(), "twice": 2 * loss.detach(), "grad_norm": norm})
    assert all(parameter.grad is None for parameter in state.network.parameters())


def test_buffers_are_copies() -> None:
    network = TinyNetwork()
    saved = buffers_of(network)
    expected = [buffer.clone() for buffer in network.buffers()]
    network(rows(0))
    assert all(torch.equal(one, other) for one, other in zip(saved, expected, strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(saved, network.buffers(), strict=True))


def test_a_refused_step_puts_buffers_back_and_does_not_call_what_follows_an_accepted_one() -> None:
    state, called = new_state(), []
    step(state, rows(0), accepted=lambda: called.append("good"))
    before = snapshot(state)
    for _ in range(2):
        step(state, rows(1) * torch.nan, accepted=lambda: called.append("bad"))
    assert called == ["good"]
    assert_same_bits(snapshot(state), before)
    assert (state.step, state.refused_in_a_row, state.refused_steps) == (3, 2, 2)
    step(state, rows(2), accepted=lambda: called.append("good again"))
    assert called == ["good", "good again"]
    assert (state.step, state.refused_in_a_row, state.refused_steps) == (4, 0, 2)


def test_what_follows_an_accepted_step_sees_the_new_weights() -> None:
    state, seen = new_state(), []
    old = state.network.head.weight.detach().clone()
    step(state, rows(0), accepted=lambda: seen.append(state.network.head.weight.detach().clone()))
    assert torch.equal(seen[0], state.network.head.weight)
    assert not torch.equal(seen[0], old)


@pytest.mark.parametrize("share", [0.5, 2.0])
def test_a_gradient_longer_than_the_limit_is_cut_and_a_shorter_one_is_not(share: float) -> None:
    free, clipped = new_state(momentum=0), new_state(momentum=0)
    start = free.network.head.weight.detach().clone()
    norm = float(step(free, rows(0))["grad_norm"])
    told = step(clipped, rows(0), clip_norm=share * norm)["grad_norm"]
    whole, cut = (own.network.head.weight.detach() - start for own in (free, clipped))
    assert float(told) == norm  # before clipping
    torch.testing.assert_close(cut, min(1.0, share) * whole, rtol=1e-4, atol=1e-9)


def test_a_loss_scale_changes_no_step_and_one_that_overflows_is_halved() -> None:
    plain, scaled = new_state(), new_state(loss_scale=1024.0)
    for seed in range(2):
        torch.testing.assert_close(step(scaled, rows(seed)), step(plain, rows(seed)), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(snapshot(scaled), snapshot(plain), rtol=1e-6, atol=1e-8)
    assert scaled.scaler.get_scale() == 2048
    huge = new_state(loss_scale=2.0**127)
    before = snapshot(huge)
    metrics = step(huge, 1e3 * rows(0))
    assert torch.isfinite(metrics["loss"])
    assert huge.refused_steps == 1
    assert huge.scaler.get_scale() == 2.0**126
    assert_same_bits(snapshot(huge), before)


def refused_on_one_rank() -> tuple[float, int, bool]:
    """The mean loss of two ranks, then the refused steps when only one of them has a bad loss."""
    state = new_state()
    loss = float(step(state, rows(distributed.rank()))["loss"])
    before = snapshot(state)
    buffers = buffers_of(state.network)
    bad = state.forward(rows(2)) * (torch.nan if distributed.rank() == 1 else 1.0)
    for parameter in state.network.parameters():
        parameter.grad = torch.zeros_like(parameter)  # finite everywhere: only the loss tells
    apply_gradients(state, {"loss": bad}, buffers)
    return loss, state.refused_steps, all(torch.equal(value, before[name]) for name, value in snapshot(state).items())


def test_all_ranks_refuse_what_one_of_them_refuses_and_report_the_mean() -> None:
    expected = sum(new_state().forward(rows(rank)).item() for rank in range(2)) / 2
    for loss, refused_steps, is_unchanged in run_on_ranks(refused_on_one_rank):
        assert loss == pytest.approx(expected, rel=1e-6)
        assert refused_steps == 1
        assert is_unchanged


def test_a_run_without_a_loss_scale_may_go_on_with_one_and_the_other_way_round() -> None:
    off, on = GradScaler("cpu", enabled=False), GradScaler("cpu", enabled=True, init_scale=8.0)
    load_scaler(on, off.state_dict())
    assert on.get_scale() == 8.0
    load_scaler(off, on.state_dict())
    assert off.get_scale() == 1.0
    again = GradScaler("cpu", enabled=True)
    load_scaler(again, on.state_dict())
    assert again.get_scale() == 8.0
