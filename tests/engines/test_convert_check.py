import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from passreid_ray.config import build
from passreid_ray.engines.convert_check import check_model, check_tensors
from passreid_ray.engines.convert_config import ConvertConfig
from passreid_ray.engines.convert_source import read_source
from passreid_ray.engines.embedding import embed
from passreid_ray.engines.loading import LoadConfig, load_model
from passreid_ray.errors import UserError
from passreid_ray.models import ReidModel, official_state_dict
from passreid_ray.models.config import ModelConfig
from passreid_ray.train.state_files import save_state
from tests.engines.checkpoint_files import MODEL, convert, own_run, unsupervised_file
from tests.models.test_reid_formats import random_model


def save_folder(tensors: dict[str, Tensor], folder: Path) -> None:
    save_state(folder, tensors, {})


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
    loaded = [load_model(LoadConfig(checkpoint=path, model=given), "cat").model for path in (source, output)]
    features = [embed(model, images_BCHW) for model in loaded]
    assert torch.equal(*features)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("a", torch.tensor([-0.0, 1.0])),
        ("a", torch.tensor([0.0, 1.0], dtype=torch.float64)),
        ("a", torch.tensor([[0.0, 1.0]])),
        ("b.c", None),
        ("other", torch.zeros(1)),
    ],
)
def test_a_draft_with_another_tensor_is_refused_by_its_name(tmp_path: Path, name: str, value: Tensor | None) -> None:
    written = {"a": torch.tensor([0.0, 1.0]), "b.c": torch.tensor([torch.nan])}
    for draft, save in ((tmp_path / "file.pth", torch.save), (tmp_path / "folder", save_folder)):
        save(written, draft)
        check_tensors(draft, written, tmp_path / "out")
        save({key: own for key, own in (written | {name: value}).items() if own is not None}, draft)
        with pytest.raises(UserError, match=rf"out: not written: {name} is not the same when it is read again"):
            check_tensors(draft, written, tmp_path / "out")


def test_a_draft_with_another_model_is_refused(tmp_path: Path) -> None:
    models = random_model(), random_model()
    paths = [unsupervised_file(tmp_path / f"{index}.pth", model) for index, model in enumerate(models)]
    source = read_source(ConvertConfig(model=ModelConfig(num_heads=3)), paths[0], "usl")
    assert check_model(paths[0], source, source.loaded.reid_model, paths[0]).largest_difference == 0
    with pytest.raises(UserError, match=r"not written: backbone\.\S+ is another in the model that is read again"):
        check_model(paths[1], source, source.loaded.reid_model, paths[1])


def test_a_draft_with_the_same_tensors_and_other_features_is_refused(tmp_path: Path) -> None:
    config = build(ModelConfig, {**MODEL, "trunk": "vit_base_patch16_clip_quickgelu_224"})
    model = ReidModel(config.build((64, 32), 3), fusion="cat", neck="single")
    path = unsupervised_file(tmp_path / "file.pth", model)
    source = read_source(ConvertConfig(model=config), path, "usl")
    assert not check_model(path, source, source.loaded.reid_model, path).is_told
    # Without its trunk, the model that is read again has another activation.
    other = config.model_copy(update={"trunk": "vit_base_patch16_clip_224"})
    source = dataclasses.replace(source, loaded=dataclasses.replace(source.loaded, model_config=other))
    with pytest.raises(UserError, match=r"features of the model that is read again differ by \d"):
        check_model(path, source, source.loaded.reid_model, path)


def test_a_backbone_is_checked_whatever_fusion_is_set(tmp_path: Path) -> None:
    path = tmp_path / "backbone.pth"
    torch.save(official_state_dict(random_model().backbone), path)
    _, said = convert(path, tmp_path / "new.pth", "released", fusion="mean")
    assert "largest difference 0" in said
