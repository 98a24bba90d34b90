"""One step of the ranking loss on mined triplets: the same for any number of workers and micro-batches."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from passreid_ray.losses import ranking_loss
from passreid_ray.models import PartViT, ReidModel
from passreid_ray.models.fusion import combine_tokens
from passreid_ray.models.reid_model import NeckFusion
from passreid_ray.train.drop_path import drop_path_noise
from passreid_ray.train.finetune_state import FinetuneState, update_average
from passreid_ray.train.finetune_step import FinetuneStepSettings, LabelledBatch
from passreid_ray.train.optimizer import gradients_stay_local
from passreid_ray.train.precision import autocast
from passreid_ray.train.tuning_state import apply_gradients, buffers_of


class RankingNetwork(nn.Module):
    """What the ranking loss trains: the features in front of the necks."""

    def __init__(self, model: ReidModel) -> None:
        super().__init__()
        self.backbone: PartViT = model.backbone
        self.fusion: NeckFusion = model.fusion

    def forward(self, images_BCHW: Tensor, drop_path_noise: Tensor | None, grids_B2: Tensor | None) -> Tensor:
        """Features, not normalised."""
        tokens_BTD = self.backbone(images_BCHW, drop_path_noise=drop_path_noise, grids_B2=grids_B2)
        return combine_tokens(tokens_BTD, self.fusion)


@dataclass(frozen=True)
class RankingSettings:
    """What is the same in every step of the ranking loss."""

    margin: float = 0.1
    num_micro_batches: int = 1
    """Parts in which a worker computes its triplets, one after the other; the gradient is that of all together."""


def ranking_step(
    state: FinetuneState, batch: LabelledBatch, settings: FinetuneStepSettings, ranking: RankingSettings
) -> dict[str, Tensor]:
    """Do one step on this worker's queries, positives and negatives; metrics as tensors, averaged over all workers.

    ``state.forward`` is a ``RankingNetwork``. The batch has T queries, then their positives, then their negatives. A
    step whose loss or gradient is not finite changes nothing but the position and the count of such steps.
    Source: Almazan et al., arXiv:1801.05339, section 3.
    """
    model = state.network.model
    buffers = buffers_of(state.network)
    images_3TCHW = batch.images_BCHW.unflatten(0, (3, -1))
    grids_3T2 = None if batch.grids_B2 is None else batch.grids_B2.unflatten(0, (3, -1))
    num_triplets = images_3TCHW.shape[1]
    # Three views of a triplet: so a worker's share of the noise is that of its triplets.
    noise_L23T = drop_path_noise(model.backbone, settings.seed, state.step, num_triplets, state.device, views=3)
    losses = []
    micro_batches = torch.arange(num_triplets).chunk(ranking.num_micro_batches)  # fewer where they do not come out even
    for index, places in enumerate(micro_batches):
        first, end = int(places[0]), int(places[-1]) + 1
        noise = None if noise_L23T is None else noise_L23T[..., first:end].flatten(-2)
        grids_B2 = None if grids_3T2 is None else grids_3T2[:, first:end].flatten(0, 1)
        with gradients_stay_local(state.forward, index < len(micro_batches) - 1):
            with autocast(settings.precision, state.device):
                features_BD = state.forward(images_3TCHW[:, first:end].flatten(0, 1), noise, grids_B2)
            loss = ranking_loss(*features_BD.chunk(3), ranking.margin) * (end - first) / num_triplets
            state.scaler.scale(loss).backward()
        losses.append(loss.detach())

    def accepted() -> None:
        if state.average is not None:
            update_average(state.average, model, settings.average_decay)

    total = torch.stack(losses).sum()
    metrics = {"loss": total, "loss/ranking": total}
    return apply_gradients(state, metrics, buffers, clip_norm=settings.clip_norm, accepted=accepted)
