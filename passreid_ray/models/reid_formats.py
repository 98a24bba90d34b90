"""Tuned networks, necks included, from and to the checkpoints of the PASS tuning codes.

| written by | necks |
| --- | --- |
| USL and UDA tuning | ``module.bottleneck``, with one neck per token also ``module.bottleneck_pt1`` to ``_ptP`` |
| supervised tuning | ``bottleneck``, with one neck per token also ``bottleneck_1`` to ``_P`` |
| our own | ``ReidModel.state_dict()`` |
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.models.formats import CheckpointTensors, LoadReport, fitted_backbone, read_tensors
from passreid_ray.models.reid_model import ReidModel

_NECK_KEY = re.compile(r"bottleneck(?:_(?:pt)?(?P<part>\d+))?\.(?P<tensor>\w+)")
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
    given, sources = _necks_of(checkpoint.tensors)
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


def _necks_of(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The checkpoint's neck tensors under the model's keys, and the checkpoint's key of each."""
    given: dict[str, Tensor] = {}
    sources: dict[str, str] = {}
    for key, value in tensors.items():
        if match := _NECK_KEY.fullmatch(key):
            name = f"bottleneck_pt{match['part']}" if match["part"] else "bottleneck"
            given[f"{name}.{match['tensor']}"] = value
            sources[f"{name}.{match['tensor']}"] = key
    return given, sources


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
