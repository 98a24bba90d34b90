"""All that unsupervised tuning carries from one step to the next, and how it is saved."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from passreid_ray.losses import ClusterMemory
from passreid_ray.models import NeighbourRefiner, ReidModel
from passreid_ray.train.optimizer import load_optimizer, optimizer_tensors
from passreid_ray.train.state_files import require_same_tensors, tensors_below


class USLNetwork(nn.Module):
    """What is trained: the ReID model and, if features are refined, the refiner."""

    def __init__(self, model: ReidModel, refiner: NeighbourRefiner | None, num_neighbours: int) -> None:
        super().__init__()
        self.model = model
        self.refiner = refiner
        self.num_neighbours = num_neighbours

    def forward(self, images_BCHW: Tensor, drop_path_noise: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(features, features refined by their neighbours in the batch of all ranks; None without a refiner)."""
        features_BD = self.model(images_BCHW, drop_path_noise=drop_path_noise)
        if self.refiner is None:
            return features_BD, None
        return features_BD, self.refiner.refine_batch(features_BD, self.num_neighbours)


@dataclass
class USLState:
    """Network, optimiser, memory and position; all randomness is a function of the seed and the step."""

    network: USLNetwork
    forward: nn.Module
    """The network as the step calls it: itself, or wrapped for several workers."""
    optimizer: Optimizer
    scaler: GradScaler
    """Loss scale of fp16; disabled, and then the identity, otherwise."""
    memory: ClusterMemory | None = None
    """Of the round that is under way; None between rounds."""
    round: int = 0
    """Rounds that are finished."""
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
        named = dict(self.network.state_dict())  # model.*, refiner.*
        if self.memory is not None:
            named["memory.centroids"] = self.memory.centroids_KD
        return named | {f"optimizer.{k}": v for k, v in optimizer_tensors(self.optimizer, self.network).items()}

    def meta(self) -> dict[str, Any]:
        """What is not a tensor."""
        return {
            "step": self.step,
            "round": self.round,
            "best_mAP": self.best_mAP,
            "refused_in_a_row": self.refused_in_a_row,
            "refused_steps": self.refused_steps,
            "scaler": self.scaler.state_dict(),
        }

    def load(self, tensors: dict[str, Tensor], meta: dict[str, Any], source: str) -> Tensor | None:
        """Put back what ``tensors`` and ``meta`` gave, but for the memory, whose centroids are returned, if any.

        Raises ``UserError`` when they are another model's.
        """
        own = {name: value for name, value in tensors.items() if name.startswith(("model.", "refiner."))}
        require_same_tensors(self.network.state_dict(), own, source)
        self.network.load_state_dict(own)
        load_optimizer(self.optimizer, self.network, tensors_below(tensors, "optimizer."))
        self.scaler.load_state_dict(meta["scaler"])
        self.round, self.step, self.best_mAP = meta["round"], meta["step"], meta["best_mAP"]
        self.refused_in_a_row, self.refused_steps = meta["refused_in_a_row"], meta["refused_steps"]
        return tensors.get("memory.centroids")
