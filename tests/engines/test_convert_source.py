from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from passreid_ray.errors import UserError
from passreid_ray.models import official_state_dict, official_supervised_state_dict
from passreid_ray.train.state_files import load_state, save_state, tensors_below
from tests.engines.checkpoint_files import (
    assert_same_tensors,
    convert,
    own_pretraining,
    own_run,
    supervised_file,
    unsupervised_file,
)
from tests.models.test_reid_formats import random_model


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


def test_necks_stay_behind_when_a_backbone_is_released(tmp_path: Path) -> None:
    model = random_model("mean", "multi")
    file, said = convert(unsupervised_file(tmp_path / "f.pth", model), tmp_path / "b.safetensors", "released")
    assert_same_tensors(load_file(file), official_state_dict(model.backbone))
    assert "bottleneck_pt3 (5)" in said


def test_tensors_that_no_model_has_are_left_out_and_named(tmp_path: Path) -> None:
    path = tmp_path / "file.pth"
    torch.save(official_supervised_state_dict(random_model()) | {"base.fc.weight": torch.zeros(2)}, path)
    _, said = convert(path, tmp_path / "own", "own")
    assert "left out: fc" in said


def test_a_pickle_that_asks_for_more_than_data_is_refused(tmp_path: Path) -> None:
    torch.save({"model": random_model().state_dict(), "hook": Path}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil.pth: refused, the file was not executed"):
        convert(tmp_path / "evil.pth", tmp_path / "out.pth", "released")


def test_necks_that_do_not_tell_their_fusion_ask_for_it(tmp_path: Path) -> None:
    path = unsupervised_file(tmp_path / "file.pth", random_model("mean", "multi"))
    with pytest.raises(UserError, match=r"file.pth: its necks do not tell .* give fusion=cat or fusion=mean"):
        convert(path, tmp_path / "own", "own")
    assert not (tmp_path / "own").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_float32_with_its_classifier_and_that_is_said(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    state = torch.load(supervised_file(tmp_path / "full.pth", random_model()), weights_only=True)
    half = {key: value.to(dtype) if value.is_floating_point() else value for key, value in state.items()}
    torch.save(half, tmp_path / "half.pth")
    file, said = convert(tmp_path / "half.pth", tmp_path / "new.pth", "supervised")
    note = f"the source has tensors of {str(dtype).removeprefix('torch.')}, they are written as float32"
    assert note in said
    expected = {key: value.float() if value.is_floating_point() else value for key, value in half.items()}
    assert_same_tensors(torch.load(file, weights_only=True), expected)
    _, said = convert(tmp_path / "full.pth", tmp_path / "own", "own")
    assert "float32" not in said


def test_a_half_precision_pretraining_becomes_float32_with_its_centers(tmp_path: Path) -> None:
    full, _ = convert(own_pretraining(tmp_path / "run"), tmp_path / "full.pth", "pretraining")
    content = torch.load(full, weights_only=True)
    half = {key: {name: value.half() for name, value in content[key].items()} for key in content if key != "epoch"}
    torch.save({**half, "epoch": 3}, tmp_path / "half.pth")
    file, said = convert(tmp_path / "half.pth", tmp_path / "new.pth", "pretraining")
    assert "tensors of float16, they are written as float32" in said
    written = torch.load(file, weights_only=True)
    for key, values in half.items():
        assert_same_tensors(written[key], {name: value.float() for name, value in values.items()})


def test_a_classifier_that_is_kept_is_not_said_to_be_left_out(tmp_path: Path) -> None:
    _, said = convert(supervised_file(tmp_path / "file.pth", random_model()), tmp_path / "own", "own")
    read, left_out = said.splitlines()[0], said.splitlines()[2]
    assert "not in the model: 1 of heads, necks or classifiers" in read
    assert "classifier of 7 classes" in read
    assert left_out == "left out: nothing"
