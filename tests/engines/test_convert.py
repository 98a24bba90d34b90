import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from passreid_ray.config import build
from passreid_ray.engines.convert import run
from passreid_ray.engines.convert_config import ConvertConfig
from passreid_ray.errors import UserError
from tests.engines.checkpoint_files import HEADS, VIEWS, convert, own_run, supervised_file
from tests.models.test_reid_formats import random_model

ROOT = Path(__file__).parents[2]


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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "pretraining"}, "only a pre-training checkpoint becomes format=pretraining"),
        ({"format": "own", "fusion": "mean"}, "was tuned with cat, not mean"),
        ({"format": "own", "neck": "multi"}, "was tuned with single, not multi"),
        ({"format": "own", "model": "none"}, r"file.pth: model.num_heads: no file tells it"),
        ({"format": "own", "image_size_px": [96, 96]}, "its positions are those of 64x32 px"),
        ({"format": "own", "output": "."}, "is not empty and no checkpoint"),
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


def test_what_a_public_file_cannot_tell_is_said(tmp_path: Path) -> None:
    views = {**VIEWS, "mean": [0.4, 0.4, 0.4]}
    source = own_run(tmp_path / "run", random_model("mean", "multi"), views=views)
    _, said = convert(source, tmp_path / "f.pth", "usl")
    assert "who reads it needs model.num_heads=3" in said
    assert "who reads it needs fusion=mean" in said
    assert "who reads it needs pixels.mean=[0.4, 0.4, 0.4] pixels.std=[0.5, 0.5, 0.5]" in said
    _, said = convert(source, tmp_path / "g.pth", "supervised")
    assert "are compared behind the necks, each token normalised, those of a supervised file before the neck" in said
