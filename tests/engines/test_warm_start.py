from pathlib import Path
from typing import Any

import pytest
import torch

from passreid_ray.engines.warm_start import WarmStartConfig, read_teacher, warm_start
from passreid_ray.errors import UserError
from passreid_ray.models import official_head_state_dict, official_state_dict, pretrain_checkpoint
from passreid_ray.models.config import HeadConfig, ModelConfig, build_pass_model
from passreid_ray.models.pass_model import PassModel
from passreid_ray.train.state_files import checkpoint_name, save_state


def model(
    seed: int, *, num_prototypes: int = 8, width: int = 24, num_parts: int = 3, patch_prototypes: int | None = None
) -> PassModel:
    torch.manual_seed(seed)
    backbone = ModelConfig(trunk="vit_tiny_patch16_224", embed_dim=width, depth=1, num_heads=2)
    head = HeadConfig(num_prototypes=num_prototypes, hidden_dim=8, bottleneck_dim=4)
    return build_pass_model(backbone, head, (64, 32), num_parts, patch_prototypes=patch_prototypes)


STUDENT, TEACHER = model(1), model(2)


@pytest.fixture
def released(tmp_path: Path) -> Path:
    """A released backbone: flat keys, no heads."""
    path = tmp_path / "released.pth"
    torch.save(official_state_dict(TEACHER.backbone), path)
    return path


@pytest.fixture
def pretraining(tmp_path: Path) -> Path:
    """A checkpoint of the reference's pre-training: student, teacher, heads, centers."""
    path = tmp_path / "checkpoint.pth"
    pieces = (STUDENT.backbone, STUDENT.head, TEACHER.backbone, TEACHER.head)
    torch.save(pretrain_checkpoint(*pieces, centers_TK=torch.zeros(4, 8), epoch=5), path)
    return path


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run of this project with an older checkpoint, of other weights, beside the newest."""
    for step, teacher in ((3, STUDENT), (12, TEACHER)):
        tensors = {f"student.{name}": value for name, value in STUDENT.state_dict().items()}
        tensors |= {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
        save_state(tmp_path / "run" / checkpoint_name(step), tensors | {"centers": torch.zeros(4, 8)}, {"step": step})
    return tmp_path / "run"


def started(path: Path, own: PassModel | None = None, **settings: Any) -> tuple[PassModel, float, str]:
    own = model(3) if own is None else own
    epochs, loaded = warm_start(own, WarmStartConfig(checkpoint=path, **settings))
    assert loaded is not None
    return own, epochs, loaded


def same(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


def test_without_a_checkpoint_nothing_happens() -> None:
    own = model(3)
    assert warm_start(own, WarmStartConfig()) == (0.0, None)
    assert same(own, model(3))


def test_a_released_backbone_is_loaded_and_the_heads_warm_up(released: Path) -> None:
    own, epochs, loaded = started(released)
    assert same(own.backbone, TEACHER.backbone)
    assert same(own.head, model(3).head)
    assert epochs == 1.0
    assert loaded.startswith(f"{released}: ")
    assert loaded.endswith("heads start at random")


def test_a_reference_pretraining_checkpoint_gives_the_teacher_and_its_heads(pretraining: Path) -> None:
    own, epochs, loaded = started(pretraining)
    assert same(own, TEACHER)
    assert epochs == 0.0
    assert loaded.endswith("heads loaded")


def test_a_run_folder_gives_the_teacher_of_its_newest_checkpoint(run_folder: Path) -> None:
    own, epochs, _ = started(run_folder)
    assert same(own, TEACHER)
    assert epochs == 0.0
    backbone, head, patches = read_teacher(run_folder)
    assert backbone.keys() == TEACHER.backbone.state_dict().keys()
    assert head.keys() == TEACHER.head.state_dict().keys()
    assert not patches


def test_a_checkpoint_folder_gives_its_own_weights(run_folder: Path) -> None:
    assert same(started(run_folder / checkpoint_name(3))[0], STUDENT)


@pytest.mark.parametrize("kind", ["pretraining", "run_folder"])
def test_heads_of_another_size_start_at_random_and_warm_up(kind: str, request: pytest.FixtureRequest) -> None:
    own, epochs, loaded = started(request.getfixturevalue(kind), model(3, num_prototypes=16))
    assert same(own.backbone, TEACHER.backbone)
    assert same(own.head, model(3, num_prototypes=16).head)
    assert epochs == 1.0
    assert loaded.endswith("heads start at random")


@pytest.mark.parametrize("kind", ["pretraining", "run_folder"])
def test_a_patch_head_that_the_checkpoint_lacks_starts_at_random_and_warms_up(
    kind: str, request: pytest.FixtureRequest
) -> None:
    own, epochs, loaded = started(request.getfixturevalue(kind), model(3, patch_prototypes=6))
    assert same(own.head, TEACHER.head)
    assert epochs == 1.0
    assert loaded.endswith("heads loaded; the patch head starts at random")


def test_a_patch_head_of_the_same_size_is_loaded(tmp_path: Path) -> None:
    teacher = model(2, patch_prototypes=6)
    tensors = {f"teacher.{name}": value for name, value in teacher.state_dict().items()}
    save_state(tmp_path / checkpoint_name(1), tensors, {"step": 1})
    own, epochs, loaded = started(tmp_path, model(3, patch_prototypes=6))
    assert same(own, teacher)
    assert (epochs, loaded.endswith("heads loaded")) == (0.0, True)
    other, epochs, _ = started(tmp_path, model(3, patch_prototypes=7))
    assert same(other.head, teacher.head)
    assert epochs == 1.0


@pytest.mark.parametrize("epochs", [0.0, 2.5])
def test_the_warm_up_of_the_heads_can_be_given(released: Path, pretraining: Path, epochs: float) -> None:
    for path in (released, pretraining):
        assert started(path, head_warmup_epochs=epochs)[1] == epochs


def fails(own: PassModel, path: Path) -> str:
    before = {name: value.clone() for name, value in own.state_dict().items()}
    with pytest.raises(UserError) as error:
        warm_start(own, WarmStartConfig(checkpoint=path))
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())
    return str(error.value)


def test_a_file_that_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello")
    assert fails(model(3), path).startswith(f"warm_start.checkpoint: {path}: not a readable torch checkpoint")


def test_a_path_without_anything_is_told(tmp_path: Path) -> None:
    assert fails(model(3), tmp_path / "x.pth") == f"warm_start.checkpoint: {tmp_path}/x.pth does not exist"
    assert "no checkpoint found" in fails(model(3), tmp_path)


def test_a_checkpoint_of_something_else_is_told(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    assert fails(model(3), path).startswith(f"warm_start.checkpoint: {path}: the backbone would stay incomplete")


@pytest.mark.parametrize("kind", ["released", "pretraining", "run_folder"])
def test_another_size_or_number_of_parts_is_told(kind: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(kind)
    assert "has 3 part tokens, the model 2; build it with num_parts=3" in fails(model(3, num_parts=2), path)
    assert "in the model; build the model with the checkpoint's trunk, embed_dim" in fails(model(3, width=48), path)


def test_two_kinds_of_weights_at_once_are_refused(released: Path) -> None:
    with pytest.raises(UserError, match="warm_start: give checkpoint or timm, not both"):
        WarmStartConfig(checkpoint=released, timm=str(released)).check()


def test_official_heads_alone_are_no_backbone(tmp_path: Path) -> None:
    path = tmp_path / "heads.pth"
    torch.save({f"head.{name}": value for name, value in official_head_state_dict(TEACHER.head).items()}, path)
    assert "the backbone would stay incomplete" in fails(model(3), path)
