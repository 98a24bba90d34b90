"""The plain timm vision transformer whose patch embedding, blocks and norm a part-token model takes over."""

import difflib
from typing import Any, cast

import timm
from timm.layers.attention import Attention
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from passreid_ray import products
from passreid_ray.errors import UserError
from passreid_ray.models.blocks import PartBlock

_OURS = {
    "pretrained": "load weights with load_timm_weights",
    "num_classes": "the model returns tokens",
    "img_size": "use image_size",
    "drop_path_rate": "use drop_path",
    "dynamic_img_size": "every input size is taken",
}


def build_trunk(name: str, image_size: tuple[int, int], trunk_kwargs: dict[str, Any]) -> VisionTransformer:
    """A randomly initialised timm ``VisionTransformer`` that fits a part-token model and takes every input size.

    Its patch embedding returns ``(B, rows, columns, D)``; its blocks are ``PartBlock``.

    Raises:
        UserError: unknown name, arguments that timm refuses, or a transformer that is not the plain pre-norm one.
    """
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5))
        raise UserError(f"trunk: timm has no model {name!r}" + (f"; near names: {near}" if near else ""))
    for key in [key for key in trunk_kwargs if key in _OURS]:
        raise UserError(f"trunk: {key!r} is not passed on to timm; {_OURS[key]}")
    try:
        trunk = timm.create_model(
            name, pretrained=False, num_classes=0, img_size=image_size, dynamic_img_size=True, **trunk_kwargs
        )
    except (TypeError, AssertionError, ValueError, RuntimeError) as error:
        raise UserError(f"trunk: timm cannot build {name!r} with {trunk_kwargs} as a ViT: {error}") from error
    if not isinstance(trunk, VisionTransformer):
        raise UserError(f"trunk: {name!r} does not fit: it is a {type(trunk).__name__}, not a VisionTransformer")
    if reasons := _misfits(trunk):
        raise UserError(f"trunk: {name!r} does not fit a part-token model: {'; '.join(reasons)}")
    for block in trunk.blocks:
        products.use_in(PartBlock.of(cast(Block, block)))
    return trunk


def _misfits(trunk: VisionTransformer) -> list[str]:
    reasons = []
    if type(trunk) is not VisionTransformer:
        reasons.append(f"it is a {type(trunk).__name__}, not the plain VisionTransformer")
    if not trunk.has_class_token:
        reasons.append("it has no CLS token")
    if trunk.num_reg_tokens:
        reasons.append(f"it has {trunk.num_reg_tokens} register tokens")
    if trunk.pos_embed is None:
        reasons.append("it has no learnt positions")
    if type(trunk.patch_embed) is not PatchEmbed:
        reasons.append(f"its patches come from {type(trunk.patch_embed).__name__}")
    if isinstance(trunk.norm, nn.Identity):
        reasons.append("it has no norm after the blocks (it pools patches instead of using CLS)")
    if trunk.pos_drop.p > 0 or not isinstance(trunk.patch_drop, nn.Identity):
        reasons.append("it drops positions or patches")
    for block in trunk.blocks:
        if type(block) is not Block:
            reasons.append(f"its blocks are {type(block).__name__}, not the pre-norm Block")
            break
        if type(block.attn) is not Attention:
            reasons.append(f"its attention is {type(block.attn).__name__}")
            break
    return reasons
