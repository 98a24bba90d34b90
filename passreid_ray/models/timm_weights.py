"""A trunk pre-trained by somebody else, as timm publishes it, as the starting point of a part-token model."""

from dataclasses import replace
from pathlib import Path

import timm

from passreid_ray.errors import UserError
from passreid_ray.models.formats import LoadReport, load_backbone
from passreid_ray.models.part_vit import PartViT


def load_timm_weights(model: PartViT, source: str | Path) -> LoadReport:
    """Copy timm weights into ``model``: the file ``source``, or with ``"hub"`` those timm publishes for its trunk.

    CLS takes timm's token and position, part tokens become copies of it, patch positions are resized bilinearly.

    Raises:
        UserError: no such weights, no network, or weights of another shape.
    """
    if source != "hub":
        return load_backbone(model, source)
    try:
        trunk = timm.create_model(model.trunk_name, pretrained=True)
    except Exception as error:  # each download back end of timm has its own errors
        raise UserError(
            f"timm weights: those of {model.trunk_name!r} cannot be fetched ({type(error).__name__}: {error}); "
            "download the trunk's .safetensors where there is a network and give its path"
        ) from error
    report = load_backbone(model, trunk.state_dict())
    return replace(report, notes=[f"read from timm's {model.trunk_name}", *report.notes])
