from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from passreid_ray.config import (
    Section,
    UserPath,
    assignments,
    build,
    describe,
    load_config,
    overridden,
    read_preset,
    to_toml,
)
from passreid_ray.errors import UserError


class Folder(Section):
    """Images below a folder."""

    kind: Literal["folder"] = "folder"
    root: Path
    """Where they are."""


class Made(Section):
    """Made-up images."""

    kind: Literal["made"] = "made"
    num_people: int = Field(default=4, ge=2)
    """How many people."""


Source = Annotated[Folder | Made, Field(discriminator="kind")]


class Optimizer(Section):
    """How weights change."""

    lr: float = Field(default=0.1, gt=0, le=1)
    """Learning rate."""
    clip_norm: float | None = 3.0
    """Largest gradient; none: no clipping."""
    mode: Literal["a", "b"] = "a"


class Model(Section):
    size_px: tuple[int, int] = (4, 2)
    use_gpu: bool | Literal["auto"] = "auto"
    low: int = 0
    high: int = 9

    @model_validator(mode="after")
    def _ordered(self) -> "Model":
        if self.low > self.high:
            raise ValueError(f"low: expected at most {self.high}")
        return self


class Job(Section):
    epochs: int = 3
    """Passes
    over the ``data``."""
    name: str = "a"
    output: UserPath = Path("outputs")
    data: Source = Made()
    """What to learn from."""
    other: Source | None = None
    extra: list[Source] = Field(default_factory=list)
    optimizer: Optimizer = Optimizer()
    model: Model = Model()


def load(*arguments: str, presets: Path | None = None) -> Job:
    return load_config(Job, arguments, presets=presets)


def message(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        load(*arguments)
    return str(error.value)


def test_without_arguments_the_defaults_hold() -> None:
    assert load() == Job()


def test_a_preset_changes_defaults_and_the_command_line_changes_both(tmp_path: Path) -> None:
    preset = tmp_path / "p.toml"
    preset.write_text("epochs = 5\n[optimizer]\nlr = 0.5\nmode = 'b'\n")
    job = load(str(preset), "optimizer.lr=0.25", "--name=b")
    assert (job.epochs, job.optimizer.lr, job.optimizer.mode, job.name) == (5, 0.25, "b", "b")


@pytest.mark.parametrize("name", ["small", "small.toml"])
def test_a_preset_of_the_job_is_found_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / "small.toml").write_text("epochs = 1")
    assert load(name, presets=tmp_path).epochs == 1


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("name=two words", "two words"),
        ("name='7'", "7"),
        ("name=a=b", "a=b"),
        ("name=", ""),
        ("name=/x/y.txt", "/x/y.txt"),
    ],
)
def test_text_needs_no_quotes(argument: str, expected: str) -> None:
    assert load(argument).name == expected


def test_the_word_none_takes_an_optional_value_away() -> None:
    job = load("optimizer.clip_norm=none", "other.kind=made", "name=none")
    assert job.optimizer.clip_norm is None
    assert job.name == "none"
    assert load("other=none").other is None


def test_the_home_folder_is_put_in_for_a_tilde() -> None:
    assert load("output=~/x").output == Path.home() / "x"


def test_another_kind_replaces_the_section_in_whatever_order_it_is_typed() -> None:
    assert load("data.root=/x", "data.kind=folder").data == Folder(root=Path("/x"))


