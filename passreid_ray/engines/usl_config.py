"""Settings of unsupervised tuning; the defaults are those of PASS's unsupervised tuning (Cluster Contrast)."""

from typing import Literal

from pydantic import Field
from torch import Tensor

from passreid_ray.config import Section
from passreid_ray.data import Source, SyntheticSource
from passreid_ray.engines.clustering import ClusterConfig
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.engines.scoring import LabelledData
from passreid_ray.engines.tuning_config import TUNING_MUST_AGREE, TuningConfig
from passreid_ray.losses import ClusterMemory
from passreid_ray.losses.cluster_memory import MemoryUpdate, Negatives
from passreid_ray.models import NeighbourRefiner
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.tuning_optimizer import TuningOptimizerConfig


class MemoryConfig(Section):
    """The memory of centroids; the defaults are those of PASS's unsupervised tuning."""

    temp: float = Field(default=0.05, gt=0)
    """Temperature of the loss."""
    momentum: float = Field(default=0.2, ge=0, lt=1)
    """Share of itself that a centroid keeps at an update."""
    update: MemoryUpdate = "hard"
    """Which images of a batch move their centroid: all in turn (plain), the least similar one (hard), or the least
    similar of those that are nearest to their own centroid (selective)."""
    negatives: Negatives = "all"
    """Which other centroids the loss counts: all alike, the hardest fully and the others half (weighted), or only the
    hardest."""
    num_hard_negatives: int = Field(default=50, ge=1)
    """How many are the hardest."""

    def build(self, centroids_KD: Tensor) -> ClusterMemory:
        """A memory of these centroids."""
        return ClusterMemory(
            centroids_KD,
            self.temp,
            self.momentum,
            self.update,
            negatives=self.negatives,
            num_hard_negatives=self.num_hard_negatives,
        )


class RefineConfig(Section):
    """Features moved towards their neighbours, before clustering and in every batch."""

    kind: Literal["none", "gcl"] = "none"
    """gcl: graph correlation learning, after arXiv:2112.01839."""
    num_layers: int = Field(default=1, ge=1, le=2)
    """How many times."""
    num_neighbours: int = Field(default=8, ge=1)
    """Neighbours that are looked at."""
    temp: float = Field(default=0.1, gt=0)
    """Temperature of the weights of neighbours."""
    strength: float = Field(default=1.0, ge=0)
    """How far features are moved."""
    loss_weight: float = Field(default=0.5, ge=0)
    """Weight of the memory's loss on refined features."""

    def build(self, width: int) -> NeighbourRefiner | None:
        """The refiner, if there is one."""
        return None if self.kind == "none" else NeighbourRefiner(width, self.num_layers, self.temp, self.strength)


class EvaluationConfig(LabelledData):
    """Retrieval on a labelled data set between rounds."""

    every_rounds: int = Field(default=1, ge=1)
    """Rounds between evaluations; the start and the end are always evaluated."""


class USLConfig(TuningConfig):
    """Everything an unsupervised tuning run is made of."""

    run: RunConfig = RunConfig(name="usl")
    rounds: int = Field(default=50, ge=1)
    """Rounds of clustering and training."""
    steps_per_round: int = Field(default=200, ge=1)
    """Training steps after each clustering."""
    data: Source = SyntheticSource(splits=["train"])
    """Crops to cluster and learn from; person_ids are never used for training, only to judge clusters by."""
    source: Source | None = None
    """Labelled crops of other people that stay in the memory beside the clusters; none: only data."""
    extract_batch_size: int = Field(default=64, ge=1)
    """Images per forward pass when features are extracted."""
    cluster: ClusterConfig = ClusterConfig()
    refine: RefineConfig = RefineConfig()
    memory: MemoryConfig = MemoryConfig()
    optimizer: TuningOptimizerConfig = TuningOptimizerConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def steps(self) -> int:
        """Training steps of all rounds."""
        return self.rounds * self.steps_per_round

    @property
    def rounds_store(self) -> CheckpointStore:
        """Pseudo-labels and centroids of the rounds."""
        return self.run.checkpoints.below("rounds")


MUST_AGREE = (*TUNING_MUST_AGREE, "steps_per_round", "refine.kind")
