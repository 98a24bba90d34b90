"""One step of unsupervised tuning: the same for any number of workers."""

from dataclasses import dataclass

import torch
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.train.drop_path import drop_path_noise
from passreid_ray.train.optimizer import gradient_norm
from passreid_ray.train.precision import Precision, autocast
from passreid_ray.train.usl_state import USLState


@dataclass(frozen=True)
class USLStepSettings:
    """What is the same in every step."""

    precision: Precision = "fp32"
    refined_weight: float = 0.5
    """Weight of the loss on refined features, where there are any."""
    seed: int = 0


def usl_step(
    state: USLState, images_BCHW: Tensor, labels_B: Tensor, lr: float, settings: USLStepSettings
) -> dict[str, Tensor]:
    """Do one step on this worker's images and return its metrics as tensors, averaged over all workers.

    A step whose loss or gradient is not finite changes nothing but the position and the count of such steps.
    Source: Cluster Contrast (arXiv:2103.11568), algorithm 1; the memory is updated after the gradient, outside it.
    """
    memory = state.memory
    assert memory is not None
    buffers = [buffer.clone() for buffer in state.network.buffers()]
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    noise = drop_path_noise(state.network.model.backbone, settings.seed, state.step, len(images_BCHW), state.device)
    with autocast(settings.precision, state.device):
        features_BD, refined_BD = state.forward(images_BCHW, noise)
    loss = memory.loss(features_BD, labels_B)
    metrics = {"loss/features": loss.detach()}
    if refined_BD is not None:
        refined_loss = memory.loss(refined_BD, labels_B)
        metrics["loss/refined"] = refined_loss.detach()
        loss = loss + settings.refined_weight * refined_loss
    state.scaler.scale(loss).backward()

    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state.network.parameters())
    metrics = {name: distributed.all_reduce_mean(value) for name, value in {"loss": loss.detach(), **metrics}.items()}
    # The gradient is already the mean over all workers, the loss is not: all must come to the same verdict.
    is_finite = bool(torch.isfinite(metrics["loss"]) & torch.isfinite(norm))
    if is_finite:
        state.scaler.step(state.optimizer)
        memory.update(features_BD, labels_B, refined_ND=refined_BD)
    else:
        for buffer, saved in zip(state.network.buffers(), buffers, strict=True):
            buffer.copy_(saved)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.refused_in_a_row = 0 if is_finite else state.refused_in_a_row + 1
    state.refused_steps += not is_finite
    return {**metrics, "grad_norm": norm}
