import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from passreid_ray.engines.ray_cluster import WorkersConfig, num_cores
from passreid_ray.engines.tune_config import TuneConfig
from passreid_ray.engines.tune_resources import Resources, check_early, check_gpus, room_for, trials_at_once
from passreid_ray.errors import UserError


def test_a_trial_that_can_never_be_scheduled_is_refused_at_once_with_a_table() -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        trials_at_once(WorkersConfig(num_workers=8), Resources(4, 0), 2)
    assert time.monotonic() - start < 5
    lines = [line.split() for line in str(caught.value).replace("│", " ").splitlines()]
    assert ["a", "trial", "in", "all", "9", "0"] in lines
    assert ["the", "cluster", "4", "0"] in lines


def test_trials_whose_workers_take_a_fraction_of_a_cpu_fit_more_often() -> None:
    found = Resources(6, 0)
    assert trials_at_once(WorkersConfig(num_workers=4), found, 9) == 1
    assert trials_at_once(WorkersConfig(num_workers=4, cpus_per_worker=0.25), found, 9) == 3


def test_more_gpus_than_there_are_are_refused() -> None:
    with pytest.raises(UserError, match="does not fit the cluster"):
        trials_at_once(WorkersConfig(num_workers=2, use_gpu=True), Resources(64, 1), 1)


def test_more_gpus_than_this_machine_has_are_refused_from_the_settings_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    preset = tmp_path / "job.toml"
    preset.write_text("[workers]\nnum_workers = 4096\n", encoding="utf-8")
    overrides = {"workers": {"use_gpu": True}}
    with pytest.raises(UserError, match=r"a trial in all +│ 4097 │ 4096"):
        check_early(TuneConfig(preset="job", overrides=overrides), tmp_path)
    check_early(TuneConfig(preset="job"), tmp_path)
    check_early(TuneConfig(preset="there is none", overrides=overrides), tmp_path)


@given(st.integers(0, 4), st.sampled_from([0.25, 0.3, 1, 4]), st.integers(1, 9), st.sampled_from([1, 2, 64]))
def test_a_local_cluster_has_room_for_all_trials_at_once(num: int, each: float, wanted: int, cores: int) -> None:
    workers = WorkersConfig(num_workers=num, cpus_per_worker=each, use_gpu=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("passreid_ray.engines.tune_resources.num_cores", lambda: cores)
        started = Resources(cores + math.ceil(room_for(workers, wanted).cpus), 0)
    assert trials_at_once(workers, started, wanted) == wanted


def test_workers_of_several_cpus_are_not_refused_for_want_of_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "")
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    each = 4 * num_cores()
    check_gpus(WorkersConfig(num_workers=2, cpus_per_worker=each, use_gpu=True))
    with pytest.raises(UserError, match="does not fit"):
        check_gpus(WorkersConfig(num_workers=3, cpus_per_worker=each, use_gpu=True))


def test_the_early_check_imports_neither_the_jobs_nor_ray_tune() -> None:
    script = "import sys, passreid_ray.engines.tune_resources; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert "passreid_ray.engines.ray_cluster" in modules
    assert not {"ray.tune", "timm", "optuna", "plotly", "matplotlib", "passreid_ray.engines.pretrain"} & set(modules)


@given(st.integers(0, 4), st.integers(1, 40), st.integers(0, 8), st.integers(1, 9))
def test_what_fits_leaves_a_cpu_for_the_data_of_each_trial(workers: int, cpus: int, gpus: int, wanted: int) -> None:
    own = max(1, workers)
    try:
        found = trials_at_once(WorkersConfig(num_workers=workers), Resources(cpus, gpus), wanted)
    except UserError:
        assert cpus < own + 1
        return
    assert 1 <= found <= wanted
    assert found * (own + 1) <= cpus
    per_trial_gpus = own if gpus >= own else 0
    assert found * per_trial_gpus <= gpus
    more_fits = (found + 1) * (own + 1) <= cpus and (found + 1) * per_trial_gpus <= gpus
    assert found == wanted or not more_fits
