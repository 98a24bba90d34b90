import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from passreid_ray.errors import UserError
from passreid_ray.models.config import HeadConfig, ModelConfig, build_pass_model

TINY = ModelConfig(trunk="vit_tiny_patch16_224", embed_dim=24, depth=3, num_heads=2, drop_path=0.2)


def test_without_sizes_the_model_is_the_trunks_own() -> None:
    model = ModelConfig(trunk="vit_tiny_patch16_224").build((64, 32), 3)
    trunk = timm.create_model("vit_tiny_patch16_224")
    assert isinstance(trunk, VisionTransformer)
    assert (model.width, model.depth) == (trunk.num_features, len(trunk.blocks))


def test_sizes_that_are_given_reach_the_model() -> None:
    model = TINY.model_copy(update={"patch_size": 8}).build((64, 32), 2)
    assert (model.width, model.depth, model.grid, model.num_parts) == (24, 3, (8, 4), 2)


def test_stochastic_depth_grows_to_its_value_and_a_teacher_has_none() -> None:
    head = HeadConfig(num_prototypes=8, hidden_dim=8, bottleneck_dim=4)
    student, teacher = (build_pass_model(TINY, head, (64, 32), 3, is_teacher=own) for own in (False, True))
    assert student.backbone.drop_path_rates == pytest.approx([0, 0.1, 0.2])
    assert teacher.backbone.drop_path_rates == pytest.approx([0, 0, 0])


def test_there_is_a_head_of_the_given_sizes_for_every_token() -> None:
    model = build_pass_model(TINY, HeadConfig(num_prototypes=8, hidden_dim=16, bottleneck_dim=4), (64, 32), 2)
    logits = model.head([torch.randn(5, 24)] * 3)
    assert [tuple(own.shape) for own in logits] == [(5, 8)] * 3


def test_a_trunk_that_is_no_vit_is_told() -> None:
    with pytest.raises(UserError, match="resnet18"):
        ModelConfig(trunk="resnet18").build((64, 32), 3)


def test_an_image_that_is_not_whole_patches_is_told() -> None:
    with pytest.raises(UserError, match="60x30 px is not a multiple of the patch, 16x16 px"):
        TINY.build((60, 30), 3)
