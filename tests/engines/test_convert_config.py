from pathlib import Path

import pytest

from passreid_ray.config import build
from passreid_ray.engines.convert_config import ConvertConfig, Format, check_output, required
from passreid_ray.errors import UserError
from passreid_ray.train.state_files import save_state


@pytest.mark.parametrize("missing", ["checkpoint", "format", "output"])
def test_a_setting_that_must_be_given_is_asked_for_by_name(missing: str) -> None:
    given = {"checkpoint": "run", "format": "own", "output": "new"}
    assert required(build(ConvertConfig, given)) == (Path("run"), "own", Path("new"))
    with pytest.raises(UserError, match=f"^{missing}: must be given"):
        required(build(ConvertConfig, given | {missing: "none"}))


@pytest.mark.parametrize(
    ("checkpoint", "form", "output", "message"),
    [
        ("nowhere", "usl", "new.pth", "checkpoint: .*nowhere does not exist"),
        ("file.pth", "usl", "new.safetensors", "only format=released is written as safetensors"),
        ("file.pth", "own", "full", "is not empty and no checkpoint"),
        ("file.pth", "own", "other.pth", "is a file; format=own writes a folder"),
        ("file.pth", "usl", "full", "is a folder; format=usl writes a file"),
        ("file.pth", "own", "file.pth", "is the checkpoint itself"),
        ("run", "own", "run", "is the checkpoint itself"),
        ("run", "own", "run/step_00000003", "is the checkpoint itself"),
        ("file.pth", "usl", "other.pth", "is there; give another place, or overwrite=true"),
        ("file.pth", "own", "run/step_00000003", "is there; give another place, or overwrite=true"),
    ],
)
def test_an_output_that_may_not_be_written_is_refused(
    tmp_path: Path, checkpoint: str, form: Format, output: str, message: str
) -> None:
    fill(tmp_path)
    with pytest.raises(UserError, match=message):
        check_output(tmp_path / checkpoint, form, tmp_path / output, overwrite=False)


@pytest.mark.parametrize(("form", "output"), [("usl", "other.pth"), ("own", "run/step_00000003")])
def test_what_is_there_may_be_replaced_when_asked_for(tmp_path: Path, form: Format, output: str) -> None:
    fill(tmp_path)
    check_output(tmp_path / "file.pth", form, tmp_path / output, overwrite=True)


@pytest.mark.parametrize(("form", "output"), [("usl", "new.pth"), ("own", "new"), ("own", "empty")])
def test_a_new_place_is_free(tmp_path: Path, form: Format, output: str) -> None:
    fill(tmp_path)
    check_output(tmp_path / "file.pth", form, tmp_path / output, overwrite=False)


def fill(folder: Path) -> None:
    """Two files, a run with a checkpoint, an empty folder and one that holds something else."""
    for name in ("file.pth", "other.pth", "full/something"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
    (folder / "empty").mkdir()
    save_state(folder / "run" / "step_00000003", {}, {})