def test_a_preset_of_another_kind_replaces_the_section(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("[data]\nkind = 'folder'\nroot = '/x'\n")
    assert load(str(tmp_path / "p.toml")).data == Folder(root=Path("/x"))


def test_settings_of_list_items_are_reached_by_their_position() -> None:
    job = load('extra=[{kind="made"}, {kind="folder", root="/x"}]', "extra.0.num_people=7")
    assert job.extra == [Made(num_people=7), Folder(root=Path("/x"))]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("data.kind=folder", 'data.root=/a "b"', "other.kind=made", "epochs=7"),
        ("optimizer.clip_norm=none", 'extra=[{kind="folder", root="/ü"}]', "optimizer.lr=1e-6"),
    ],
)
def test_written_settings_are_read_back_the_same(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    job = load(*arguments)
    (tmp_path / "job.toml").write_text(to_toml(job), encoding="utf-8")
    assert load(str(tmp_path / "job.toml")) == job
    assert build(Job, read_preset(str(tmp_path / "job.toml"))) == job


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: no such setting; did you mean optimizer.lr?"),
        ("epoch=1", "epoch: no such setting; did you mean epochs?"),
        ("clip_norm=1", "clip_norm: no such setting; did you mean optimizer.clip_norm?"),
        ("optimizer.zzz=1", "optimizer.zzz: no such setting; known here: clip_norm, lr, mode"),
        ("data.num_peple=1", "data.num_peple: no such setting; did you mean data.num_people?"),
        (
            "data.root=/x",
            "data.root: no such setting where data.kind=made; it goes with data.kind=folder",
        ),
        ("epochs=many", "epochs: expected a whole number, got 'many'"),
        ("epochs=1.5", "epochs: expected a whole number, got 1.5"),
        ("epochs.x=1", "epochs.x: epochs is a value, not a section"),
        ("name=3", "name: expected text in quotes, got 3"),
        ("optimizer.lr=fast", "optimizer.lr: expected a number, got 'fast'"),
        ("optimizer.lr=0", "optimizer.lr: expected more than 0, got 0"),
        ("optimizer.lr=2", "optimizer.lr: expected at most 1, got 2"),
        ("optimizer.clip_norm=x", "optimizer.clip_norm: expected a number or none, got 'x'"),
        ("optimizer.mode=c", "optimizer.mode: expected 'a' or 'b', got 'c'"),
        ("optimizer=3", "optimizer: expected a section, with settings such as optimizer.lr, got 3"),
        ("model.use_gpu=maybe", "model.use_gpu: expected true or false or 'auto', got 'maybe'"),
        ("model.size_px=3", "model.size_px: expected a list such as [1, 2], got 3"),
        ("model.size_px=[3]", "model.size_px: too few values, got [3]"),
        ("model.size_px=[1, 2, 3]", "model.size_px: expected 2 values, got [1, 2, 3]"),
        ('model.size_px=[1, "b"]', "model.size_px.1: expected a whole number, got 'b'"),
        ("model.low=10", "model.low: expected at most 9"),
        ("data.num_people=1", "data.num_people: expected at least 2, got 1"),
        ("data.kind=lmdb", "data.kind: 'lmdb' is none of 'folder', 'made'"),
        ("data.kind=folder", "data.root: must be given"),
        ("other.num_people=3", "other.kind: must be given: one of folder, made"),
        ('extra=[{kind="made", num_peple=1}]', "extra.0.num_peple: no such setting; did you mean extra.0.num_people?"),
        ("extra.0.root=/x", "extra.0: the list is empty; give the whole list"),
        ("=3", "'=3': expected section.key=value"),
        ("--epochs", "--epochs: settings are given as section.key=value, such as epochs=3; --help lists them"),
        ("nowhere", "nowhere: no such preset file. Settings are given as section.key=value"),
    ],
)
def test_a_mistake_is_told_in_one_line_in_the_words_of_the_settings(argument: str, expected: str) -> None:
    assert message(argument) == expected


def test_every_wrong_key_has_its_line() -> None:
    assert len(message("epochs=x", "optimizer.lr=x", "nam=3").splitlines()) == 3


def test_a_long_value_is_shortened_in_the_message() -> None:
    assert len(message(f"epochs={'x' * 1000}")) < 150


def test_two_presets_are_refused() -> None:
    assert message("a.toml", "b.toml").startswith("expected at most one preset")


