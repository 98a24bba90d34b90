"""AdamW as PASS uses it: what is decayed, how gradients are clipped, and how its state is named in a checkpoint."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch import _foreach_mul_ as foreach_mul_  # pyright: ignore[reportPrivateImportUsage] documented under this name
from torch import _foreach_norm as foreach_norm  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from passreid_ray.config import Section
from passreid_ray.distributed import all_reduce_sum, is_sharded, local_part, sharded_like

STATE_KEYS = ("step", "exp_avg", "exp_avg_sq", "momentum_buffer")
"""What AdamW and SGD keep for a parameter."""

FUSED_DEVICES = ("cpu", "cuda")
"""Where AdamW is one kernel. On a CPU it took a seventh of the time: 8.5 ms for 16.8 million numbers, not 60."""

EXEMPT = "is_exempt_from_decay"
"""Key of a parameter group: its weight decay stays 0."""

ClipMode = Literal["per_parameter", "global"]


class OptimizerConfig(Section):
    """AdamW and its schedules; the defaults are PASS's."""

    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate for a batch of 256 images; it is scaled by batch_size / 256."""
    final_lr: float = Field(default=1e-6, ge=0)
    """Learning rate at the end of the cosine."""
    warmup_epochs: float = Field(default=10, ge=0)
    """Length of the linear warm-up from 0."""
    weight_decay: float = Field(default=0.04, ge=0)
    """Weight decay at the first step."""
    final_weight_decay: float = Field(default=0.4, ge=0)
    """Weight decay at the end of its cosine."""
    clip_norm: float | None = Field(default=3.0, gt=0)
    """Largest gradient norm; none: no clipping."""
    clip: ClipMode = "per_parameter"
    """Clip every parameter's gradient by itself (PASS) or all by their common norm."""
    frozen_last_layer_epochs: int = Field(default=1, ge=0)
    """Epochs during which the prototypes are not trained."""


def build_optimizer(model: nn.Module) -> AdamW:
    """AdamW with two groups: tensors of two or more dimensions are decayed; biases and 1-D tensors are not.

    Tokens and positions are 3-D, so they are decayed (as in the reference). Learning rate and weight decay are set at
    every step by ``set_rates``. Sharded parameters have groups of their own: one kernel cannot take both kinds.
    """
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        groups.setdefault((_is_exempt(name, parameter), is_sharded(parameter)), []).append(parameter)
    fused = all(parameter.device.type in FUSED_DEVICES for _, parameter in named)
    return AdamW(
        [{"params": own, EXEMPT: exempt, "weight_decay": 0.0} for (exempt, _), own in sorted(groups.items())],
        lr=0.0,
        fused=fused or None,
    )


def set_rates(optimizer: AdamW, *, lr: float, weight_decay: float) -> None:
    """Set this step's learning rate for all parameters and weight decay for those that are decayed."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = 0.0 if group[EXEMPT] else weight_decay


def gradients_stay_local(network: nn.Module, apply: bool) -> contextlib.AbstractContextManager[None]:
    """Within, ``backward`` adds to this worker's gradients without averaging them over workers, if ``apply``."""
    if isinstance(network, FSDPModule):
        network.set_requires_gradient_sync(not apply)
    if apply and isinstance(network, DistributedDataParallel):
        return network.no_sync()
    return contextlib.nullcontext()


def gradient_norms(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm ``(N,)`` of each gradient, the same on every rank: of the whole one where ranks hold pieces."""
    gradients = _gradients(parameters)
    norms_N = torch.stack(foreach_norm([local_part(gradient) for gradient in gradients]))
    if any(map(is_sharded, gradients)):
        is_sharded_N = torch.tensor(list(map(is_sharded, gradients))).to(norms_N.device, non_blocking=True)
        whole_N = all_reduce_sum(torch.where(is_sharded_N, norms_N.square(), 0.0)).sqrt()
        norms_N = torch.where(is_sharded_N, whole_N, norms_N)
    return norms_N


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """L2 norm over all gradients together; a scalar that is not finite exactly when some gradient is not."""
    return torch.linalg.vector_norm(gradient_norms(parameters))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, mode: ClipMode, norms_N: Tensor) -> None:
    """Scale gradients down to ``max_norm``: each parameter by itself (PASS, DINO) or all by their common norm.

    ``norms_N`` is the value of ``gradient_norms``. Nothing is read back to the host, and one kernel scales them all.
    """
    gradients = [local_part(gradient) for gradient in _gradients(parameters)]
    match mode:
        case "per_parameter":
            foreach_mul_(gradients, list(_clip_factor(norms_N, max_norm).unbind()))
        case "global":
            foreach_mul_(gradients, _clip_factor(torch.linalg.vector_norm(norms_N), max_norm))


def optimizer_tensors(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """The optimiser's state as ``<state>.<parameter name>`` tensors, for ``load_optimizer``."""
    return {
        f"{key}.{name}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
        if value is not None  # SGD without momentum keeps none
    }


def load_optimizer(optimizer: Optimizer, model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put back what ``optimizer_tensors`` gave; parameters that had no state yet have none again."""
    fused = optimizer.defaults.get("fused")
    for name, parameter in model.named_parameters():
        state = {key: tensors[f"{key}.{name}"] for key in STATE_KEYS if f"{key}.{name}" in tensors}
        if state:
            optimizer.state[parameter] = {key: _restored(key, value, parameter, fused) for key, value in state.items()}


def _restored(key: str, value: Tensor, parameter: nn.Parameter, fused: bool | None) -> Tensor:
    """A copy of an optimiser's tensor, where the optimiser wants it."""
    if key == "step":
        return value.to(parameter.device, copy=True) if fused else value.clone()
    return sharded_like(value.clone(), parameter)


def _gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    # As torch.nn.utils.clip_grad_norm_, to the last digit.
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def _is_exempt(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim == 1 or name.endswith(".bias")
