"""One step of unsupervised tuning: the same for any number of workers."""

from dataclasses import dataclass

from torch import Tensor

from passreid_ray.train.drop_path import drop_path_noise
from passreid_ray.train.precision import Precision, autocast
from passreid_ray.train.tuning_state import apply_gradients, buffers_of
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
    buffers = buffers_of(state.network)
    for group in state.optimizer.param_groups:
        group["lr"] = lr
    noise = drop_path_noise(state.network.model.backbone, settings.seed, state.step, len(images_BCHW), state.device)
    with autocast(settings.precision, state.device):
        features_BD, refined_BD = state.forward(images_BCHW, noise)
    loss = memory.loss(features_BD, labels_B)
    metrics = {"loss/features": loss}
    if refined_BD is not None:
        metrics["loss/refined"] = memory.loss(refined_BD, labels_B)
        loss = loss + settings.refined_weight * metrics["loss/refined"]
    state.scaler.scale(loss).backward()
    return apply_gradients(
        state,
        {"loss": loss, **metrics},
        buffers,
        accepted=lambda: memory.update(features_BD, labels_B, refined_ND=refined_BD),
    )
