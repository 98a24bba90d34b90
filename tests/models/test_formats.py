from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.models import LoadReport, PartViT, load_backbone, official_state_dict
from tests.models.golden_models import Golden, tiny_vit

PARTS = ["part_token1", "part1_pos", "part_token2", "part2_pos", "part_token3", "part3_pos"]
HEAD = {"mlp_cls.0.weight": torch.zeros(2, 2), "last_layer_pt1.weight_g": torch.zeros(2, 1)}


def random_state(**settings: Any) -> dict[str, Tensor]:
    """A backbone in which no tensor is zero or one by accident."""
    state = official_state_dict(tiny_vit(**settings))
    return {key: torch.rand_like(value) + 0.1 if value.is_floating_point() else value for key, value in state.items()}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def without_parts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same backbone as a plain ViT has it: no part tokens, the position of CLS in the first slot."""
    plain = {key: value for key, value in state.items() if key not in PARTS}
    return plain | {"pos_embed": torch.cat([plain.pop("cls_pos"), plain["pos_embed"]], dim=1)}


def assert_holds(model: PartViT, state: dict[str, Tensor]) -> None:
    held = official_state_dict(model)
    assert held.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(held[key], value), key


def assert_complete(report: LoadReport, state: dict[str, Tensor], num_skipped: int) -> None:
    assert report.loaded == list(state)
    assert (report.missing, report.unexpected, report.resized) == ([], [], [])
    assert len(report.skipped) == num_skipped


def test_a_pretraining_checkpoint_gives_the_teacher() -> None:
    student, teacher = random_state(), random_state()
    source = {
        "student": prefixed(student, "module.backbone.") | prefixed(HEAD, "module.head."),
        "teacher": prefixed(teacher, "backbone.") | prefixed(HEAD, "head."),
        "optimizer": {"state": {}},
        "epoch": 3,
        "dino_loss": {"center_cls": torch.zeros(1, 4)},
    }
    model = tiny_vit()
    report = load_backbone(model, source)
    assert_holds(model, teacher)
    assert_complete(report, teacher, num_skipped=2)
    told = "37 of 37 tensors loaded; read from 'teacher'; not in the model: 2 of heads, necks or classifiers"
    assert str(report) == told
    del source["teacher"]
    assert "read from 'student'" in str(load_backbone(model, source))
    assert_holds(model, student)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_released_backbone_file_round_trips(tmp_path: Path, suffix: str) -> None:
    state, path = random_state(), tmp_path / f"pass_vit_small_full{suffix}"
    if suffix == ".pth":
        torch.save(state, path)
    else:
        save_file(state, path)
    model = tiny_vit()
    assert_complete(load_backbone(model, path), state, num_skipped=0)
    assert_holds(model, state)
    assert_complete(load_backbone(tiny_vit(), official_state_dict(model)), state, num_skipped=0)


def test_a_supervised_checkpoint_loads_without_its_necks_and_classifiers() -> None:
    state = random_state()
    necks = {f"bottleneck{suffix}.weight": torch.zeros(48) for suffix in ("", "_1", "_2", "_3")}
    source = prefixed(state, "base.") | {"base.fc.weight": torch.zeros(4, 48), "classifier.weight": torch.zeros(4, 96)}
    model = tiny_vit()
    assert_complete(load_backbone(model, source | necks), state, num_skipped=6)
    assert_holds(model, state)


def test_an_unsupervised_checkpoint_loads_without_its_necks() -> None:
    state = random_state()
    necks = {f"module.bottleneck{suffix}.weight": torch.zeros(48) for suffix in ("", "_pt1", "_pt2", "_pt3")}
    source = {"state_dict": prefixed(state, "module.") | necks, "epoch": 50, "best_mAP": 0.88}
    model = tiny_vit()
    assert_complete(load_backbone(model, source), state, num_skipped=4)
    assert_holds(model, state)


@pytest.mark.parametrize("prefix", ["", "base.", "module.backbone."])
def test_a_checkpoint_without_part_tokens_fills_them_from_cls(prefix: str) -> None:
    state = random_state()
    model = tiny_vit()
    report = load_backbone(model, prefixed(without_parts(state), prefix))
    for part in (1, 2, 3):
        state[f"part_token{part}"], state[f"part{part}_pos"] = state["cls_token"], state["cls_pos"]
    assert_holds(model, state)
    assert report.missing == PARTS
    assert report.loaded == [key for key in state if key not in PARTS]
    assert "31 of 37 tensors loaded; 3 part tokens not in checkpoint, copied from CLS" in str(report)


@pytest.mark.parametrize("cut", [False, True], ids=["part tokens", "no part tokens"])
def test_the_convolutional_stem_loads_with_its_running_statistics(cut: bool) -> None:
    state = random_state(width=24, stem="ics")
    model = tiny_vit(24, stem="ics")
    report = load_backbone(model, prefixed(without_parts(state) if cut else state, "base."))
    held = official_state_dict(model)
    assert all(torch.equal(held[key], state[key]) for key in state if key not in PARTS)
    assert report.missing == (PARTS if cut else [])
    assert "patch_embed.conv.4.BN.running_var" in report.loaded
    assert list(held) == list(Golden("pass_oursvit_ibn_stem").state("student_sd_before/backbone."))


def test_missing_batch_counters_are_no_reason_to_refuse() -> None:
    state = random_state(width=24, stem="ics")
    counters = [key for key in state if key.endswith("num_batches_tracked")]
    report = load_backbone(tiny_vit(24, stem="ics"), {key: state[key] for key in state if key not in counters})
    assert report.missing == counters


@pytest.mark.parametrize("parts", [True, False], ids=["PASS", "plain ViT"])
def test_positions_of_another_size_are_resized_bilinearly(parts: bool) -> None:
    state = random_state(image_size=(64, 32))
    model = tiny_vit(image_size=(96, 32))
    report = load_backbone(model, state if parts else without_parts(state))
    table_1DHW = state["pos_embed"].reshape(1, 4, 2, 48).permute(0, 3, 1, 2)
    expected_1DHW = F.interpolate(table_1DHW, (6, 2), mode="bilinear", align_corners=False)
    torch.testing.assert_close(model.pos_embed.detach(), expected_1DHW.flatten(2).transpose(1, 2))
    assert report.resized == ["pos_embed"]
    assert "pos_embed" in report.loaded
    assert "positions resized from 4x2 to 6x2 patches" in str(report)


def test_a_table_without_a_slot_for_cls_gives_cls_no_position() -> None:
    state = without_parts(random_state())
    state["pos_embed"] = state["pos_embed"][:, 1:]
    model = tiny_vit()
    load_backbone(model, state)
    assert not model.cls_pos.any()
    assert torch.equal(model.pos_embed, state["pos_embed"])


def test_unknown_tensors_are_reported_and_the_rest_is_loaded() -> None:
    state = random_state()
    report = load_backbone(tiny_vit(), state | {"sie_embed": torch.zeros(3, 1, 48)})
    assert report.unexpected == ["sie_embed"]
    assert "1 unexpected tensors, the first is 'sie_embed'" in str(report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": None}, r"would stay incomplete, 1 of 37 tensors are not there, the first is 'norm.weight'"),
        ({"part_token3": None, "part3_pos": None}, r"has 2 part tokens, the model 3; build it with num_parts=2"),
        ({"part1_pos": None}, r"the first is 'part1_pos'"),
        ({"norm.weight": torch.zeros(24)}, r"norm.weight is \(24,\) there and \(48,\) in the model"),
        ({"patch_embed.proj.weight": torch.zeros(48, 64, 8, 8)}, r"the checkpoint's stem and patch size"),
        ({"pos_embed": torch.zeros(1, 11, 48)}, r"pos_embed has 11 positions"),
        ({"pos_embed": torch.zeros(1, 11, 48), "cls_pos": None}, r"no grid of patches with or without CLS"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(
    change: dict[str, Tensor | None], message: str
) -> None:
    source = {key: value for key, value in (random_state() | change).items() if value is not None}
    model = tiny_vit()
    before = official_state_dict(model)
    with pytest.raises(UserError, match=message):
        load_backbone(model, source)
    assert_holds(model, before)


def test_a_foreign_checkpoint_is_refused_with_examples_of_its_keys() -> None:
    with pytest.raises(UserError, match=r"37 of 37 tensors.*found keys like 'conv1.weight'"):
        load_backbone(tiny_vit(num_parts=3), {"conv1.weight": torch.zeros(1), "epoch": 3})
    with pytest.raises(UserError, match="none that hold a tensor"):
        load_backbone(tiny_vit(), {"epoch": 3})
