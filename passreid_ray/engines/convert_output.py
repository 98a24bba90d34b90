"""What a conversion writes: a public file or a checkpoint folder, first as a draft, then moved to its place."""

import os
import shutil
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from passreid_ray.engines.convert_config import ConvertConfig, Format
from passreid_ray.engines.convert_source import Source, tensors_in
from passreid_ray.engines.embedding import FusedViT, TunedFeatures
from passreid_ray.engines.run_folder import check_writable
from passreid_ray.errors import UserError
from passreid_ray.models import (
    PartViT,
    PretrainCheckpoint,
    PrototypeHead,
    ReidModel,
    load_backbone,
    load_heads,
    official_state_dict,
    official_supervised_state_dict,
    official_usl_state_dict,
    pretrain_checkpoint,
)
from passreid_ray.models.config import NeckConfig
from passreid_ray.train.finetune_state import IDENTITY_CLASSIFIER
from passreid_ray.train.state_files import META_FILE, TENSORS_FILE, save_state


def model_to_write(config: ConvertConfig, source: Source) -> ReidModel | None:
    """The source's model, or its backbone with fresh necks; None for the formats that hold backbones only.

    Raises:
        UserError: necks are needed and not chosen, or chosen otherwise than the source has them.
    """
    if config.format in ("released", "pretraining"):
        return None
    model = source.loaded.reid_model
    if model is None:
        if config.fusion is None or config.neck is None:
            raise UserError(
                f"{source.path}: has no necks, and format={config.format} needs some: give fusion=cat or mean and "
                "neck=single or multi, and fresh ones are written"
            )
        return NeckConfig(fusion=config.fusion, neck=config.neck).build(source.backbone)
    for key, given, own in (("fusion", config.fusion, model.fusion), ("neck", config.neck, model.neck)):
        if given not in (None, own):
            raise UserError(f"{key}: {source.path} was tuned with {own}, not {given}; leave {key} out")
    return model


def draft_of(output: Path) -> Path:
    """Where the output is written first, beside it."""
    return output.with_name(f".part.{output.name}")  # the end of the name tells how it is read


def write(
    form: Format, draft: Path, source: Source, model: ReidModel | None, config: ConvertConfig
) -> dict[str, Tensor]:
    """Write the draft; every tensor in it, under its dotted name.

    Raises:
        UserError: the source lacks what the format needs, or the folder cannot be written.
    """
    check_writable(draft.parent, "output")
    if form == "own":
        assert model is not None
        classifier = {} if source.classifier_CD is None else {IDENTITY_CLASSIFIER: source.classifier_CD}
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()} | classifier
        save_state(draft, tensors, own_meta(source, model))
        return tensors
    content = official_content(form, source, model, config.epoch)
    try:
        if draft.suffix == ".safetensors":
            save_file(content, draft)
        else:
            torch.save(content, draft)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors wrap a full disk
        raise UserError(f"{config.output}: cannot be written: {str(error).splitlines()[0]}") from None
    return dict(tensors_in(content))


def move(draft: Path, output: Path) -> None:
    """Put what was checked in its place, whole or not at all."""
    if draft.is_file():
        os.replace(draft, output)
        return
    output.mkdir(exist_ok=True)
    (output / META_FILE).unlink(missing_ok=True)  # no longer whole, until the new description is there
    for file in (TENSORS_FILE, META_FILE):
        os.replace(draft / file, output / file)


def discard(draft: Path) -> None:
    """Remove what is left of the draft, if anything."""
    shutil.rmtree(draft, ignore_errors=True)
    draft.unlink(missing_ok=True)


def official_content(form: Format, source: Source, model: ReidModel | None, epoch: int | None) -> dict[str, Any]:
    """What a public file of this format holds; ``epoch`` is the number it shall tell, None the source's.

    Raises:
        UserError: pretraining is asked of a source that has no student, teacher, heads and centers.
    """
    match form:
        case "released":
            return official_state_dict(source.backbone)
        case "pretraining":
            if source.pretraining is None:
                raise UserError(
                    f"{source.path}: has no student, teacher, heads and centers; only a pre-training checkpoint "
                    "becomes format=pretraining, give another format"
                )
            return _pretraining_content(source.pretraining, source.backbone, epoch)
        case "supervised":
            assert model is not None
            return official_supervised_state_dict(model, source.classifier_CD)
        case "usl":
            assert model is not None
            finished = source.meta.get("round") if epoch is None else epoch
            best_mAP = max(0.0, source.meta.get("best_mAP") or 0.0)
            return {"state_dict": official_usl_state_dict(model), "epoch": int(finished or 0), "best_mAP": best_mAP}
        case "own":
            raise AssertionError("a folder, not a file")


def own_meta(source: Source, model: ReidModel) -> dict[str, Any]:
    """Description of a checkpoint of this project: where it is from, and of a config what reading it needs.

    A source that was tuned without labels has features behind the neck, which a config without ``feature`` says; all
    others have them before it.
    """
    image_input = source.loaded.image_input
    config: dict[str, Any] = {
        "model": source.loaded.model_config.model_dump(mode="json"),
        "num_parts": model.backbone.num_parts,
        "neck": {"fusion": model.fusion, "neck": model.neck},
        "views": {"image_size_px": list(image_input.size_px), **image_input.pixels.model_dump(mode="json")},
    }
    if image_input.patch_px is not None:
        config["undistorted"] = source.meta["config"]["undistorted"]
    match source.loaded.model:
        case TunedFeatures(side=side):
            config["feature"] = side
        case FusedViT():
            config["feature"] = "before"
        case ReidModel():
            pass
    kept = {key: source.meta[key] for key in ("round", "best_mAP") if source.meta.get(key) is not None}
    return {"step": source.meta.get("step", 0), **kept, "converted_from": str(source.path), "config": config}


def _pretraining_content(pieces: PretrainCheckpoint, like: PartViT, epoch: int | None) -> dict[str, Any]:
    student, student_head = _network(pieces.student_backbone, pieces.student_head, like)
    teacher, teacher_head = _network(pieces.teacher_backbone, pieces.teacher_head, like)
    finished = pieces.epoch if epoch is None else epoch
    return pretrain_checkpoint(student, student_head, teacher, teacher_head, pieces.centers_TK.float(), finished)


def _network(
    backbone_state: Mapping[str, Tensor], head_state: Mapping[str, Tensor], like: PartViT
) -> tuple[PartViT, PrototypeHead]:
    """A backbone like ``like`` and heads of the size that ``head_state`` has."""
    hidden, prototypes = head_state.get("mlp_cls.0.weight"), head_state.get("last_layer_cls.weight_v")
    if hidden is None or prototypes is None:
        raise UserError("its prototype heads are not there; give a pre-training checkpoint that has them")
    backbone = deepcopy(like)
    load_backbone(backbone, backbone_state)
    head = PrototypeHead(
        backbone.width,
        len(prototypes),
        hidden_dim=len(hidden),
        bottleneck_dim=prototypes.shape[1],
        num_tokens=backbone.num_tokens,
        batch_norm="mlp_cls.1.weight" in head_state,
    )
    load_heads(head, head_state)
    return backbone, head
