"""What a conversion reads: the model in a checkpoint, what came with it, and what is left out."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from timm.layers.attention import Attention
from torch import Tensor

from passreid_ray.engines.convert_config import ConvertConfig, Format
from passreid_ray.engines.embedding import FusedViT, TunedFeatures
from passreid_ray.engines.loading import LoadConfig, Loaded, load_own, load_public
from passreid_ray.errors import UserError
from passreid_ray.models import (
    PartViT,
    PretrainCheckpoint,
    classifier_of,
    infer_reid_shape,
    read_pretrain_checkpoint,
    read_state,
)
from passreid_ray.models.formats import read_tensors
from passreid_ray.models.reid_model import NeckFusion
from passreid_ray.models.reid_shape import CLASSIFIER, necks_of
from passreid_ray.train.finetune_state import IDENTITY_CLASSIFIER
from passreid_ray.train.state_files import find_checkpoint, load_state, tensors_below

_PRETRAINING = ("student", "teacher", "dino_loss")
"""What only a public pre-training checkpoint holds together."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """What was read."""

    path: Path
    """As it was given."""
    kind: str
    loaded: Loaded
    classifier_CD: Tensor | None
    pretraining: PretrainCheckpoint | None
    """Student, teacher, heads and centers of a pre-training checkpoint."""
    meta: Mapping[str, Any]
    """Position and settings of a checkpoint of this project; ``round`` and ``best_mAP`` of a public one."""
    other_dtypes: list[str]
    """Kinds of floating-point numbers that are not float32; models are, so these are converted."""
    left_out: list[str]
    """Names of what the format has no place for."""

    @property
    def backbone(self) -> PartViT:
        """The backbone alone."""
        return self.loaded.backbone

    @property
    def num_heads(self) -> int:
        """Attention heads per block, which no public file tells."""
        attention = self.backbone.get_submodule("blocks.0.attn")
        assert isinstance(attention, Attention)
        return attention.num_heads


def read_source(config: ConvertConfig, path: Path, form: Format) -> Source:
    """What is at ``path``, as far as ``form`` can hold it.

    Raises:
        UserError: it is refused, holds no model, or does not fit the settings or lacks one.
    """
    # A pre-training file holds both networks, and is read as its teacher when it is checked.
    settings = LoadConfig(weights="teacher" if form == "pretraining" else config.weights, model=config.model)
    if path.is_dir():
        return _read_own(settings, path, form)
    try:
        settings = settings.model_copy(update={"image_size_px": config.image_size_px})
        return _read_public(settings, config.fusion, path, form)
    except UserError as error:
        message = str(error).removeprefix("checkpoint: ").removeprefix(f"{path}: ")
        raise UserError(f"{path}: {message}") from None


def tensors_in(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dicts, under its dotted name."""
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from tensors_in(value, f"{prefix}{key}.")
        elif isinstance(value, Tensor):
            yield f"{prefix}{key}", value


def _read_own(settings: LoadConfig, path: Path, form: Format) -> Source:
    folder = find_checkpoint(path)
    tensors, meta = load_state(folder)
    if "model" not in meta.get("config", {}):
        raise UserError(f"{folder}: holds no model; give the folder of a pre-training or tuning run")
    loaded = load_own(settings, "cat", tensors, meta, str(folder))
    pretraining = None
    if isinstance(loaded.model, FusedViT):
        kind, used = "pre-training of this project", (f"{settings.weights}.backbone.",)
        if form == "pretraining":
            used = ("student.", "teacher.", "centers")
            pretraining = _own_pretraining(tensors)
    else:
        kind = f"{'supervised' if isinstance(loaded.model, TunedFeatures) else 'unsupervised'} tuning of this project"
        network = "average." if tensors_below(tensors, "average.") else "model."
        backbone, classifier = f"{network}backbone.", IDENTITY_CLASSIFIER if form in ("supervised", "own") else network
        used = (backbone,) if form == "released" else (network, classifier)
    return Source(
        path=path,
        kind=kind,
        loaded=loaded,
        classifier_CD=_as_float32(tensors.get(IDENTITY_CLASSIFIER)),
        pretraining=pretraining,
        meta=meta,
        other_dtypes=_other_dtypes(value for name, value in tensors.items() if name.startswith(used)),
        left_out=[name for name in tensors if not name.startswith(used)],
    )


def _read_public(settings: LoadConfig, fusion: NeckFusion | None, path: Path, form: Format) -> Source:
    content = read_state(path)
    is_pretraining = content.keys() >= set(_PRETRAINING)
    pretraining = read_pretrain_checkpoint(content) if is_pretraining and form == "pretraining" else None
    other_network = ["student" if settings.weights == "teacher" else "teacher"] if is_pretraining else []
    if pretraining is None:
        content = {key: value for key, value in content.items() if key not in other_network}
    shape = infer_reid_shape(content, settings.image_size_px)
    if settings.image_size_px not in (None, shape.image_size):
        size = "x".join(map(str, shape.image_size))
        raise UserError(f"image_size_px: its positions are those of {size} px; a conversion resizes nothing")
    if form != "released" and shape.tuned_by and shape.fusion is None and fusion is None:
        raise UserError("its necks do not tell how tokens are fused; give fusion=cat or fusion=mean")
    loaded = load_public(settings.model_copy(update={"image_size_px": shape.image_size}), fusion or "cat", content)
    meta: dict[str, Any] = {}
    if isinstance(content.get("epoch"), int) and not is_pretraining:
        meta["round"] = content["epoch"]
    if isinstance(content.get("best_mAP"), float):
        meta["best_mAP"] = float(content["best_mAP"])  # torch files have a numpy scalar
    if pretraining is None:
        unused = _unused_keys(content, loaded.backbone, form)
        used = {key: value for key, value in read_tensors(content).tensors.items() if key not in unused}
        left_out = other_network + unused
    else:
        used = dict(tensors_in({key: content[key] for key in _PRETRAINING}))
        left_out = [key for key in content if key not in (*_PRETRAINING, "epoch")]
    return Source(
        path=path,
        kind="public pre-training" if is_pretraining else "public file",
        loaded=loaded,
        classifier_CD=_as_float32(classifier_of(content)),
        pretraining=pretraining,
        meta=meta,
        other_dtypes=_other_dtypes(used.values()),
        left_out=left_out,
    )


def _own_pretraining(tensors: Mapping[str, Tensor]) -> PretrainCheckpoint:
    return PretrainCheckpoint(
        student_backbone=tensors_below(tensors, "student.backbone."),
        student_head=tensors_below(tensors, "student.head."),
        teacher_backbone=tensors_below(tensors, "teacher.backbone."),
        teacher_head=tensors_below(tensors, "teacher.head."),
        centers_TK=tensors["centers"],
        epoch=0,
    )


def _unused_keys(content: Mapping[str, Any], backbone: PartViT, form: Format) -> list[str]:
    tensors = read_tensors(content).tensors
    used = set(backbone.state_dict())
    if form != "released":
        used |= set(necks_of(tensors)[1].values())
    if form in ("supervised", "own"):
        used.add(CLASSIFIER)
    read = ("state_dict", "model", "teacher", "student", "epoch", "best_mAP")
    around = [key for key, value in content.items() if not isinstance(value, Tensor) and key not in read]
    return [*(key for key in tensors if key not in used), *around]


def _other_dtypes(tensors: Iterable[Tensor]) -> list[str]:
    dtypes = {value.dtype for value in tensors if value.is_floating_point()} - {torch.float32}
    return sorted(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _as_float32(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float()
