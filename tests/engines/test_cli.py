import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from passreid_ray.config import Section
from passreid_ray.engines.cli import run_job
from passreid_ray.errors import UserError


class Inner(Section):
    """How it learns."""

    rate: float = 0.5
    """Share of the way that a step goes."""


class Job(Section):
    epochs: int = 3
    """Passes over the data."""
    inner: Inner = Inner()


def exit_status(run: Callable[[Job], None], *arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        run_job(Job, run, "A job.", arguments)
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def fail_with(error: BaseException) -> Callable[[Job], None]:
    def run(_: Job) -> None:
        raise error

    return run


def test_a_job_is_run_with_the_settings_of_the_command_line() -> None:
    seen = []
    run_job(Job, seen.append, None, ["epochs=7"])
    assert seen == [Job(epochs=7)]


def test_without_a_preset_the_jobs_own_is_taken(tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text("epochs = 9")
    seen = []
    run_job(Job, seen.append, None, [], presets=tmp_path, default_preset="small")
    assert seen == [Job(epochs=9)]


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (UserError("data: nothing there; [look]"), 1, "error: data: nothing there; [look]\n"),
        (KeyboardInterrupt(), 130, "stopped. The same command goes on from what was saved.\n"),
        (NotADirectoryError(20, "Not a directory", "/a/b"), 1, "error: /a/b: Not a directory\n"),
    ],
)
def test_what_stops_a_job_is_told_in_one_line(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, told: str
) -> None:
    assert exit_status(fail_with(error)) == status
    assert capsys.readouterr() == ("", told)


def test_a_long_line_is_not_broken(capsys: pytest.CaptureFixture[str]) -> None:
    exit_status(fail_with(UserError("long " * 100)))
    assert capsys.readouterr().err.count("\n") == 1


def test_a_wrong_setting_is_told_before_the_job_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(fail_with(AssertionError("started")), "epoch=3") == 1
    assert capsys.readouterr().err == "error: epoch: no such setting; did you mean epochs?\n"


def test_a_mistake_of_ours_keeps_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_job(Job, lambda _: 1 / 0, None, [])


def test_help_names_the_presets_and_every_setting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    for name in ("train_small.toml", "train_large.toml", "other.toml"):
        (tmp_path / name).touch()
    run_job(Job, fail_with(AssertionError("started")), "A job.", ["--help"], presets=tmp_path)
    text = capsys.readouterr().out
    assert text.startswith("A job.\n")
    assert "python jobs/train.py [PRESET] [section.key=value ...]" in text
    assert "train_large, train_small." in text
    rows = [line.split() for line in text.splitlines()]
    assert ["epochs", "3", "Passes", "over", "the", "data."] in rows
    assert ["inner", "How", "it", "learns."] in rows
    assert ["inner.rate", "0.5", "Share", "of", "the", "way", "that", "a", "step", "goes."] in rows


def test_no_thread_of_a_job_that_ends_starts_a_ray_of_its_own() -> None:
    jobs = sorted((Path(__file__).parents[2] / "jobs").glob("*.py"))
    assert jobs
    for job in jobs:  # Ray decides when it is imported
        modules = re.findall(r"^from (passreid_ray[\w.]*|ray[\w.]*)", job.read_text(encoding="utf-8"), re.MULTILINE)
        assert modules[0] == "passreid_ray.engines.cli"
    script = "import passreid_ray.engines.cli, ray; ray.put(1)"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ENABLE_AUTO_CONNECT"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ended.returncode != 0
    assert "Ray has not been started yet" in ended.stderr
