import io
import runpy
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from passreid_ray.config import build
from passreid_ray.engines.convert import OWN_CLASSIFIER, ConvertConfig, backbone_of, run
from passreid_ray.engines.embedding import embed
from passreid_ray.engines.features import FeatureConfig, load_model
from passreid_ray.engines.tuning_config import TuningConfig, build_model, start_classifier, with_start
from passreid_ray.errors import UserError
from passreid_ray.models import (
    ReidModel,
    official_state_dict,
    official_supervised_state_dict,
    official_usl_state_dict,
)
from passreid_ray.models.config import HeadConfig, ModelConfig
from passreid_ray.models.reid_model import Neck, NeckFusion
from passreid_ray.train.state_files import load_state, save_state, tensors_below
from tests.models.golden_models import tiny_vit
from tests.models.test_reid_formats import VARIANTS, random_model

ROOT = Path(__file__).parents[2]
HEADS = {"num_heads": 3}
MODEL = {"trunk": "vit_tiny_patch16_224", "embed_dim": 48, "depth": 2, **HEADS}
VIEWS = {"image_size_px": [64, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def convert(source: Path, output: Path, form: str, **settings: Any) -> tuple[Path, str]:
    """The output, and what was said."""
    console = Console(record=True, soft_wrap=True, file=io.StringIO())
    values = {"checkpoint": str(source), "output": str(output), "format": form, "model": HEADS, **settings}
    return run(build(ConvertConfig, values), console), console.export_text()


def own_run(folder: Path, model: ReidModel, /, **config: Any) -> Path:
    """A tuning run's checkpoint of ``model``; with ``feature`` among the settings one of supervised tuning."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {"optimizer.exp_avg.a": torch.zeros(3), "optimizer.exp_avg.b": torch.zeros(3)}
    if "feature" in config:
        tensors[OWN_CLASSIFIER] = torch.randn(7, model.feature_width)
    neck = {"fusion": model.fusion, "neck": model.neck}
    settings = {"model": MODEL, "num_parts": model.backbone.num_parts, "neck": neck, "views": VIEWS, **config}
    save_state(folder, tensors, {"step": 12, "best_mAP": 0.5, "round": 3, "config": settings})
    return folder


def own_pretraining(folder: Path) -> Path:
    tensors = {"centers": torch.randn(4, 16), "optimizer.x": torch.zeros(2)}
    for who in ("student", "teacher"):
        head = HeadConfig(num_prototypes=16, hidden_dim=8, bottleneck_dim=4).build(48, 4)
        tensors |= {f"{who}.backbone.{key}": value for key, value in random_model().backbone.state_dict().items()}
        tensors |= {f"{who}.head.{key}": value for key, value in head.state_dict().items()}
    views = {"global_size_px": [64, 32], "num_parts": 3, "mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}
    save_state(folder, tensors, {"step": 12, "config": {"model": MODEL, "views": views}})
    return folder


def supervised_file(path: Path, model: ReidModel) -> Path:
    torch.save(official_supervised_state_dict(model, torch.randn(7, model.feature_width)), path)
    return path


def unsupervised_file(path: Path, model: ReidModel) -> Path:
    torch.save({"state_dict": official_usl_state_dict(model), "epoch": 9, "best_mAP": np.float64(0.75)}, path)
    return path


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_own_to_supervised_and_back_is_equal_to_the_bit(tmp_path: Path, fusion: NeckFusion, neck: Neck) -> None:
    source = own_run(tmp_path / "run" / "step_00000012", random_model(fusion, neck), feature="before")
    file, said = convert(tmp_path / "run", tmp_path / "transformer.pth", "supervised")
    assert "left out: optimizer (2)" in said
    back, _ = convert(file, tmp_path / "back", "own")
    expected, _ = load_state(source)
    del expected["optimizer.exp_avg.a"], expected["optimizer.exp_avg.b"]
    tensors, meta = load_state(back)
    assert_same_tensors(tensors, expected)
    assert meta["config"]["feature"] == "before"
    assert meta["config"]["neck"] == {"fusion": fusion, "neck": neck}
    assert meta["config"]["views"] == VIEWS
    assert meta["config"]["num_parts"] == 3


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_own_to_usl_and_back_is_equal_to_the_bit(tmp_path: Path, fusion: NeckFusion, neck: Neck) -> None:
    source = own_run(tmp_path / "run", random_model(fusion, neck))
    file, _ = convert(source, tmp_path / "checkpoint.pth.tar", "usl")
    content = torch.load(file, weights_only=True)
    assert content.keys() == {"state_dict", "epoch", "best_mAP"}
    assert (content["epoch"], content["best_mAP"]) == (3, 0.5)
    back, _ = convert(file, tmp_path / "back", "own", fusion=fusion)
    tensors, meta = load_state(back)
    assert_same_tensors(tensors_below(tensors, "model."), tensors_below(load_state(source)[0], "model."))
    assert "feature" not in meta["config"]
    assert (meta["round"], meta["best_mAP"]) == (3, 0.5)


def test_the_average_is_published_where_a_run_keeps_one(tmp_path: Path) -> None:
    source, average = own_run(tmp_path / "run", random_model(), feature="before"), random_model()
    tensors, meta = load_state(source)
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    save_state(source, tensors, {key: meta[key] for key in ("step", "config")})
    file, said = convert(source, tmp_path / "transformer.pth", "supervised")
    assert f"model ({len(average.state_dict())})" in said
    assert_same_tensors(
        official_supervised_state_dict(average),
        {key: value for key, value in torch.load(file, weights_only=True).items() if key != "classifier.weight"},
    )


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
    loaded = load_model(FeatureConfig(checkpoint=path, model=ModelConfig(num_heads=3)), fusion)
    assert torch.equal(embed(loaded.model, images_BCHW), expected_features(model, images_BCHW, kind))
    assert loaded.image_input.size_px == (64, 32)
    assert loaded.image_input.pixels.mean == loaded.image_input.pixels.std == (0.5, 0.5, 0.5)
    side = "before" if kind == "supervised" else "after"
    assert f"{kind} tuning, ViT of width 48 and depth 2 with 3 parts, 64x32 px, neck {neck}" in loaded.notes
    assert f"features {side} the neck" in loaded.notes
    own, _ = convert(path, tmp_path / "own", "own", fusion=fusion)
    again = load_model(FeatureConfig(checkpoint=own), "cat")
    assert torch.equal(embed(again.model, images_BCHW), expected_features(model, images_BCHW, kind))
    assert again.image_input == loaded.image_input


def test_a_fusion_that_no_file_tells_is_taken_from_the_settings_and_must_fit_a_neck(tmp_path: Path) -> None:
    path = unsupervised_file(tmp_path / "file.pth", random_model("mean", "multi"))
    config = FeatureConfig(checkpoint=path, model=ModelConfig(num_heads=3))
    loaded = load_model(config, "mean")
    assert loaded.model.fusion == "mean"
    assert "fusion mean (as set, the file does not tell it)" in loaded.notes
    with pytest.raises(UserError, match=r"file.pth: fusion: the file does not tell its own; .* found cls"):
        load_model(config, "cls")
    with pytest.raises(UserError, match=r"file.pth: its necks do not tell .* give fusion=cat or fusion=mean"):
        convert(path, tmp_path / "own", "own")
    assert not (tmp_path / "own").exists()


def test_a_backbone_needs_no_settings_and_a_square_one_is_given_upright_images(tmp_path: Path) -> None:
    square = tiny_vit(64, (96, 96), num_heads=1)
    torch.save(official_state_dict(square), tmp_path / "square.pth")
    torch.save({"teacher": official_state_dict(tiny_vit(64, num_heads=1, num_parts=2))}, tmp_path / "upright.pth")
    loaded = load_model(FeatureConfig(checkpoint=tmp_path / "square.pth"), "mean")
    assert loaded.image_input.size_px == (256, 128)
    assert loaded.image_input.pixels.mean[0] == 0.485
    assert loaded.model.fusion == "mean"
    upright = load_model(FeatureConfig(checkpoint=tmp_path / "upright.pth"), "cat")
    assert (upright.image_input.size_px, backbone_of(upright).num_parts) == ((64, 32), 2)
    assert "a backbone, ViT of width 64 and depth 2 with 2 parts" in upright.notes


def test_settings_that_the_user_gives_win_over_the_file(tmp_path: Path) -> None:
    path = supervised_file(tmp_path / "file.pth", random_model("mean", num_parts=0))
    pixels = {"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}
    values = {"checkpoint": str(path), "model": HEADS, "num_parts": 2, "image_size_px": [128, 64], "pixels": pixels}
    loaded = load_model(build(FeatureConfig, values), "cat")
    assert (backbone_of(loaded).num_parts, backbone_of(loaded).image_size) == (2, (128, 64))
    assert loaded.image_input.size_px == (128, 64)
    assert loaded.image_input.pixels.mean == (0.1, 0.2, 0.3)


def test_a_converted_checkpoint_starts_a_tuning_with_its_necks_and_classifier(tmp_path: Path) -> None:
    model = random_model("mean", "multi")
    file = supervised_file(tmp_path / "file.pth", model)
    own, _ = convert(file, tmp_path / "own", "own")
    config = with_start(
        build(
            TuningConfig,
            {
                "start": {"checkpoint": str(own), "necks": "loaded"},
                "views": {"image_size_px": [64, 32]},
                "neck": {"fusion": "mean", "neck": "multi"},
            },
        )
    )
    assert_same_tensors(dict(build_model(config)[0].state_dict()), dict(model.state_dict()))
    classifier_CD = start_classifier(own)
    assert classifier_CD is not None
    assert torch.equal(classifier_CD, torch.load(file, weights_only=True)["classifier.weight"])


def test_pretraining_is_written_with_both_networks_heads_and_centers_and_a_public_one_again(tmp_path: Path) -> None:
    tensors, _ = load_state(own_pretraining(tmp_path / "run"))
    file, said = convert(tmp_path / "run", tmp_path / "checkpoint.pth", "pretraining", epoch=5)
    content = torch.load(file, weights_only=True)
    assert "left out: optimizer" in said
    for who, prefix in (("student", "module."), ("teacher", "")):
        own = {prefix + key: value for key, value in tensors_below(tensors, f"{who}.").items()}
        assert_same_tensors(content[who], own)
    assert content["epoch"] == 5
    assert torch.equal(torch.cat(list(content["dino_loss"].values())), tensors["centers"])
    torch.save({**content, "optimizer": {}, "args": Namespace(arch="pass")}, tmp_path / "public.pth")
    again, said = convert(tmp_path / "public.pth", tmp_path / "clean.pth", "pretraining")
    assert "left out: optimizer, args" in said
    clean = torch.load(again, weights_only=True)
    assert clean.keys() == {"student", "teacher", "epoch", "dino_loss"}
    assert_same_tensors(clean["student"], content["student"])
    assert clean["epoch"] == 5


@pytest.mark.parametrize("weights", ["teacher", "student"])
@pytest.mark.parametrize("ending", [".pth", ".safetensors"])
def test_a_released_backbone_is_the_network_that_was_asked_for(tmp_path: Path, weights: str, ending: str) -> None:
    expected = tensors_below(load_state(own_pretraining(tmp_path / "run"))[0], f"{weights}.backbone.")
    public, _ = convert(tmp_path / "run", tmp_path / "checkpoint.pth", "pretraining")
    for name, source in (("own", tmp_path / "run"), ("public", public)):
        file, said = convert(source, tmp_path / f"{name}{ending}", "released", weights=weights)
        read = load_file(file) if ending == ".safetensors" else torch.load(file, weights_only=True)
        assert_same_tensors(read, expected)
        assert "largest difference 0" in said
        assert ("student" if weights == "teacher" else "teacher") in said.partition("left out:")[2].splitlines()[0]


@pytest.mark.parametrize("form", ["own", "supervised", "usl"])
def test_a_backbone_gets_fresh_necks_only_when_they_are_chosen(tmp_path: Path, form: str) -> None:
    own_pretraining(tmp_path / "run")
    with pytest.raises(UserError, match=f"has no necks, and format={form} needs some: give fusion=cat or"):
        convert(tmp_path / "run", tmp_path / "out", form, fusion="cat")
    out, said = convert(tmp_path / "run", tmp_path / "out", form, fusion="cat", neck="multi")
    assert "the source has no necks, fresh ones are written: neck multi, fusion cat" in said
    loaded = load_model(FeatureConfig(checkpoint=out, model=ModelConfig(num_heads=3)), "cat")
    state = loaded.model.state_dict()
    fresh = [value for key, value in state.items() if key.endswith("bottleneck_pt2.running_var")]
    assert torch.equal(fresh[0], torch.ones(48))


def test_necks_stay_behind_when_a_backbone_is_released(tmp_path: Path) -> None:
    model = random_model("mean", "multi")
    file, said = convert(unsupervised_file(tmp_path / "f.pth", model), tmp_path / "b.safetensors", "released")
    assert_same_tensors(load_file(file), official_state_dict(model.backbone))
    assert "bottleneck_pt3 (5)" in said


def test_what_a_public_file_cannot_tell_is_said(tmp_path: Path) -> None:
    views = {**VIEWS, "mean": [0.4, 0.4, 0.4]}
    source = own_run(tmp_path / "run", random_model("mean", "multi"), views=views)
    _, said = convert(source, tmp_path / "f.pth", "usl")
    assert "who reads it needs model.num_heads=3" in said
    assert "who reads it needs fusion=mean" in said
    assert "who reads it needs pixels.mean=[0.4, 0.4, 0.4] pixels.std=[0.5, 0.5, 0.5]" in said
    _, said = convert(source, tmp_path / "g.pth", "supervised")
    assert "are compared behind the necks, each token normalised, those of a supervised file before the neck" in said


def test_nothing_that_is_there_is_replaced_unless_asked_for(tmp_path: Path) -> None:
    source = own_run(tmp_path / "run", random_model())
    for name, form in (("file.pth", "usl"), ("folder", "own")):
        output, _ = convert(source, tmp_path / name, form)
        with pytest.raises(UserError, match="is there; give another place, or overwrite=true"):
            convert(source, output, form)
        other = own_run(tmp_path / f"{form}_other", random_model())
        convert(other, output, form, overwrite=True)
        found = load_model(FeatureConfig(checkpoint=output, model=ModelConfig(num_heads=3)), "cat").model.state_dict()
        assert_same_tensors(dict(found), tensors_below(load_state(other)[0], "model."))
    assert not list(tmp_path.glob(".part.*"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"output": "none"}, "output: must be given"),
        ({"checkpoint": "nowhere"}, "checkpoint: nowhere does not exist"),
        ({"format": "pretraining"}, "only a pre-training checkpoint becomes format=pretraining"),
        ({"format": "usl", "output": "x.safetensors"}, "only format=released is written as safetensors"),
        ({"format": "own", "fusion": "mean"}, "was tuned with cat, not mean"),
        ({"format": "own", "neck": "multi"}, "was tuned with single, not multi"),
        ({"format": "own", "model": "none"}, r"file.pth: model.num_heads: no file tells it"),
        ({"format": "own", "image_size_px": [96, 96]}, "its positions are those of 64x32 px"),
        ({"format": "own", "output": "."}, "is not empty and no checkpoint"),
        ({"format": "usl", "output": "."}, "is a folder; format=usl writes a file"),
        ({"format": "own", "output": "file.pth"}, "is the checkpoint itself"),
    ],
)
def test_what_does_not_fit_is_told_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    supervised_file(tmp_path / "file.pth", random_model())
    values = {"checkpoint": "file.pth", "format": "released", "output": "out.pth", "model": HEADS, **settings}
    with pytest.raises(UserError, match=message):
        run(build(ConvertConfig, values))
    assert [path.name for path in tmp_path.iterdir()] == ["file.pth"]


@pytest.mark.parametrize(
    ("changes", "needed"),
    [
        ({"trunk": "vit_base_patch16_clip_224"}, "model.trunk=vit_base_patch16_clip_224 model.embed_dim=48"),
        ({"trunk": "vit_base_patch16_clip_quickgelu_224"}, "model.trunk=vit_base_patch16_clip_quickgelu_224"),
        ({"official_pos_resize": True}, "model.official_pos_resize=true"),
    ],
)
def test_a_model_that_no_file_tells_is_said_with_the_settings_it_needs(
    tmp_path: Path, changes: dict[str, Any], needed: str
) -> None:
    backbone = build(ModelConfig, {**MODEL, **changes}).build((64, 32), 3)
    source = own_run(tmp_path / "run", ReidModel(backbone, fusion="cat", neck="single"), model={**MODEL, **changes})
    output, said = convert(source, tmp_path / "f.pth", "usl")
    assert needed in said.partition("kind of model: who reads it needs ")[2].splitlines()[0]
    assert "largest difference 0" in said
    images_BCHW, given = torch.randn(2, 3, 64, 32), build(ModelConfig, {**MODEL, **changes})
    loaded = [load_model(FeatureConfig(checkpoint=path, model=given), "cat").model for path in (source, output)]
    features = [embed(model, images_BCHW) for model in loaded]
    assert torch.equal(*features)


def test_tensors_that_no_model_has_are_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save(official_supervised_state_dict(random_model()) | {"base.fc.weight": torch.zeros(2)}, path)
    _, said = convert(path, tmp_path / "own", "own")
    assert "left out: fc" in said


def test_a_pickle_that_asks_for_more_than_data_is_refused(tmp_path: Path) -> None:
    torch.save({"model": random_model().state_dict(), "hook": Path}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth: refused, the file was not executed"):
        convert(tmp_path / "evil.pth", tmp_path / "out.pth", "released")


def test_the_job_converts_and_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, output = own_run(tmp_path / "run", random_model(), feature="before"), tmp_path / "new" / "f.pth"
    job = ROOT / "jobs" / "convert.py"
    monkeypatch.setattr(sys, "argv", [str(job), f"checkpoint={source}", "format=supervised", f"output={output}"])
    runpy.run_path(str(job), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["read", "written", "left out", "note", "checked"]
    assert "classifier of 7 classes" in lines[0]
    assert "equal to the bit" in lines[-1]
    assert output.is_file()
