from argparse import Namespace
from pathlib import Path

import pytest
import torch

from passreid_ray.config import build
from passreid_ray.engines.embedding import embed
from passreid_ray.engines.loading import LoadConfig, load_model
from passreid_ray.engines.tuning_config import TuningConfig, build_model, start_classifier, with_start
from passreid_ray.errors import UserError
from passreid_ray.models.config import ModelConfig
from passreid_ray.models.reid_model import Neck, NeckFusion
from passreid_ray.train.state_files import load_state, tensors_below
from tests.engines.checkpoint_files import (
    VIEWS,
    assert_same_tensors,
    convert,
    own_pretraining,
    own_run,
    supervised_file,
    unsupervised_file,
)
from tests.models.test_reid_formats import VARIANTS, random_model


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


@pytest.mark.parametrize("form", ["own", "supervised", "usl"])
def test_a_backbone_gets_fresh_necks_only_when_they_are_chosen(tmp_path: Path, form: str) -> None:
    own_pretraining(tmp_path / "run")
    with pytest.raises(UserError, match=f"has no necks, and format={form} needs some: give fusion=cat or"):
        convert(tmp_path / "run", tmp_path / "out", form, fusion="cat")
    out, said = convert(tmp_path / "run", tmp_path / "out", form, fusion="cat", neck="multi")
    assert "the source has no necks, fresh ones are written: neck multi, fusion cat" in said
    loaded = load_model(LoadConfig(checkpoint=out, model=ModelConfig(num_heads=3)), "cat")
    state = loaded.model.state_dict()
    fresh = [value for key, value in state.items() if key.endswith("bottleneck_pt2.running_var")]
    assert torch.equal(fresh[0], torch.ones(48))


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


def test_nothing_that_is_there_is_replaced_unless_asked_for(tmp_path: Path) -> None:
    source = own_run(tmp_path / "run", random_model())
    for name, form in (("file.pth", "usl"), ("folder", "own")):
        output, _ = convert(source, tmp_path / name, form)
        with pytest.raises(UserError, match="is there; give another place, or overwrite=true"):
            convert(source, output, form)
        other = own_run(tmp_path / f"{form}_other", random_model())
        convert(other, output, form, overwrite=True)
        found = load_model(LoadConfig(checkpoint=output, model=ModelConfig(num_heads=3)), "cat").model.state_dict()
        assert_same_tensors(dict(found), tensors_below(load_state(other)[0], "model."))
    assert not list(tmp_path.glob(".part.*"))


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
@pytest.mark.parametrize("kind", ["supervised", "unsupervised"])
def test_a_public_tuned_file_keeps_its_features_and_its_images_as_a_folder(
    tmp_path: Path, kind: str, fusion: NeckFusion, neck: Neck
) -> None:
    model, images_BCHW = random_model(fusion, neck), torch.randn(2, 3, 64, 32)
    path = (supervised_file if kind == "supervised" else unsupervised_file)(tmp_path / "file.pth", model)
    own, _ = convert(path, tmp_path / "own", "own", fusion=fusion)
    before = load_model(LoadConfig(checkpoint=path, model=ModelConfig(num_heads=3)), fusion)
    after = load_model(LoadConfig(checkpoint=own), "cat")
    assert torch.equal(embed(before.model, images_BCHW), embed(after.model, images_BCHW))
    assert after.image_input == before.image_input


def test_a_failed_conversion_leaves_no_draft(tmp_path: Path) -> None:
    source = own_run(tmp_path / "run", random_model())
    with pytest.raises(UserError, match="only a pre-training checkpoint becomes format=pretraining"):
        convert(source, tmp_path / "out.pth", "pretraining")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
