"""Settings of supervised tuning; the defaults are those of PASS's fine-tuning."""

from pydantic import Field

from passreid_ray.data import Source, SyntheticSource
from passreid_ray.engines.embedding import NeckSide
from passreid_ray.engines.ranking_stage import RankingConfig
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.engines.scoring import LabelledData
from passreid_ray.engines.tuning_config import TUNING_MUST_AGREE, TuningConfig
from passreid_ray.models.config import NeckConfig
from passreid_ray.train.finetune_optimizer import FinetuneOptimizerConfig
from passreid_ray.train.supervised_losses import LossesConfig
from passreid_ray.views import TrainingViewConfig
from passreid_ray.views.undistorted_view import UndistortedViewConfig


class EvaluationConfig(LabelledData):
    """Retrieval on a labelled data set during training."""

    every_epochs: int = Field(default=10, ge=1)
    """Epochs between evaluations; the start and the end are always evaluated."""


class FinetuneConfig(TuningConfig):
    """Everything a supervised tuning run is made of."""

    run: RunConfig = RunConfig(name="finetune")
    epochs: int = Field(default=120, ge=0)
    """Epochs of the weighted losses; an epoch has as many steps as the data has whole batches."""
    batch_size: int = Field(default=64, ge=2)
    """Images per step, over all workers together."""
    images_per_identity: int = Field(default=4, ge=1)
    """K: images of each person in a batch, of different cameras where there are some."""
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    """Stochastic depth of the last block in training."""
    neck: NeckConfig = NeckConfig(neck="multi")
    feature: NeckSide = "before"
    """The feature that is compared: the one before the neck, as in the reference, or the one behind it."""
    average_decay: float | None = Field(default=None, ge=0, lt=1)
    """Keep a moving average of the weights that keeps this share of itself at a step, and evaluate and publish it."""
    data: Source = SyntheticSource(splits=["train"])
    """Labelled crops to learn from."""
    views: TrainingViewConfig = TrainingViewConfig(erase_fill="noise", erase_area=(0.02, 1 / 3))
    undistorted: UndistortedViewConfig | None = None
    """Images keep their shape and get a cut-out that grows, instead of what views.* says; none: they are stretched."""
    losses: LossesConfig = LossesConfig()
    optimizer: FinetuneOptimizerConfig = FinetuneOptimizerConfig()
    ranking: RankingConfig = RankingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def image_size_px(self) -> tuple[int, int]:
        """Height and width of what the model is given."""
        return (self.undistorted or self.views).image_size_px

    @property
    def must_agree(self) -> tuple[str, ...]:
        """Settings that a continued run must have in common with its beginning."""
        mining = ("refresh_steps", "triplets_per_step", "pool_size", "num_hardest")
        stages = ("epochs", *(f"ranking.{name}" for name in mining)) if self.ranking.steps else ()
        return (
            *TUNING_MUST_AGREE,
            *("feature", "undistorted", "losses.", "optimizer.kind", "ranking.steps"),
            *stages,  # they decide which stage a step is of
        )
