import pytest
import torch
from torch import nn

from passreid_ray.train.optimizer import (
    build_optimizer,
    clip_gradients,
    gradient_norm,
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
    clip_gradients(model.parameters(), limit, "per_parameter", torch.tensor(0.0))
    after = [float(p.grad.norm()) for p in model.parameters() if p.grad is not None]
    assert after == pytest.approx([min(norm, limit) for norm in before], rel=1e-4)


def test_global_clipping_scales_all_gradients_alike() -> None:
    model = model_with_gradients()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    norm = gradient_norm(model.parameters())
    clip_gradients(model.parameters(), float(norm) / 2, "global", norm)
    for old, parameter in zip(before, model.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, old / 2, rtol=1e-4, atol=0)


def test_the_gradient_norm_is_not_finite_when_one_gradient_is_not() -> None:
    model = model_with_gradients()
    parameter = next(model.parameters())
    assert parameter.grad is not None
    parameter.grad[0, 0] = torch.nan
    assert not torch.isfinite(gradient_norm(model.parameters()))


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
