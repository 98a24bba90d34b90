import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from passreid_ray.errors import UserError
from passreid_ray.models import (
    ReidModel,
    classifier_of,
    load_reid_model,
    official_state_dict,
    official_supervised_state_dict,
    official_usl_state_dict,
)
from passreid_ray.models.reid_model import Neck, NeckFusion
from tests.models.golden_models import Golden, tiny_vit

VARIANTS: list[tuple[NeckFusion, Neck]] = [(f, n) for f in get_args(NeckFusion) for n in get_args(Neck)]
FIELDS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def random_model(fusion: NeckFusion = "cat", neck: Neck = "single", **settings: Any) -> ReidModel:
    """A model in which no tensor is zero or one by accident."""
    model = ReidModel(tiny_vit(**settings), fusion=fusion, neck=neck)
    for value in model.state_dict().values():
        value.copy_(torch.rand_like(value) + 0.1 if value.is_floating_point() else torch.tensor(7))
    return model


def assert_same(model: ReidModel, state: dict[str, Tensor]) -> None:
    held = model.state_dict()
    assert held.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(held[key], value), key


def copied(model: ReidModel) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def supervised_state(model: ReidModel) -> dict[str, Tensor]:
    """The weights under the keys of a supervised checkpoint, classifiers included."""
    state = {f"base.{key}": value for key, value in official_state_dict(model.backbone).items()}
    for index, name in enumerate(model.neck_names):
        values = model.get_submodule(name).state_dict()
        state |= {f"bottleneck{f'_{index}' if index else ''}.{field}": values[field] for field in FIELDS}
    classifier = torch.zeros(7, model.feature_width)
    return state | {"base.fc.weight": torch.zeros(4, 48), "classifier.weight": classifier}


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_an_unsupervised_checkpoint_file_round_trips_with_its_necks(
    tmp_path: Path, fusion: NeckFusion, neck: Neck
) -> None:
    source, path = random_model(fusion, neck), tmp_path / "checkpoint.pth.tar"
    torch.save({"state_dict": official_usl_state_dict(source), "epoch": 50, "best_mAP": 0.88}, path)
    model = ReidModel(tiny_vit(), fusion=fusion, neck=neck)
    report = load_reid_model(model, path)
    assert_same(model, source.state_dict())
    assert report.loaded == list(model.state_dict())
    assert (report.missing, report.unexpected, report.resized, report.skipped) == ([], [], [], [])
    assert str(report) == f"{len(report.loaded)} of {len(report.loaded)} tensors loaded; read from 'state_dict'"


def test_the_keys_of_an_unsupervised_checkpoint_are_the_references() -> None:
    backbone = [f"module.{key}" for key in Golden("finetune_cluster_vit").arrays["converted_keys"]]
    necks: dict[Neck, list[str]] = {"single": [""], "multi": ["", "_pt1", "_pt2", "_pt3"]}
    for neck, suffixes in necks.items():
        state = official_usl_state_dict(random_model(neck=neck))
        assert set(state) - set(backbone) == {f"module.bottleneck{s}.{field}" for s in suffixes for field in FIELDS}
        assert set(backbone) <= set(state)


def test_official_weights_are_copies() -> None:
    model = random_model()
    official_usl_state_dict(model)["module.bottleneck.weight"].zero_()
    assert model.get_parameter("bottleneck.weight").all()


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_a_supervised_checkpoint_loads_with_its_necks_and_without_its_classifiers(
    fusion: NeckFusion, neck: Neck
) -> None:
    source, model = random_model(fusion, neck), ReidModel(tiny_vit(), fusion=fusion, neck=neck)
    report = load_reid_model(model, supervised_state(source))
    assert_same(model, source.state_dict())
    assert (report.missing, report.unexpected) == ([], [])
    assert report.skipped == ["fc.weight", "classifier.weight"]


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_a_supervised_checkpoint_file_round_trips_with_its_necks_and_its_classifier(
    tmp_path: Path, fusion: NeckFusion, neck: Neck
) -> None:
    source, path = random_model(fusion, neck), tmp_path / "transformer_120.pth"
    classifier_CD = torch.randn(7, source.feature_width)
    torch.save(official_supervised_state_dict(source, classifier_CD), path)
    model = ReidModel(tiny_vit(), fusion=fusion, neck=neck)
    report = load_reid_model(model, path)
    assert_same(model, source.state_dict())
    assert (report.missing, report.unexpected, report.resized) == ([], [], [])
    assert report.skipped == ["classifier.weight"]
    read = classifier_of(path)
    assert read is not None
    assert torch.equal(read, classifier_CD)


