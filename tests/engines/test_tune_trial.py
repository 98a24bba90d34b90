"""A trial's run in its thread: what is asked of it, and that every end is told. Without Ray."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from passreid_ray.engines.tune_trial import End, Report, RunThread, TrialRun, last_values

Listener = Callable[[int, int, dict[str, float]], str | None]


def run_thread(job: Callable[[Path, Listener], None], folder: Path) -> RunThread:
    """A thread in which ``job`` is the run; the sweep's metric is "mAP"."""
    config: Any = SimpleNamespace(run=SimpleNamespace(folder=folder, name="trial_0000"))
    plan: Any = SimpleNamespace(
        config=SimpleNamespace(
            metric="mAP", scores_without_labels=False, job="pretrain", run=SimpleNamespace(name="sweep")
        ),
        job=SimpleNamespace(run=lambda config, console, listener: job(folder, listener)),
    )
    return RunThread(plan, config)


def write_null(folder: Path, listener: Listener) -> None:
    (folder / "metrics.jsonl").write_text('{"step": 1, "mAP": null}\n', encoding="utf-8")


def give_up(folder: Path, listener: Listener) -> None:
    raise SystemExit(3)


@pytest.mark.timeout(10)
@pytest.mark.parametrize(("job", "error"), [(write_null, TypeError), (give_up, SystemExit)])
def test_a_run_whose_records_cannot_be_read_or_that_gives_up_has_an_end(
    tmp_path: Path, job: Callable[[Path, Listener], None], error: type[BaseException]
) -> None:
    end = run_thread(job, tmp_path).next()
    assert isinstance(end, End)
    assert isinstance(end.error, error)


@pytest.mark.timeout(10)
def test_a_run_whose_folder_cannot_be_made_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    end = run_thread(give_up, tmp_path / "file" / "trial").next()
    assert isinstance(end, End)
    assert isinstance(end.error, OSError)


def test_a_process_whose_old_trial_goes_on_refuses_the_new_one_aloud() -> None:
    trial: Any = object.__new__(TrialRun)
    trial._config = SimpleNamespace(run=SimpleNamespace(name="trial_0004"))
    trial._run_thread = SimpleNamespace(stop=lambda: False)
    with pytest.raises(RuntimeError, match="trial_0004, which ran here before"):
        trial.reset_config({"number": 5, "settings": {}})


@pytest.mark.timeout(10)
def test_a_report_has_the_last_value_of_each_metric_not_of_its_own_record_alone(tmp_path: Path) -> None:
    def measure(folder: Path, listener: Listener) -> None:
        listener(1, 4, {"loss": 3.0, "speed": 9.0})
        listener(2, 4, {"loss": 2.0})
        listener(2, 4, {"mAP": 0.5})

    thread = run_thread(measure, tmp_path)
    assert thread.next() == Report(2, 0.5, {"loss": 2.0, "speed": 9.0, "mAP": 0.5})
    assert isinstance(thread.next(), End)


def test_where_workers_were_is_no_metric(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "nodes": ["10.0.0.1"]}\n{"step": 2, "mAP": 0.5}\n')
    assert last_values(tmp_path) == (2, {"mAP": 0.5})
