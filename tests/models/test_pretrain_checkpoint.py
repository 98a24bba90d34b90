from pathlib import Path

import pytest
import torch

from passreid_ray.errors import UserError
from passreid_ray.models import (
    load_backbone,
    load_heads,
    official_head_state_dict,
    official_state_dict,
    pretrain_checkpoint,
    read_pretrain_checkpoint,
)
from tests.models.golden_models import Golden, golden_head, golden_vit

CENTERS_TK = torch.arange(12.0).reshape(4, 3)


@pytest.fixture
def golden() -> Golden:
    return Golden("pass_forward_64x32")


@pytest.fixture
def path(golden: Golden, tmp_path: Path) -> Path:
    content = pretrain_checkpoint(
        golden_vit(golden, "student_sd/"),
        golden_head(golden, "student_sd/"),
        golden_vit(golden, "teacher_sd/"),
        golden_head(golden, "teacher_sd/"),
        CENTERS_TK,
        epoch=5,
    )
    torch.save(content, tmp_path / "run.pth")
    return tmp_path / "run.pth"


def test_the_written_file_has_the_keys_and_values_of_the_reference(golden: Golden, path: Path) -> None:
    content = torch.load(path, weights_only=True)
    for who, prefix in (("student", "module."), ("teacher", "")):
        expected = {prefix + key: value for key, value in golden.state(f"{who}_sd/").items()}
        assert content[who].keys() == expected.keys()
        assert all(torch.equal(content[who][key], value) for key, value in expected.items())
    assert content["epoch"] == 5
    assert list(content["dino_loss"]) == ["center_cls", "center_pt1", "center_pt2", "center_pt3"]
    assert torch.equal(content["dino_loss"]["center_pt2"], CENTERS_TK[2:3])


def test_a_run_can_be_warm_started_from_its_pieces(golden: Golden, path: Path) -> None:
    read = read_pretrain_checkpoint(path)
    assert torch.equal(read.centers_TK, CENTERS_TK)
    assert read.epoch == 5
    for who, backbone, head in (
        ("student", read.student_backbone, read.student_head),
        ("teacher", read.teacher_backbone, read.teacher_head),
    ):
        other = "student" if who == "teacher" else "teacher"
        model, heads = golden_vit(golden, f"{other}_sd/"), golden_head(golden, f"{other}_sd/")
        assert len(load_backbone(model, backbone).loaded) == 37
        load_heads(heads, head)
        for key, value in official_state_dict(model).items():
            assert torch.equal(value, golden[f"{who}_sd/backbone.{key}"])
        for key, value in official_head_state_dict(heads).items():
            assert torch.equal(value, golden[f"{who}_sd/head.{key}"])


def test_the_same_file_gives_fine_tuning_the_teacher(golden: Golden, path: Path) -> None:
    model = golden_vit(golden, "student_sd/")
    report = load_backbone(model, path)
    assert len(report.skipped) == 32
    assert torch.equal(model.cls_token.detach(), golden["teacher_sd/backbone.cls_token"])


def test_a_file_without_a_student_or_centers_is_refused(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    with pytest.raises(UserError, match="it has no 'dino_loss'"):
        read_pretrain_checkpoint({key: value for key, value in content.items() if key != "dino_loss"})
    with pytest.raises(UserError, match="it has no 'student'"):
        read_pretrain_checkpoint(content["teacher"])
    with pytest.raises(UserError, match="expected centers center_cls, center_pt1"):
        read_pretrain_checkpoint(content | {"dino_loss": {"center_cls": CENTERS_TK[:1], "center_pt7": CENTERS_TK[:1]}})
