from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from passreid_ray.config import build
from passreid_ray.engines.embedding import embed
from passreid_ray.engines.loading import LoadConfig, load_model
from passreid_ray.errors import UserError
from passreid_ray.models import ReidModel, official_state_dict
from passreid_ray.models.config import ModelConfig
from passreid_ray.models.reid_model import Neck, NeckFusion
from passreid_ray.train.state_files import tensors_below
from passreid_ray.views import normalize
from tests.engines.checkpoint_files import HEADS, supervised_file, unsupervised_file
from tests.models.golden_models import Golden, largest_difference, tiny_vit
from tests.models.test_reid_formats import VARIANTS, random_model


def expected_features(model: ReidModel, images_BCHW: Tensor, kind: str) -> Tensor:
    model.eval()
    with torch.inference_mode():
        if kind == "supervised":
            return F.normalize(model.embed(images_BCHW).before_BD, dim=1)
        return model(images_BCHW)


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
@pytest.mark.parametrize("kind", ["supervised", "unsupervised"])
def test_a_public_tuned_file_gives_the_features_that_its_own_code_compares(
    tmp_path: Path, kind: str, fusion: NeckFusion, neck: Neck
) -> None:
    model, images_BCHW = random_model(fusion, neck), torch.randn(2, 3, 64, 32)
    path = (supervised_file if kind == "supervised" else unsupervised_file)(tmp_path / "file.pth", model)
    loaded = load_model(LoadConfig(checkpoint=path, model=ModelConfig(num_heads=3)), fusion)
    assert torch.equal(embed(loaded.model, images_BCHW), expected_features(model, images_BCHW, kind))
    assert loaded.image_input.size_px == (64, 32)
    assert loaded.image_input.pixels.mean == loaded.image_input.pixels.std == (0.5, 0.5, 0.5)
    side = "before" if kind == "supervised" else "after"
    assert f"{kind} tuning, ViT of width 48 and depth 2 with 3 parts, 64x32 px, neck {neck}" in loaded.notes
    assert f"features {side} the neck" in loaded.notes


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
@pytest.mark.parametrize("kind", ["supervised", "unsupervised"])
def test_a_file_under_the_references_names_gives_the_references_own_features_of_pixels(
    tmp_path: Path, kind: str, fusion: NeckFusion, neck: Neck
) -> None:
    golden = Golden("finetune_transreid" if kind == "supervised" else "finetune_cluster_vit")
    prefix = "base." if kind == "supervised" else "module."
    heads_and_all = Golden("pass_forward_64x32").state("teacher_sd/")
    state = {f"{prefix}{key}": value for key, value in tensors_below(heads_and_all, "backbone.").items()}
    width = 96 if (fusion, neck) == ("cat", "single") else 48
    part_names = ["_1", "_2", "_3"] if kind == "supervised" else ["_pt1", "_pt2", "_pt3"]
    for ending in ["", *part_names] if neck == "multi" else [""]:
        name = f"bottleneck{ending}"
        values = {key: value[:width] for key, value in golden.state(f"neck/{name}/").items()}
        values["bias"] = torch.zeros(width)
        state |= {f"{'' if kind == 'supervised' else prefix}{name}.{key}": value for key, value in values.items()}
    if kind == "supervised":
        state["classifier.weight"] = golden["classifier_weight_7x96"][:, : 96 if fusion == "cat" else 48].clone()
        expected_BD = F.normalize(golden[f"{fusion}_{neck}/eval_before"], dim=1)
    else:
        expected_BD = golden[f"{fusion}_{neck}/eval"]
    torch.save(state if kind == "supervised" else {"state_dict": state, "epoch": 1}, tmp_path / "file.pth")
    loaded = load_model(LoadConfig(checkpoint=tmp_path / "file.pth", model=ModelConfig(num_heads=3)), fusion)
    features_BD = embed(loaded.model, normalize(golden["img_u8"], loaded.image_input.pixels))
    assert largest_difference(features_BD, expected_BD) < 2e-6


def test_a_fusion_that_no_file_tells_is_taken_from_the_settings_and_must_fit_a_neck(tmp_path: Path) -> None:
    path = unsupervised_file(tmp_path / "file.pth", random_model("mean", "multi"))
    config = LoadConfig(checkpoint=path, model=ModelConfig(num_heads=3))
    loaded = load_model(config, "mean")
    assert loaded.model.fusion == "mean"
    assert "fusion mean (as set, the file does not tell it)" in loaded.notes
    with pytest.raises(UserError, match=r"file.pth: fusion: the file does not tell its own; .* found cls"):
        load_model(config, "cls")


def test_a_backbone_needs_no_settings_and_a_square_one_is_given_upright_images(tmp_path: Path) -> None:
    square = tiny_vit(64, (96, 96), num_heads=1)
    torch.save(official_state_dict(square), tmp_path / "square.pth")
    torch.save({"teacher": official_state_dict(tiny_vit(64, num_heads=1, num_parts=2))}, tmp_path / "upright.pth")
    loaded = load_model(LoadConfig(checkpoint=tmp_path / "square.pth"), "mean")
    assert loaded.image_input.size_px == (256, 128)
    assert loaded.image_input.pixels.mean[0] == 0.485
    assert loaded.model.fusion == "mean"
    upright = load_model(LoadConfig(checkpoint=tmp_path / "upright.pth"), "cat")
    assert (upright.image_input.size_px, upright.backbone.num_parts) == ((64, 32), 2)
    assert "a backbone, ViT of width 64 and depth 2 with 2 parts" in upright.notes


def test_settings_that_the_user_gives_win_over_the_file(tmp_path: Path) -> None:
    path = supervised_file(tmp_path / "file.pth", random_model("mean", num_parts=0))
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    values = {"checkpoint": str(path), "model": HEADS, "num_parts": 2, "image_size_px": [128, 64], "pixels": pixels}
    loaded = load_model(build(LoadConfig, values), "cat")
    assert (loaded.backbone.num_parts, loaded.backbone.image_size) == (2, (128, 64))
    assert loaded.image_input.size_px == (128, 64)
    assert loaded.image_input.pixels.mean == (0.1, 0.2, 0.3)
