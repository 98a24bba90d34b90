from typing import Any

import pytest

from passreid_ray.errors import UserError
from passreid_ray.models.trunk import build_trunk


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("vit_smal_patch16_224", {}, "near names: vit_small_patch16_224"),
        ("resnet18", {}, "cannot build 'resnet18'"),
        ("vit_small_patch14_reg4_dinov2", {}, "4 register tokens"),
        ("vit_small_patch16_dinov3", {}, "is a Eva"),
        ("vit_base_patch16_siglip_224", {}, "no CLS token"),
        ("deit_tiny_distilled_patch16_224", {}, "VisionTransformerDistilled"),
        ("vit_base_patch16_rpn_224", {}, "blocks are ResPostBlock"),
        ("vit_tiny_r_s16_p8_224", {}, "patches come from HybridEmbed"),
        ("vit_tiny_patch16_224", {"pos_drop_rate": 0.1}, "drops positions or patches"),
        ("vit_tiny_patch16_224", {"pos_embed": "none"}, "no learnt positions"),
        ("vit_tiny_patch16_224", {"global_pool": "avg"}, "no norm after the blocks"),
        ("vit_tiny_patch16_224", {"attn_layer": "diff"}, "attention is DiffAttention"),
        ("vit_tiny_patch16_224", {"embed_dimm": 3}, "unexpected keyword argument 'embed_dimm'"),
        ("vit_tiny_patch16_224", {"num_heads": 5}, "divisible by num_heads"),
        ("vit_tiny_patch16_224", {"drop_path_rate": 0.1}, "use drop_path"),
    ],
)
def test_a_trunk_that_does_not_fit_is_refused_with_the_reason(name: str, kwargs: dict[str, Any], message: str) -> None:
    kwargs = {"depth": 1, **kwargs} if name.startswith("vit_") else kwargs
    with pytest.raises(UserError, match=message):
        build_trunk(name, (224, 224), kwargs)
