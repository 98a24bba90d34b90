"""Whole sweeps on Ray: a trial that is stopped, some that fail, a killed worker, a cluster that is just large."""

from io import StringIO
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import ray
from rich.console import Console

from passreid_ray.config import load_config
from passreid_ray.engines import pretrain
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.tune import run
from passreid_ray.engines.tune_jobs import reported_metrics
from passreid_ray.engines.tune_resources import Resources, trials_at_once
from passreid_ray.engines.tune_trial import last_values
from passreid_ray.train.run_log import read_jsonl
from tests.engines.killing import kill_a_worker_at
from tests.engines.sweep_micro import entries_of, sweep_config
from tests.waiting import wait_for

# The learning rate as the metric: what becomes of each trial is known before.
BY_RATE: dict[str, Any] = {
    "metric": "lr",
    "mode": "max",
    "searcher": {"kind": "grid"},
    "scheduler": {"kind": "asha", "grace": 0.4, "reduction": 2},
}
RATES = {"lr": {"kind": "choice", "values": [1e-2, 1e-3]}}


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


@pytest.mark.timeout(400)
def test_a_sweep_that_just_fits_does_not_hang_and_frees_what_stopped_trials_had(cluster: None, tmp_path: Path) -> None:
    total, free = int(ray.cluster_resources()["CPU"]), ray.available_resources()["CPU"]
    assert trials_at_once(WorkersConfig(), Resources(total, 0), total) == total // 2  # two, where there are two cores
    settings: dict[str, Any] = {**BY_RATE, "space": {"optimizer": RATES}, "budget": {"trials": 2}, "concurrency": total}
    workers = {"workers": {"num_workers": 1, "use_gpu": False}}
    folder = run(sweep_config(tmp_path, **settings, overrides=workers), Console(file=StringIO()))
    assert [own.status for own in entries_of(folder)] in (["finished", "stopped early"], ["finished", "finished"])
    wait_for(lambda: ray.available_resources().get("CPU", 0) >= free)


def test_a_killed_worker_of_a_trial_comes_back_and_the_sweep_goes_on(cluster: None, tmp_path: Path) -> None:
    overrides = {"epochs": 2, "workers": {"num_workers": 1, "use_gpu": False}}
    config = sweep_config(tmp_path, overrides=overrides, budget={"trials": 2}, concurrency=1)
    folders = [config.run.folder / "trials" / f"trial_{number:04d}" for number in range(2)]
    killer = kill_a_worker_at(8, folders[0])
    run(config, Console(file=StringIO()))
    assert not killer.is_alive()
    assert [own.status for own in entries_of(config.run.folder)] == ["finished"] * 2
    for folder in folders:
        steps = [record["step"] for record in read_jsonl(folder / "metrics.jsonl") if "loss" in record]
        assert steps == list(range(1, 13))
    assert "going on after step 6 on 1 worker(s)" in (folders[0] / "console.log").read_text(encoding="utf-8")
    assert "going on" not in (folders[1] / "console.log").read_text(encoding="utf-8")