@pytest.mark.parametrize(
    ("name", "told"),
    [("big", "sweep_large, usl_large, usl_small"), ("usl_big", "usl_large, usl_small")],
)
def test_a_preset_that_is_not_there_is_told_with_those_of_its_job(name: str, told: str, tmp_path: Path) -> None:
    for known in ("usl_small", "sweep_large", "usl_large"):
        (tmp_path / f"{known}.toml").touch()
    with pytest.raises(UserError, match=rf"{name}: no such preset file; there are {told}\."):
        load(name, presets=tmp_path)


@pytest.mark.parametrize("content", [b"epochs = = 3", b"\xff\xfe"])
def test_a_preset_that_is_no_toml_is_told_with_its_path(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "p.toml"
    path.write_bytes(content)
    assert message(str(path)).startswith(f"{path}: not valid TOML: ")


def test_a_wrong_key_in_a_preset_is_told(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_text("[data]\nkind = 'folder'\nroot = '/x'\nrot = 3\n")
    assert message(str(tmp_path / "p.toml")) == "data.rot: no such setting; did you mean data.root?"


def test_every_setting_is_described_once_with_its_default_and_meaning() -> None:
    sections = {section.name: section for section in describe(Job)}
    assert list(sections) == [
        "", "data", "data.kind=folder", "data.kind=made", "other", "optimizer", "model",
    ]  # fmt: skip
    top = {setting.key: setting for setting in sections[""].settings}
    assert (top["epochs"].default, top["epochs"].meaning) == ("3", "Passes over the data.")
    assert top["extra"].default == "[]"
    assert [setting.key for setting in sections["optimizer"].settings] == [
        "optimizer.lr", "optimizer.clip_norm", "optimizer.mode",
    ]  # fmt: skip
    assert sections["optimizer"].meaning == "How weights change."


def test_the_kinds_of_a_section_are_described_where_they_come_first() -> None:
    sections = {section.name: section for section in describe(Job)}
    assert sections["data"].meaning == "What to learn from."
    assert [(s.key, s.default, s.meaning) for s in sections["data"].settings] == [
        ("data.kind", "made", "One of folder, made.")
    ]
    assert [(s.key, s.default) for s in sections["data.kind=folder"].settings] == [("data.root", "")]
    assert [(s.key, s.default, s.meaning) for s in sections["other"].settings] == [
        ("other.kind", "none", "One of folder, made; see data.")
    ]


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Job().epochs = 4  # pyright: ignore[reportAttributeAccessIssue]


def test_nested_values_become_what_a_command_line_would_say() -> None:
    values = {"epochs": 5, "optimizer": {"lr": 0.5, "clip_norm": None}, "name": "b c"}
    typed = assignments(values)
    assert typed == ["epochs=5", "optimizer.lr=0.5", 'optimizer.clip_norm="none"', 'name="b c"']
    job = overridden(Job, {"epochs": 4}, typed)
    assert (job.epochs, job.optimizer.lr, job.optimizer.clip_norm, job.name) == (5, 0.5, None, "b c")


def test_values_that_are_laid_over_are_left_as_they_were() -> None:
    values = {"optimizer": {"lr": 0.5}}
    assert overridden(Job, values, ["optimizer.lr=0.2"]).optimizer.lr == 0.2
    assert values == {"optimizer": {"lr": 0.5}}


class Weighted(Section):
    weights: list[float] = Field(default=[1.0, 2.0])
    notes: dict[str, float] = Field(default={})


def test_one_number_of_a_list_can_be_given() -> None:
    assert load_config(Weighted, ["weights.1=5"]).weights == [1.0, 5.0]
    with pytest.raises(UserError, match="weights: expected a position from 0 to 1, got '2'"):
        load_config(Weighted, ["weights.2=5"])


def test_a_key_with_dots_survives_being_written(tmp_path: Path) -> None:
    config = Weighted(notes={"a.b": 1.0, "c d": 2.0})
    (tmp_path / "again.toml").write_text(to_toml(config), encoding="utf-8")
    assert load_config(Weighted, [str(tmp_path / "again.toml")]) == config
