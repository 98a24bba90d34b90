"""Tuned networks, necks included, from and to the checkpoints of the PASS tuning codes.

| written by | necks |
| --- | --- |
| USL and UDA tuning | ``module.bottleneck``, with one neck per token also ``module.bottleneck_pt1`` to ``_ptP`` |
| supervised tuning | ``bottleneck``, with one neck per token also ``bottleneck_1`` to ``_P``; ``classifier.weight`` |
| our own | ``ReidModel.state_dict()`` |
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.models.formats import CheckpointTensors, LoadReport, fitted_backbone, read_tensors
from passreid_ray.models.reid_model import ReidModel
from passreid_ray.models.reid_shape import CLASSIFIER, necks_of

_BACKBONE = "backbone."


def load_reid_model(model: ReidModel, source: str | Path | Mapping[str, Any]) -> LoadReport:
    """Copy a checkpoint's backbone and, where it has them, its necks into ``model``.

    ``source`` may be whatever ``load_backbone`` takes, which also says what becomes of the backbone. Without necks in
    the checkpoint those of the model stay as they are. Nothing is copied when anything is wrong.

    The reference itself starts a tuning with fresh necks even from a tuned checkpoint: for that, call
    ``load_backbone(model.backbone, source)``.

    Raises:
        UserError: as ``load_backbone``, or the checkpoint's necks are of another kind or width, or incomplete.
    """
    checkpoint = read_tensors(source)
    backbone_state, backbone = fitted_backbone(model.backbone, checkpoint)
    given, sources = necks_of(checkpoint.tensors)
    wanted = {key: value for key, value in model.state_dict().items() if not key.startswith(_BACKBONE)}
    notes = list(backbone.notes)
    if given:
        _check_necks(model, given, wanted, checkpoint)
    else:
        notes.append("no necks in checkpoint, those of the model are unchanged")
    neck_state = wanted | {key: given[key] for key in wanted if key in given}
    model.load_state_dict({_BACKBONE + key: value for key, value in backbone_state.items()} | neck_state)
    return LoadReport(
        loaded=[*(_BACKBONE + key for key in backbone.loaded), *(key for key in wanted if key in given)],
        missing=[*(_BACKBONE + key for key in backbone.missing), *(key for key in wanted if key not in given)],
        unexpected=[*backbone.unexpected, *(sources[key] for key in given if key not in wanted)],
        resized=[_BACKBONE + key for key in backbone.resized],
        skipped=[key for key in backbone.skipped if key not in sources.values()],
        notes=notes,
    )


def official_usl_state_dict(model: ReidModel) -> dict[str, Tensor]:
    """Copies of the model's weights as the ``state_dict`` of the reference's ``checkpoint.pth.tar`` has them."""
    return {
        f"module.{key.removeprefix(_BACKBONE)}": value.detach().cpu().clone()
        for key, value in model.state_dict().items()
    }


def official_supervised_state_dict(model: ReidModel, classifier_CD: Tensor | None = None) -> dict[str, Tensor]:
    """Copies of the model's weights, and of a classifier's, as the reference's ``transformer_*.pth`` has them.

    The reference's ``base.fc``, which it never uses, is left out.

    Args:
        classifier_CD: weights ``(C, feature_width)`` of the linear classifier behind the necks; without it the file has
            none, which is enough for retrieval and for further tuning.

    Raises:
        UserError: a classifier of another width.
    """
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key.startswith(_BACKBONE):
            key = f"base.{key.removeprefix(_BACKBONE)}"
        state[key.replace("bottleneck_pt", "bottleneck_")] = value.detach().cpu().clone()
    if classifier_CD is None:
        return state
    if classifier_CD.ndim != 2 or classifier_CD.shape[1] != model.feature_width:
        raise UserError(
            f"classifier_CD: expected (classes, {model.feature_width}) for these features, found "
            f"{tuple(classifier_CD.shape)}; give the classifier that was trained with this model"
        )
    return state | {CLASSIFIER: classifier_CD.detach().cpu().clone()}


def classifier_of(source: str | Path | Mapping[str, Any]) -> Tensor | None:
    """The classifier's weights ``(C, feature_width)`` in a supervised checkpoint; None when it holds none.

    ``source`` may be whatever ``load_reid_model`` takes.

    Raises:
        UserError: the file is refused, or what it calls a classifier is no matrix.
    """
    checkpoint = read_tensors(source)
    classifier_CD = checkpoint.tensors.get(CLASSIFIER)
    if classifier_CD is not None and classifier_CD.ndim != 2:
        raise UserError(
            f"{checkpoint.where}: {CLASSIFIER} is {tuple(classifier_CD.shape)}, expected (classes, width); "
            "its classifier cannot be used, load the model alone"
        )
    return classifier_CD


def _check_necks(
    model: ReidModel, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], checkpoint: CheckpointTensors
) -> None:
    where = checkpoint.where
    count = len({key.partition(".")[0] for key in given})
    if count > 1 == len(model.neck_names):
        raise UserError(f"{where}: has a neck per token, {count} in all, the model a single one; set neck='multi'")
    width = len(given["bottleneck.weight"]) if "bottleneck.weight" in given else None
    fitting = {2 * model.backbone.width: "cat", model.backbone.width: "mean"}.get(width or 0)
    if count == 1 < len(model.neck_names):
        fusion = f" and fusion={fitting!r}" if fitting else ""
        raise UserError(f"{where}: has a single neck, the model one per token; set neck='single'{fusion}")
    # Files older than torch 0.4.1 have no such counters, and nothing depends on them.
    if lacking := [key for key in wanted if key not in given and not key.endswith("num_batches_tracked")]:
        raise UserError(f"{where}: its necks are incomplete, {lacking[0]!r} is not there")
    for key, value in wanted.items():
        if key in given and given[key].shape != value.shape:
            fusion_differs = model.neck == "single" and fitting
            hint = f"set fusion={fitting!r}" if fusion_differs else "build the model with the checkpoint's trunk"
            raise UserError(
                f"{where}: {key} is {tuple(given[key].shape)} there and {tuple(value.shape)} in the model; {hint}"
            )
