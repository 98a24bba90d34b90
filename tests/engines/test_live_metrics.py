"""Gauges: what a run logs can be read on the node's metrics port, for as long as it lasts."""

import time
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from passreid_ray.engines import live_metrics, pretrain
from passreid_ray.engines.live_metrics import GAUGES, RUN_LABELS, RunGauges, SweepGauges
from passreid_ray.train.run_log import read_jsonl
from tests.engines.metrics_port import exported
from tests.engines.micro import IN_PROCESS, micro_config
from tests.waiting import wait_for


class Recorder:
    """In the place of the gauges: keeps what was set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values: dict[tuple[str, ...], float] = {}
        self.times = 0
        monkeypatch.setattr(live_metrics, "REFRESH_SECONDS", 0.01)
        monkeypatch.setattr(live_metrics, "_gauge", lambda name: _Gauge(name, self))


class _Gauge:
    def __init__(self, name: str, recorder: Recorder) -> None:
        self._name, self._recorder = name, recorder

    def set(self, value: float, labels: dict[str, str]) -> None:
        assert set(labels) == set(GAUGES[self._name][1])
        key = (self._name, *(labels[label] for label in GAUGES[self._name][1]))
        self._recorder.values[key] = value
        self._recorder.times += 1


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def test_values_are_set_again_while_a_run_lasts_and_no_more_when_it_has_ended(recorder: Recorder) -> None:
    with RunGauges("pretrain", "first") as gauges:
        gauges(3, 4, {"loss": 2.0, "unknown": 1.0})
        assert recorder.values == {
            ("passreid_step", "pretrain", "first", ""): 3,
            ("passreid_progress", "pretrain", "first", ""): 0.75,
            ("passreid_loss", "pretrain", "first", ""): 2.0,
        }
        wait_for(lambda: recorder.times >= 9)
    times = recorder.times
    time.sleep(0.1)
    assert recorder.times == times


def test_a_sweep_counts_its_trials_by_status_those_not_given_out_among_the_waiting(recorder: Recorder) -> None:
    with SweepGauges("usl", "sweep", "loss", num_trials=6) as gauges:
        gauges.show(["running", "failed", "waiting"], None)
        name = "passreid_sweep_trials"
        assert recorder.values == {
            (name, "usl", "sweep", "waiting"): 4,
            (name, "usl", "sweep", "running"): 1,
            (name, "usl", "sweep", "finished"): 0,
            (name, "usl", "sweep", "stopped early"): 0,
            (name, "usl", "sweep", "failed"): 1,
        }
        gauges.show(["finished"], 0.5)
        assert recorder.values["passreid_sweep_best", "usl", "sweep", "loss"] == 0.5


def test_what_a_run_logs_can_be_read_on_the_metrics_port(cluster: None, tmp_path: Path) -> None:
    config = micro_config(tmp_path, epochs=1, run={"name": "seen", "output": str(tmp_path)}, workers=IN_PROCESS)
    pretrain.run(config, Console(file=StringIO()))
    last: dict[str, Any] = {}
    for record in read_jsonl(config.run.folder / "metrics.jsonl"):
        last |= record
    expected = {f"ray_{name}": last[metric] for metric, (name, _) in live_metrics.OF_RECORDS.items()}
    expected |= {"ray_passreid_step": 6, "ray_passreid_progress": 1}
    labels = {"job_name": "pretrain", "run": "seen", "trial": ""}
    found: dict[str, float] = {}

    def is_there() -> bool:
        for sample in exported():
            if sample.labels.get("run") == "seen":
                assert {label: sample.labels[label] for label in RUN_LABELS} == labels
                found[sample.name] = sample.value
        return found == pytest.approx(expected)

    # Ray exports every 10 seconds, and may have done so in the middle of the run.
    with suppress(TimeoutError):
        wait_for(is_there, pause=1.0)
    assert found == pytest.approx(expected)
