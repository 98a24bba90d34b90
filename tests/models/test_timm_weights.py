from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer

from passreid_ray.errors import UserError
from passreid_ray.models import load_timm_weights
from tests.models.golden_models import tiny_vit


def timm_vit() -> VisionTransformer:
    vit = timm.create_model("vit_tiny_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=3)
    assert isinstance(vit, VisionTransformer)
    return vit


def test_cls_and_parts_start_from_timms_cls_and_positions_are_resized(tmp_path: Path) -> None:
    vit = timm_vit()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    model = tiny_vit(image_size=(64, 32))
    report = load_timm_weights(model, tmp_path / "vit.safetensors")
    assert vit.cls_token is not None
    assert vit.pos_embed is not None
    for part in (1, 2, 3):
        assert torch.equal(model.get_parameter(f"part_token{part}"), vit.cls_token)
        assert torch.equal(model.get_parameter(f"part{part}_pos"), vit.pos_embed[:, :1])
    table_1DHW = vit.pos_embed[:, 1:].reshape(1, 4, 4, 48).permute(0, 3, 1, 2)
    expected_1DHW = F.interpolate(table_1DHW, (4, 2), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.pos_embed, torch.nn.Parameter(expected_1DHW.flatten(2).transpose(1, 2)))
    assert torch.equal(model.state_dict()["blocks.1.mlp.fc2.weight"], vit.state_dict()["blocks.1.mlp.fc2.weight"])
    assert report.resized == ["pos_embed"]
    assert len(report.missing) == 6
    assert sorted(report.skipped) == ["head.bias", "head.weight"]


def test_the_hub_gives_the_published_weights_of_the_models_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    vit, asked = timm_vit(), []

    def published(name: str, *, pretrained: bool) -> VisionTransformer:
        asked.append((name, pretrained))
        return vit

    model = tiny_vit()
    monkeypatch.setattr(timm, "create_model", published)
    report = load_timm_weights(model, "hub")
    assert asked == [("vit_tiny_patch16_224", True)]
    assert torch.equal(model.cls_token, vit.state_dict()["cls_token"])
    assert "read from timm's vit_tiny_patch16_224" in str(report)


def test_without_a_network_the_user_is_told_to_bring_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str, *, pretrained: bool) -> None:
        raise ConnectionError("Name or service not known")

    model = tiny_vit()
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"cannot be fetched \(ConnectionError: Name or .* give its path"):
        load_timm_weights(model, "hub")
