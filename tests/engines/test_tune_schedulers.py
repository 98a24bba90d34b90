"""What schedulers are given, and what a trial gives another to go on from. Without Ray."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from passreid_ray.engines.tune_book import TrialEntry
from passreid_ray.engines.tune_schedulers import make_scheduler
from passreid_ray.engines.tune_trial import TIME, TrialRun
from passreid_ray.train.state_files import load_state, save_state
from passreid_ray.viz.sweep_record import TrialStatus
from tests.engines.sweep_micro import sweep_plan

PBT: dict[str, Any] = {"scheduler": {"kind": "pbt", "resample": 0.5}, "concurrency": 4}


def test_a_population_keeps_its_numbers_and_its_ranges(tmp_path: Path) -> None:
    scheduler: Any = make_scheduler(sweep_plan(tmp_path, **PBT))
    bad = SimpleNamespace(config={"number": 3, "settings": {"optimizer.lr": 0.002, "student_temp": 0.1}})
    good = SimpleNamespace(config={"number": 1, "settings": {"optimizer.lr": 0.099, "student_temp": 0.2}})
    rates = set()
    for _ in range(50):
        config, _ = scheduler._get_new_config(bad, good)
        assert config["number"] == 3
        assert 1e-3 <= config["settings"]["optimizer.lr"] <= 1e-1
        assert config["settings"]["student_temp"] in (0.1, 0.2)
        rates.add(config["settings"]["optimizer.lr"])
    assert 0.1 in rates  # 1.2 times 0.099, brought back
    assert any(abs(rate - 0.8 * 0.099) < 1e-12 for rate in rates)


@pytest.mark.parametrize("kind", ["asha", "hyperband"])
def test_the_worse_half_stops_at_a_rung(tmp_path: Path, kind: str) -> None:
    brackets = {"brackets": 1} if kind == "hyperband" else {}
    scheduler: Any = make_scheduler(
        sweep_plan(tmp_path, scheduler={"kind": kind, "grace": 0.5, "reduction": 2, **brackets})
    )
    controller, trials = SimpleNamespace(), [_Named(str(number)) for number in range(4)]
    for trial in trials:
        scheduler.on_trial_add(controller, trial)
    told = [
        scheduler.on_trial_result(controller, trial, {TIME: time, "evaluation/mAP": value})
        for time, value, trial in ((40.0, 0.1, trials[0]), (50.0, 0.3, trials[0]), (60.0, 0.2, trials[1]),
                                   (50.0, 0.4, trials[2]), (50.0, 0.1, trials[3]))
    ]  # fmt: skip
    assert told == ["CONTINUE", "CONTINUE", "STOP", "CONTINUE", "STOP"]


@dataclass(frozen=True, eq=False)
class _Named:
    trial_id: str
    number: int = 99

    @property
    def config(self) -> dict[str, int]:
        return {"number": self.number}


def told_before(number: int, status: TrialStatus, values: dict[float, float]) -> TrialEntry:
    """A trial of an earlier call, with its mAP at shares of the run."""
    history = [{"step": time, TIME: time, "evaluation/mAP": value} for time, value in values.items()]
    return TrialEntry(number, {}, {}, 0, status, history=history)


def test_a_trial_that_goes_on_is_compared_by_what_it_had_at_a_rung_not_by_what_it_has_now(tmp_path: Path) -> None:
    plan = sweep_plan(tmp_path, scheduler={"kind": "asha", "grace": 0.5, "reduction": 2})
    entries = [told_before(0, "finished", {50.0: 0.3, 100.0: 0.9}), told_before(1, "running", {50.0: 0.2})]
    scheduler: Any = make_scheduler(plan, entries)
    trials = [_Named(f"again {number}", number) for number in (1, 2, 3)]
    for trial in trials:
        scheduler.on_trial_add(None, trial)
    told = [
        scheduler.on_trial_result(None, trial, {TIME: time, "evaluation/mAP": value})
        for time, value, trial in ((80.0, 0.8, trials[0]), (50.0, 0.27, trials[1]), (50.0, 0.1, trials[2]))
    ]
    # At the rung there were 0.3 and 0.2, so 0.27 is in the better half.
    assert told == ["CONTINUE", "CONTINUE", "STOP"]


def test_the_median_is_that_of_all_calls_of_a_sweep(tmp_path: Path) -> None:
    plan = sweep_plan(tmp_path, scheduler={"kind": "median", "min_trials": 2, "grace": 0.1})
    entries = [
        told_before(0, "finished", {50.0: 0.5, 100.0: 0.5}),
        told_before(1, "running", {50.0: 0.45}),
        told_before(2, "failed", {}),
    ]
    scheduler: Any = make_scheduler(plan, entries)
    left_over, good, bad = _Named("again", 1), _Named("good", 3), _Named("bad", 4)
    for trial in (left_over, good, bad):
        scheduler.on_trial_add(None, trial)
    told = [
        scheduler.on_trial_result(None, trial, {TIME: 50.0, "evaluation/mAP": value})
        for trial, value in ((good, 0.48), (bad, 0.4), (left_over, 0.48))
    ]
    assert told == ["CONTINUE", "STOP", "CONTINUE"]


def test_a_failed_trial_is_nothing_to_compare_with(tmp_path: Path) -> None:
    plan = sweep_plan(tmp_path, scheduler={"kind": "median", "min_trials": 1, "grace": 0.1})
    scheduler: Any = make_scheduler(plan)
    failed, first, worse = (_Named(name) for name in ("failed", "first", "worse"))
    scheduler.on_trial_complete(None, failed, {"failure": "no data"})
    assert scheduler.on_trial_result(None, first, {TIME: 50.0, "evaluation/mAP": 0.5}) == "CONTINUE"
    scheduler.on_trial_complete(None, first, {TIME: 100.0, "evaluation/mAP": 0.5})
    assert scheduler.on_trial_result(None, worse, {TIME: 50.0, "evaluation/mAP": 0.4}) == "STOP"


def test_a_clone_goes_on_from_the_newest_checkpoint_of_its_model(tmp_path: Path) -> None:
    plan = sweep_plan(tmp_path, **PBT)
    settings = {"optimizer.lr": 0.01, "student_temp": 0.1}
    good, clone = (object.__new__(TrialRun) for _ in range(2))
    for number, trial in enumerate((good, clone)):
        trial._config = plan.trial_config(number, settings, use_gpu=False)
        for step in (6, 12, 18) if trial is good else (6, 24):
            weight = torch.full((2,), float(10 * number + step))
            trial._config.run.checkpoints.write(
                step, lambda folder, own=weight, at=step: save_state(folder, {"weight": own}, {"step": at})
            )
    good._step = 18
    (tmp_path / "given").mkdir()
    good.save_checkpoint(str(tmp_path / "given"))
    clone.load_checkpoint(str(tmp_path / "given"))
    store = clone._config.run.checkpoints
    assert store.names() == ["step_00000018"]
    store.read(
        "step_00000018", lambda folder: torch.testing.assert_close(load_state(folder)[0]["weight"][0].item(), 18.0)
    )
