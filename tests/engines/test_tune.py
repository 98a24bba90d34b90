"""Whole sweeps on Ray: a trial that is stopped, some that fail, a killed driver, a cluster that is just large."""

import time
from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from passreid_ray.config import load_config, to_toml
from passreid_ray.engines import pretrain
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.tune import run
from passreid_ray.engines.tune_book import TrialBook, TrialEntry
from passreid_ray.engines.tune_jobs import reported_metrics
from passreid_ray.engines.tune_resources import Resources, trials_at_once
from passreid_ray.engines.tune_trial import last_values
from passreid_ray.train.run_log import read_jsonl
from tests.engines.killing import killed_and_given_again
from tests.engines.sweep_micro import sweep_config, sweep_plan

# The learning rate as the metric: what becomes of each trial is known before.
BY_RATE: dict[str, Any] = {
    "metric": "lr",
    "mode": "max",
    "searcher": {"kind": "grid"},
    "scheduler": {"kind": "asha", "grace": 0.4, "reduction": 2},
}
RATES = {"lr": {"kind": "choice", "values": [1e-2, 1e-3]}}


def entries_of(folder: Path) -> list[TrialEntry]:
    entries = TrialBook(folder / "trials").entries
    return [entries[number] for number in sorted(entries)]


# First in the file: later the session's cluster would share the cores with those of these sweeps.
@pytest.mark.timeout(280)
def test_a_killed_sweep_goes_on_and_repeats_nothing(tmp_path: Path) -> None:
    config = sweep_config(tmp_path, budget={"trials": 3}, concurrency=2)
    preset = tmp_path / "sweep.toml"
    preset.write_text(to_toml(config), encoding="utf-8")
    trials = sweep_plan(tmp_path).trials_folder
    seen: dict[int, Any] = {}

    def is_time() -> bool:
        """Whether a trial has ended and another has come as far as a checkpoint."""
        entries = [] if not trials.is_dir() else list(TrialBook(trials).entries.values())
        seen.update({own.number: own for own in entries})
        ended = [own for own in entries if own.status == "finished"]
        running = [own for own in entries if own.status == "running"]
        return bool(ended) and any(list((trials / f"trial_{own.number:04d}").glob("step_*")) for own in running)

    said = killed_and_given_again("tune.py", preset, is_time)
    ended = [own for own in seen.values() if own.status == "finished"]
    assert f"continuing: {len(ended)} trials are done" in said
    entries = entries_of(config.run.folder)
    assert ended
    assert [own.status for own in entries] == ["finished"] * 3
    for own in seen.values():
        assert entries[own.number].asked == own.asked
        if own.status == "finished":
            assert entries[own.number] == own
            assert f"trial_{own.number:04d} finished" not in said
    for own in entries:
        steps = [record["step"] for record in read_jsonl(trials / f"trial_{own.number:04d}" / "metrics.jsonl")]
        assert steps == sorted(steps)
        assert set(steps) == set(range(19))


def test_a_trial_is_stopped_two_fail_and_the_best_can_be_run_again(cluster: None, tmp_path: Path) -> None:
    batches = {"kind": "choice", "values": [8, 4096]}
    config = sweep_config(tmp_path, **BY_RATE, concurrency=1, space={"optimizer": RATES, "batch_size": batches})
    console = Console(file=StringIO(), width=200)
    folder = run(config, console)
    entries = entries_of(folder)
    assert [own.status for own in entries] == ["finished", "failed", "stopped early", "failed"]
    assert "4096" in entries[1].error
    assert 0.4 <= entries[2].history[-1]["step"] / 18 < 0.7
    assert not any((folder / "trials" / "trial_0002").glob("attention.png"))  # it did not run on to its end
    assert pq.read_table(folder / "trials.parquet").num_rows == 4
    assert list((folder / "trials" / "trial_0000").glob("tensorboard/**/hparams/*"))
    assert isinstance(console.file, StringIO)
    assert "4 trials, 1 stopped early, 2 failed" in console.file.getvalue()

    best = load_config(PretrainConfig, [str(folder / "best.toml")])
    _, again = last_values(pretrain.run(best, Console(file=StringIO())))
    for name in ("loss", "evaluation/mAP", "evaluation/mINP"):
        assert again[name] == entries[0].metrics[name]
    assert set(again) == reported_metrics(best)  # what the sweep knows of a job before it has run


@pytest.mark.timeout(200)
def test_a_sweep_that_just_fits_does_not_hang_and_frees_what_stopped_trials_had(cluster: None, tmp_path: Path) -> None:
    total = int(ray.cluster_resources()["CPU"])
    assert trials_at_once(WorkersConfig(), Resources(total, 0), total) == total // 2  # two, where there are two cores
    settings: dict[str, Any] = {**BY_RATE, "space": {"optimizer": RATES}, "budget": {"trials": 2}, "concurrency": total}
    workers = {"workers": {"num_workers": 1, "use_gpu": False}}
    folder = run(sweep_config(tmp_path, **settings, overrides=workers), Console(file=StringIO()))
    assert [own.status for own in entries_of(folder)] in (["finished", "stopped early"], ["finished", "finished"])
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < total and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == total
