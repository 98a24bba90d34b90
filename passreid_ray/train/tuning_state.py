"""What every tuning run carries from step to step, how it is saved, and how a gradient is applied or refused."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from passreid_ray import distributed
from passreid_ray.train.optimizer import gradient_norm, load_optimizer, optimizer_tensors
from passreid_ray.train.precision import load_scaler
from passreid_ray.train.state_files import require_same_tensors, tensors_below

NetworkT = TypeVar("NetworkT", bound=nn.Module)


@dataclass
class TuningState(Generic[NetworkT]):
    """Network, optimiser and position; all randomness is a function of the seed and the step."""

    network: NetworkT
    forward: nn.Module
    """The network as the step calls it: itself, or wrapped for several workers."""
    optimizer: Optimizer
    scaler: GradScaler
    """Loss scale of fp16; disabled, and then the identity, otherwise."""
    step: int = 0
    best_mAP: float = -1.0
    refused_in_a_row: int = 0
    refused_steps: int = 0
    """Steps whose loss or gradient was not finite; they changed nothing."""

    @property
    def device(self) -> torch.device:
        """Where the step computes."""
        return next(self.network.parameters()).device

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under a stable name."""
        optimizer = optimizer_tensors(self.optimizer, self.network)
        return {**self.network.state_dict(), **{f"optimizer.{name}": value for name, value in optimizer.items()}}

    def meta(self) -> dict[str, Any]:
        """What is not a tensor."""
        return {
            "step": self.step,
            "best_mAP": self.best_mAP,
            "refused_in_a_row": self.refused_in_a_row,
            "refused_steps": self.refused_steps,
            "scaler": self.scaler.state_dict(),
        }

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], source: str) -> None:
        """Put back what ``tensors`` and ``meta`` gave; raises ``UserError`` when they are another model's."""
        expected = self.network.state_dict()
        parts = tuple({f"{name.partition('.')[0]}." for name in expected})
        own = {name: value for name, value in tensors.items() if name.startswith(parts)}
        require_same_tensors(expected, own, source)
        self.network.load_state_dict(own)
        load_optimizer(self.optimizer, self.network, tensors_below(tensors, "optimizer."))
        load_scaler(self.scaler, meta["scaler"])
        self.step, self.best_mAP = meta["step"], meta["best_mAP"]
        self.refused_in_a_row, self.refused_steps = meta["refused_in_a_row"], meta["refused_steps"]


def buffers_of(network: nn.Module) -> list[Tensor]:
    """Copies of the network's buffers, taken before a forward pass that may have to be undone."""
    return [buffer.clone() for buffer in network.buffers()]


def apply_gradients(
    state: TuningState[Any],
    metrics: Mapping[str, Tensor],
    buffers: list[Tensor],
    *,
    clip_norm: float | None = None,
    accepted: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Step the optimiser with the gradients that ``backward`` left, and return ``metrics`` averaged over all workers.

    ``metrics`` has this worker's "loss". When it or a gradient is not finite on any worker, nothing changes but the
    position and the count of such steps: ``buffers``, taken before the forward pass, are put back. ``accepted`` is
    called after a step that was taken.
    """
    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state.network.parameters())
    values = distributed.all_reduce_mean(torch.stack([value.detach() for value in metrics.values()]))
    averaged = dict(zip(metrics, values, strict=True))
    # The gradient is already the mean over all workers, the loss is not: all must come to the same verdict.
    is_finite = bool(torch.isfinite(averaged["loss"]) & torch.isfinite(norm))
    if is_finite:
        if clip_norm is not None:
            nn.utils.clip_grads_with_norm_(state.network.parameters(), clip_norm, norm)
        state.scaler.step(state.optimizer)
        if accepted is not None:
            accepted()
    else:
        for buffer, saved in zip(state.network.buffers(), buffers, strict=True):
            buffer.copy_(saved)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.refused_in_a_row = 0 if is_finite else state.refused_in_a_row + 1
    state.refused_steps += not is_finite
    return {**averaged, "grad_norm": norm}
