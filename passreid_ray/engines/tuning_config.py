"""Settings that tuning with and without labels share: what is tuned, from which weights, on which crops."""

from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from passreid_ray.config import Section, UserPath, build
from passreid_ray.data import Source, SyntheticSource
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.engines.warm_start import read_teacher
from passreid_ray.errors import UserError
from passreid_ray.models import ReidModel, classifier_of, load_backbone, load_reid_model
from passreid_ray.models.config import ModelConfig, NeckConfig
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.finetune_state import IDENTITY_CLASSIFIER, published_tensors
from passreid_ray.train.precision import Precision
from passreid_ray.train.shares import check_shared, num_pieces
from passreid_ray.train.state_files import find_checkpoint, load_state, read_meta
from passreid_ray.views import TrainingViewConfig


class StartConfig(Section):
    """Weights that tuning begins with."""

    checkpoint: UserPath | None = None
    """A pre-training or tuning run of this project, or any public file; none: random weights."""
    necks: Literal["fresh", "loaded"] = "fresh"
    """Necks of a tuned checkpoint are made anew, as the reference does, or loaded with the backbone."""


class TuningConfig(Section):
    """What every tuning run is made of."""

    run: RunConfig = RunConfig()
    seed: int = Field(default=0, ge=0)
    """Decides batches, views, fresh weights and stochastic depth."""
    batch_size: int = Field(default=256, ge=2)
    """Images per step, over all workers together."""
    images_per_identity: int = Field(default=8, ge=1)
    """K: images of each identity in a batch, of different cameras where there are some."""
    precision: Precision = "fp32"
    """Type in which the backbone computes; weights stay fp32."""
    drop_path: float = Field(default=0.3, ge=0, lt=1)
    """Stochastic depth of the last block in training."""
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between records in metrics.jsonl and TensorBoard."""
    max_refused_in_a_row: int = Field(default=20, ge=1)
    """Stop after this many steps in a row whose loss or gradient was not finite."""
    data: Source = SyntheticSource(splits=["train"])
    """Crops to learn from."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this share of the images cannot be used."""
    views: TrainingViewConfig = TrainingViewConfig()
    start: StartConfig = StartConfig()
    model: ModelConfig | None = None
    """The backbone; none: that of start.checkpoint, or the default ViT-S for a public file or random weights."""
    num_parts: int | None = Field(default=None, ge=0)
    """Part tokens; none: those of start.checkpoint, or 3."""
    neck: NeckConfig = NeckConfig()
    workers: WorkersConfig = WorkersConfig()

    @property
    def image_size_px(self) -> tuple[int, int]:
        """Height and width of what the model is given."""
        return self.views.image_size_px

    def pieces_of(self, world_size: int) -> int:
        """Pieces in which each of ``world_size`` workers computes the backbone on its share of a batch: more where
        fewer than the most workers are there, so that memory does not grow.

        A backbone with batch norm sees its whole share at once, or the result would depend on the number of workers.
        """
        if self.model is not None and self.model.stem == "ics":
            return 1
        return num_pieces(self.batch_size, world_size, self.workers.world_size)

    @property
    def best_store(self) -> CheckpointStore:
        """The checkpoint with the highest mAP."""
        return self.run.checkpoints.below("best")


# Settings that decide the shapes of the weights and the order of the data, whatever is tuned.
TUNING_MUST_AGREE = ("seed", "batch_size", "images_per_identity", "views.", "model.", "num_parts", "neck.")

ConfigT = TypeVar("ConfigT", bound=TuningConfig)


def with_start(config: ConfigT) -> ConfigT:
    """``config`` with the model that its checkpoint brings; a checkpoint of this project knows its own."""
    path = config.start.checkpoint
    if path is not None and not path.exists():
        raise UserError(f"start.checkpoint: {path} does not exist")
    known: dict[str, Any] = {}
    if path is not None and path.is_dir():
        known = read_meta(find_checkpoint(path))["config"]
    num_parts = known.get("num_parts", known.get("views", {}).get("num_parts", 3))
    model = config.model or (build(ModelConfig, known["model"]) if known else ModelConfig())
    absolute = None if path is None else path.absolute()  # workers run in another folder
    return config.model_copy(
        update={
            "model": model.model_copy(update={"drop_path": config.drop_path}),
            "num_parts": num_parts if config.num_parts is None else config.num_parts,
            "start": config.start.model_copy(update={"checkpoint": absolute}),
        }
    )


def start_notes(config: TuningConfig) -> list[str]:
    """What a user should know of the start beside what was loaded of it."""
    path = config.start.checkpoint
    known = read_meta(find_checkpoint(path))["config"]["views"] if path is not None and path.is_dir() else {}
    own = config.views
    if known and (list(own.mean), list(own.std)) != (list(known["mean"]), list(known["std"])):
        return [
            f"the start saw pixels of mean {known['mean']} and deviation {known['std']}, this run makes them "
            f"{list(own.mean)} and {list(own.std)} (views.mean, views.std)"
        ]
    return []


def check_shares(config: TuningConfig) -> None:
    """Raise ``UserError`` when a batch cannot be made of whole identities, or not shared out among the workers."""
    per_identity = config.images_per_identity
    if config.batch_size % per_identity:
        raise UserError(
            f"batch_size: {config.batch_size} images cannot be divided by {per_identity} (images_per_identity)"
        )
    check_shared("batch_size", "images", config.batch_size, config.workers.sizes, unit=per_identity)


def build_model(config: TuningConfig) -> tuple[ReidModel, str]:
    """The model with its first weights, the same on every worker, and what was loaded."""
    assert config.model is not None
    assert config.num_parts is not None
    torch.manual_seed(config.seed)
    try:
        backbone = config.model.build(config.image_size_px, config.num_parts)
    except UserError as error:
        key = "views.image_size_px: " if str(error).startswith("image size") else "model: "
        raise UserError(f"{key}{error}") from None
    model = config.neck.build(backbone)
    path = config.start.checkpoint
    if path is None:
        return model, "random weights"
    source = start_source(path)
    try:
        report = load_reid_model(model, source) if config.start.necks == "loaded" else load_backbone(backbone, source)
    except UserError as error:
        raise UserError(f"start.checkpoint: {path}: {str(error).removeprefix('checkpoint: ')}") from None
    return model, f"{path}: {report}"


def start_source(path: Path) -> Any:
    """What ``load_reid_model`` reads of a run folder of this project, or the public file itself."""
    if not path.is_dir():
        return path
    tensors, _ = load_state(find_checkpoint(path))
    return published_tensors(tensors) or read_teacher(path)[0]


def start_classifier(path: Path) -> Tensor | None:
    """The identity classifier ``(C, D)`` of a supervised checkpoint, ours or a public one; None where there is none."""
    if not path.is_dir():
        return classifier_of(path)
    return load_state(find_checkpoint(path))[0].get(IDENTITY_CLASSIFIER)