@pytest.mark.parametrize(("fusion", "neck"), VARIANTS)
def test_the_keys_of_a_supervised_checkpoint_are_the_references(fusion: NeckFusion, neck: Neck) -> None:
    golden, variant = Golden("finetune_transreid"), f"{fusion}_{neck}"
    model = random_model(fusion, neck)
    state = official_supervised_state_dict(model, torch.zeros(7, model.feature_width))
    parameters = {*json.loads(str(golden.arrays[f"{variant}/grad_norms"])), *golden.arrays[f"{variant}/no_grad_params"]}
    buffers = {key for key in state if key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")}
    assert state.keys() - buffers == parameters - {"base.fc.weight", "base.fc.bias"}
    assert len(buffers) == 3 * len(model.neck_names)
    assert "classifier.weight" not in official_supervised_state_dict(model)


def test_a_classifier_of_another_width_is_not_written() -> None:
    with pytest.raises(UserError, match=r"expected \(classes, 96\) for these features, found \(7, 48\)"):
        official_supervised_state_dict(random_model("cat"), torch.zeros(7, 48))


def test_a_checkpoint_without_a_classifier_has_none_and_a_vector_is_no_classifier() -> None:
    assert classifier_of({"state_dict": official_usl_state_dict(random_model())}) is None
    with pytest.raises(UserError, match=r"checkpoint: classifier.weight is \(7,\), expected \(classes, width\)"):
        classifier_of({"classifier.weight": torch.zeros(7)})


def test_its_own_state_dict_loads(tmp_path: Path) -> None:
    source, model = random_model(neck="multi"), ReidModel(tiny_vit(), fusion="cat", neck="multi")
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    assert load_reid_model(model, tmp_path / "model.safetensors").missing == []
    assert_same(model, source.state_dict())


def test_a_pretraining_checkpoint_gives_the_backbone_the_reference_converts_it_to_and_leaves_the_necks() -> None:
    golden = Golden("finetune_cluster_vit")
    pairs = [line.split(" -> ") for line in golden.arrays["convert_mapping"]]
    weights = Golden("pass_forward_64x32").state("teacher_sd/")
    model = random_model()
    necks = {key: value for key, value in copied(model).items() if key.startswith("bottleneck")}
    report = load_reid_model(model, {"teacher": weights, "student": {}, "epoch": 3})
    assert_same(model, {f"backbone.{new}": weights[old] for old, new in pairs} | necks)
    assert report.missing == list(necks)
    assert "no necks in checkpoint, those of the model are unchanged" in report.notes


def test_a_plain_vit_with_a_neck_loads_with_mean_fusion() -> None:
    state = official_usl_state_dict(random_model("mean", num_parts=0))
    state["module.pos_embed"] = torch.cat([state.pop("module.cls_pos"), state["module.pos_embed"]], dim=1)
    model = ReidModel(tiny_vit(), fusion="mean", neck="single").eval()
    report = load_reid_model(model, state)
    assert report.missing == [
        f"backbone.{key}{j}{end}" for j in (1, 2, 3) for key, end in (("part_token", ""), ("part", "_pos"))
    ]
    assert torch.equal(model.get_buffer("bottleneck.running_mean"), state["module.bottleneck.running_mean"])
    # The part tokens are copies of CLS, so their mean is what the neck was trained on.
    images_BCHW = torch.randn(2, 3, 64, 32, generator=torch.Generator().manual_seed(0))
    tokens_BTD = model.backbone(images_BCHW)
    torch.testing.assert_close(tokens_BTD[:, 1:], tokens_BTD[:, :1].expand(-1, 3, -1))
    with pytest.raises(UserError, match=r"\(48,\) there and \(96,\) in the model; set fusion='mean'"):
        load_reid_model(ReidModel(tiny_vit(), fusion="cat", neck="single"), state)


def test_positions_of_another_size_are_resized() -> None:
    model = ReidModel(tiny_vit(image_size=(96, 32)), fusion="cat", neck="single")
    assert load_reid_model(model, official_usl_state_dict(random_model())).resized == ["backbone.pos_embed"]


def test_missing_batch_counters_are_no_reason_to_refuse() -> None:
    state = official_usl_state_dict(random_model())
    del state["module.bottleneck.num_batches_tracked"]
    report = load_reid_model(random_model(), state)
    assert report.missing == ["bottleneck.num_batches_tracked"]


def test_tensors_of_a_neck_that_the_model_does_not_know_are_reported() -> None:
    state = supervised_state(random_model(neck="multi"))
    report = load_reid_model(random_model(neck="multi"), state | {"bottleneck_4.weight": torch.zeros(48)})
    assert report.unexpected == ["bottleneck_4.weight"]


@pytest.mark.parametrize(
    ("stored", "built", "message"),
    [
        (
            ("cat", "multi"),
            ("cat", "single"),
            r"has a neck per token, 4 in all, the model a single one; set neck='multi'",
        ),
        (("cat", "single"), ("mean", "multi"), r"the model one per token; set neck='single' and fusion='cat'"),
        (("mean", "single"), ("mean", "multi"), r"the model one per token; set neck='single' and fusion='mean'"),
        (("cat", "single"), ("mean", "single"), r"is \(96,\) there and \(48,\) in the model; set fusion='cat'"),
        (("mean", "single"), ("cat", "single"), r"is \(48,\) there and \(96,\) in the model; set fusion='mean'"),
    ],
)
def test_necks_of_another_kind_are_refused_with_what_to_set_and_nothing_changes(
    stored: tuple[NeckFusion, Neck], built: tuple[NeckFusion, Neck], message: str
) -> None:
    model = random_model(*built)
    before = copied(model)
    with pytest.raises(UserError, match=f"checkpoint: .*{message}"):
        load_reid_model(model, {"state_dict": official_usl_state_dict(random_model(*stored))})
    assert_same(model, before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bottleneck_2.running_var": None}, r"necks are incomplete, 'bottleneck_pt2.running_var' is not there"),
        ({"bottleneck_2.weight": torch.zeros(5)}, r"bottleneck_pt2.weight is \(5,\) there and \(48,\) in the model"),
        ({"base.norm.weight": None}, r"backbone would stay incomplete"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(
    change: dict[str, Tensor | None], message: str
) -> None:
    changed = supervised_state(random_model(neck="multi")) | change
    model = random_model(neck="multi")
    before = copied(model)
    with pytest.raises(UserError, match=message):
        load_reid_model(model, {key: value for key, value in changed.items() if value is not None})
    assert_same(model, before)
