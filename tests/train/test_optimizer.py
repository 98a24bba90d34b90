import copy

import pytest
import torch
from torch import nn

from passreid_ray.train.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
    gradient_norms,
    load_optimizer,
    optimizer_tensors,
    set_rates,
)


def model_with_gradients() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    model(torch.randn(5, 4)).square().sum().backward()
    return model


def test_weight_decay_reaches_matrices_only() -> None:
    optimizer = build_optimizer(nn.Linear(4, 3))
    set_rates(optimizer, lr=0.1, weight_decay=0.5)
    decayed, exempt = optimizer.param_groups
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 4)]
    assert [tuple(p.shape) for p in exempt["params"]] == [(3,)]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.5, 0.0)
    assert decayed["lr"] == exempt["lr"] == 0.1


def test_clipping_per_parameter_bounds_each_norm_and_leaves_small_gradients() -> None:
    model = model_with_gradients()
    before = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    limit = sorted(before)[1] * 1.01
    clip_gradients(model.parameters(), limit, "per_parameter", gradient_norms(model.parameters()))
    after = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    assert after == pytest.approx([min(norm, limit) for norm in before], rel=1e-4)


def test_global_clipping_scales_all_gradients_alike() -> None:
    model = model_with_gradients()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norms_N = gradient_norms(model.parameters())
    clip_gradients(model.parameters(), float(norms_N.norm()) / 2, "global", norms_N)
    for old, parameter in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, old / 2, rtol=1e-4, atol=0)


def test_the_gradient_norm_is_not_finite_when_one_gradient_is_not() -> None:
    model = model_with_gradients()
    parameter = next(model.parameters())
    assert parameter.grad is not None
    parameter.grad[0, 0] = torch.nan
    assert not torch.isfinite(gradient_norm(model.parameters()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_the_cpu_kernel_takes_the_steps_of_the_formula(dtype: torch.dtype, tolerance: float) -> None:
    model = model_with_gradients().to(dtype)
    twin = copy.deepcopy(model)
    optimizer, plain = build_optimizer(model), torch.optim.AdamW(twin.parameters(), lr=0.1, foreach=False, fused=False)
    assert optimizer.defaults["fused"] is True
    for step in range(3):
        for own, other in zip(model.parameters(), twin.parameters(), strict=True):
            own.grad = torch.randn(own.shape, dtype=dtype, generator=torch.Generator().manual_seed(step))
            other.grad = own.grad.clone()
        set_rates(optimizer, lr=0.1, weight_decay=0.0)
        plain.param_groups[0]["weight_decay"] = 0.0
        optimizer.step()
        plain.step()
    for own, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=tolerance, atol=tolerance)


def test_a_loss_scale_skips_a_step_that_overflows_and_takes_the_next() -> None:
    model = model_with_gradients()
    optimizer, scaler = build_optimizer(model), torch.amp.grad_scaler.GradScaler("cpu", init_scale=8.0)
    set_rates(optimizer, lr=0.1, weight_decay=0.0)
    before = [own.detach().clone() for own in model.parameters()]
    for factor in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(5, 4)).square().sum() * factor).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(own, old) for own, old in zip(model.parameters(), before, strict=True)]
        assert all(moved) if factor == 1.0 else not any(moved)
    assert scaler.get_scale() == 4.0


def test_a_restored_optimizer_takes_the_same_next_step() -> None:
    def step(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
        set_rates(optimizer, lr=0.1, weight_decay=0.01)
        optimizer.step()

    model = model_with_gradients()
    optimizer = build_optimizer(model)
    step(model, optimizer)
    twin = model_with_gradients()
    twin.load_state_dict(model.state_dict())
    restored = build_optimizer(twin)
    load_optimizer(restored, twin, optimizer_tensors(optimizer, model))
    step(model, optimizer)
    step(twin, restored)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
