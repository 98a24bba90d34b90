"""All that unsupervised tuning carries from one step to the next."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from passreid_ray.losses import ClusterMemory
from passreid_ray.models import NeighbourRefiner, ReidModel
from passreid_ray.train.tuning_state import TuningState


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
class USLState(TuningState[USLNetwork]):
    """A tuning state with the memory and the number of the round."""

    memory: ClusterMemory | None = None
    """Of the round that is under way; None between rounds."""
    round: int = 0
    """Rounds that are finished."""

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state under a stable name."""
        memory = {} if self.memory is None else {"memory.centroids": self.memory.centroids_KD}
        return super().tensors() | memory

    def meta(self) -> dict[str, Any]:
        """What is not a tensor."""
        return super().meta() | {"round": self.round}

    def load(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any], source: str) -> None:
        """As ``TuningState.load``, but for the memory: who knows its settings makes it of ``memory.centroids``."""
        super().load(tensors, meta, source)
        self.round = meta["round"]
