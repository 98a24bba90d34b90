from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from passreid_ray.config import build
from passreid_ray.errors import UserError
from passreid_ray.models import (
    PartViT,
    ReidModel,
    load_reid_model,
    official_state_dict,
    official_supervised_state_dict,
    official_usl_state_dict,
)
from passreid_ray.models.config import ModelConfig
from passreid_ray.models.reid_model import Neck, NeckFusion
from passreid_ray.models.reid_shape import infer_reid_shape
from tests.models.golden_models import Golden, tiny_vit
from tests.models.test_reid_formats import VARIANTS, assert_same, random_model


def rebuilt(source: Any, num_heads: int) -> ReidModel:
    """A model built from nothing but the file, and loaded."""
    shape = infer_reid_shape(source)
    backbone = PartViT(
        "vit_tiny_patch16_224",
        image_size=shape.image_size,
        num_parts=shape.num_parts,
        stem=shape.stem,
        stem_channels=shape.stem_channels or 64,
        embed_dim=shape.width,
        depth=shape.depth,
        num_heads=num_heads,
        patch_size=shape.patch_size[0],
    )
    model = ReidModel(backbone, fusion=shape.fusion or "cat", neck=shape.neck or "single")
    report = load_reid_model(model, source)
    assert (report.unexpected, report.resized) == ([], [])
    return model


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"image_size": (96, 32), "depth": 3},
        {"num_parts": 5, "width": 24},
        {"num_parts": 1, "image_size": (64, 64)},
        {"stem": "ics", "stem_channels": 8, "patch_size": 8, "image_size": (32, 16)},
    ],
)
@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_a_supervised_file_says_how_to_build_its_model(
    fusion: NeckFusion, neck: Neck, settings: dict[str, Any]
) -> None:
    source = random_model(fusion, neck, **settings)
    model = rebuilt(official_supervised_state_dict(source, torch.zeros(7, source.feature_width)), num_heads=3)
    assert (model.fusion, model.neck) == (fusion, neck)
    assert (model.backbone.grid, model.backbone.patch_size) == (source.backbone.grid, source.backbone.patch_size)
    assert_same(model, source.state_dict())


@pytest.mark.parametrize("fusion", get_args(NeckFusion))
def test_an_unsupervised_file_tells_its_fusion_by_a_single_neck_only(fusion: NeckFusion) -> None:
    single = infer_reid_shape({"state_dict": official_usl_state_dict(random_model(fusion, "single"))})
    multi = infer_reid_shape({"state_dict": official_usl_state_dict(random_model(fusion, "multi"))})
    assert (single.neck, single.fusion) == ("single", fusion)
    assert (multi.neck, multi.fusion) == ("multi", None)


def test_a_pretraining_checkpoint_tells_its_backbone_and_no_necks() -> None:
    shape = infer_reid_shape({"teacher": Golden("pass_forward_256x128").state("teacher_sd/"), "epoch": 3})
    assert (shape.num_parts, shape.width, shape.depth, shape.stem) == (3, 24, 2, "patch")
    assert (shape.grid, shape.image_size, shape.patch_size) == ((16, 8), (256, 128), (16, 16))
    assert (shape.neck, shape.fusion, shape.usual_num_heads) == (None, None, None)


@pytest.mark.parametrize(
    ("count", "grid"), [(129, (16, 8)), (128, (16, 8)), (197, (14, 14)), (193, (24, 8)), (196, (14, 14))]
)
def test_a_plain_vit_tells_its_grid_with_or_without_a_position_of_cls(count: int, grid: tuple[int, int]) -> None:
    state = official_state_dict(tiny_vit(192, num_parts=0))
    del state["cls_pos"]
    shape = infer_reid_shape(state | {"pos_embed": torch.zeros(1, count, 192)})
    assert (shape.grid, shape.num_parts, shape.usual_num_heads) == (grid, 0, 3)


def test_a_plain_vit_with_a_neck_is_rebuilt() -> None:
    source = random_model("mean", num_parts=0)
    model = rebuilt(official_supervised_state_dict(source), num_heads=3)
    assert (model.fusion, model.neck) == ("mean", "single")
    assert_same(model, source.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base.cls_token": None}, r"holds no vision transformer, 'cls_token' is not there"),
        ({"base.pos_embed": torch.zeros(1, 23, 48)}, r"pos_embed has 23 positions, no grid"),
        (
            {"bottleneck.weight": torch.zeros(50)},
            r"bottleneck.weight is \(50,\), which fits no fusion of 3 part tokens",
        ),
        ({"classifier.weight": torch.zeros(7, 48)}, r"bottleneck.weight is \(96,\), .* not the rest of the file"),
        ({"bottleneck_1.weight": torch.zeros(48)}, r"has 2 necks and 3 part tokens, expected one neck or 4"),
    ],
)
def test_a_file_that_is_no_model_of_ours_is_told(change: dict[str, Tensor | None], message: str) -> None:
    changed = official_supervised_state_dict(random_model("cat", "single"), torch.zeros(7, 96)) | change
    with pytest.raises(UserError, match=f"checkpoint: .*{message}"):
        infer_reid_shape({key: value for key, value in changed.items() if value is not None})


@pytest.mark.parametrize("neck", get_args(Neck))
def test_who_tuned_is_told_by_the_keys_even_where_a_file_has_one_neck_and_no_classifier(neck: Neck) -> None:
    model = random_model(neck=neck)
    supervised, unsupervised = official_supervised_state_dict(model), official_usl_state_dict(model)
    assert infer_reid_shape(supervised).tuned_by == "supervised"
    assert infer_reid_shape({f"module.{key}": value for key, value in supervised.items()}).tuned_by == "supervised"
    assert infer_reid_shape({"state_dict": unsupervised}).tuned_by == "unsupervised"
    assert infer_reid_shape(official_state_dict(model.backbone)).tuned_by is None


def test_a_known_image_size_tells_an_unusual_grid() -> None:
    state = official_state_dict(tiny_vit(image_size=(80, 48)))
    with pytest.raises(UserError, match="pos_embed has 15 positions"):
        infer_reid_shape(state)
    assert infer_reid_shape(state, image_size=(80, 48)).image_size == (80, 48)
    assert infer_reid_shape(state, image_size=(160, 96)).image_size == (80, 48)


def test_settings_that_are_given_win_over_those_of_the_file() -> None:
    shape = infer_reid_shape(official_state_dict(tiny_vit(192, depth=3)))
    told = shape.model_config()
    assert (told.embed_dim, told.depth, told.num_heads, told.patch_size, told.stem) == (192, 3, 3, 16, "patch")
    assert shape.model_config(ModelConfig(num_heads=6)) == told.model_copy(update={"num_heads": 6})
    trunk = shape.model_config(build(ModelConfig, {"trunk": "vit_tiny_patch16_224"}))
    assert (trunk.trunk, trunk.embed_dim, trunk.depth) == ("vit_tiny_patch16_224", None, None)


def test_an_unusual_width_needs_the_number_of_heads() -> None:
    shape = infer_reid_shape(official_state_dict(tiny_vit(48)))
    with pytest.raises(UserError, match=r"model.num_heads: no file tells it, and width 48 .* give model.num_heads"):
        shape.model_config()
    assert shape.model_config(ModelConfig(num_heads=3)).embed_dim == 48
