"""One step of supervised tuning: the same for any number of workers."""

from dataclasses import dataclass

from torch import Tensor

from passreid_ray.train.drop_path import drop_path_noise
from passreid_ray.train.finetune_state import FinetuneState, update_average
from passreid_ray.train.precision import Precision, autocast
from passreid_ray.train.tuning_state import apply_gradients, buffers_of


@dataclass(frozen=True)
class FinetuneStepSettings:
    """What is the same in every step."""

    precision: Precision = "fp32"
    seed: int = 0
    clip_norm: float | None = None
    average_decay: float = 0.0
    """Share of itself that the moving average keeps, where there is one."""


@dataclass(frozen=True)
class LabelledBatch:
    """This worker's share of a batch."""

    images_BCHW: Tensor
    ids_B: Tensor
    """Identities, counted from 0."""
    grids_B2: Tensor | None = None
    """Rows and columns of patches, where images keep their shape."""


def finetune_step(
    state: FinetuneState, batch: LabelledBatch, epoch: float, settings: FinetuneStepSettings
) -> dict[str, Tensor]:
    """Do one step at the learning rates that the optimiser has; metrics as tensors, averaged over all workers.

    ``epoch`` is how many are done, fractions included. A step whose loss or gradient is not finite changes nothing but
    the position and the count of such steps. Source: PASS (arXiv:2203.03931), section 4.1, after TransReID.
    """
    network = state.network
    buffers = buffers_of(network)
    noise = drop_path_noise(
        network.model.backbone, settings.seed, state.step, len(batch.images_BCHW), batch.images_BCHW.device
    )
    with autocast(settings.precision, state.device):
        features = state.forward(batch.images_BCHW, noise, batch.grids_B2)
    terms = network.losses.terms(features, batch.ids_B, epoch)
    loss = sum(terms.values())
    assert isinstance(loss, Tensor)
    state.scaler.scale(loss).backward()

    def accepted() -> None:
        network.losses.update_centers(features, batch.ids_B)
        if state.average is not None:
            update_average(state.average, network.model, settings.average_decay)

    metrics = {"loss": loss, **{f"loss/{name}": value for name, value in terms.items()}}
    return apply_gradients(state, metrics, buffers, clip_norm=settings.clip_norm, accepted=accepted)
