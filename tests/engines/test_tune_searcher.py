"""Searchers without Ray: a sweep is played by hand, killed, and goes on as the unbroken one does."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray.tune.search import Searcher

from passreid_ray.engines.tune_book import TrialBook
from passreid_ray.engines.tune_config import EvolutionConfig, Mode
from passreid_ray.engines.tune_plan import SweepPlan
from passreid_ray.engines.tune_proposers import EvolutionProposer
from passreid_ray.engines.tune_searcher import Keeper, SweepSearcher
from passreid_ray.errors import UserError
from tests.engines.sweep_micro import sweep_plan

METRIC = "evaluation/mAP"
GRID = {
    "student_temp": {"kind": "choice", "values": [0.1, 0.2, 0.3]},
    "koleo_weight": {"kind": "choice", "values": [0.0, 0.1, 0.2, 0.3]},
}
EVOLUTION = {"kind": "evolution", "weights": ["token_weights.0", "token_weights.1"], "population": 4, "parents": 2}
SEARCHERS: dict[str, dict[str, Any]] = {
    "random": {},
    "grid": {"searcher": {"kind": "grid"}, "space": GRID},
    "tpe": {"searcher": {"kind": "optuna", "startup_trials": 3}},
    "cmaes": {"searcher": {"kind": "optuna", "sampler": "cmaes", "startup_trials": 3}},
    "mu_lambda": {"searcher": EVOLUTION, "space": {}, "overrides": {"token_weights": [1.0, 1.0, 1.0, 1.0]}},
    "cma_es": {
        "searcher": {**EVOLUTION, "strategy": "cma_es"},
        "space": {},
        "overrides": {"token_weights": [1.0, 1.0, 1.0, 1.0]},
    },
}


def plan_of(folder: Path, searcher: str, num_trials: int = 12) -> SweepPlan:
    folder.mkdir(exist_ok=True)
    return sweep_plan(folder, **SEARCHERS[searcher], budget={"trials": num_trials})


def score(settings: Mapping[str, Any]) -> float:
    """How good settings are; one of five fails."""
    numbers = [value for value in settings.values() if isinstance(value, float)]
    value = -float(np.sum((np.array(numbers) - 0.3) ** 2))
    return value if round(1e6 * value) % 5 else float("nan")


def end_one(keeper: Keeper, number: int) -> None:
    value = score(keeper.book.entries[number].settings)
    if np.isnan(value):
        keeper.fail(number, "it was one of five")
        return
    keeper.report(number, dict(keeper.book.entries[number].settings), {"step": 3, "seconds": 1.0, METRIC: value,
                                                                        "metrics": {METRIC: value}})  # fmt: skip
    keeper.end(number, {"finished": True})


def play(keeper: Keeper, running: list[int], *, ends: int) -> list[int]:
    """Go on with two trials at once until ``ends`` of them have ended, or all have; the numbers that still run."""
    while ends and not (keeper.is_complete and not running):
        while len(running) < 2 and not keeper.is_complete:
            entry = keeper.next_trial()
            if entry is None:
                break
            running.append(entry.number)
        end_one(keeper, running.pop(len(keeper.book.entries) % 2 if len(running) > 1 else 0))
        ends -= 1
    return running


def settings_of(keeper: Keeper) -> list[Any]:
    return [keeper.book.entries[number].settings for number in sorted(keeper.book.entries)]


@pytest.mark.parametrize("searcher", SEARCHERS)
def test_a_sweep_that_is_killed_proposes_what_the_unbroken_one_does(searcher: str, tmp_path: Path) -> None:
    unbroken = Keeper(plan_of(tmp_path / "unbroken", searcher))
    play(unbroken, [], ends=100)
    assert len(unbroken.book.entries) == 12

    plan = plan_of(tmp_path / "killed", searcher)
    killed = Keeper(plan)
    running = play(killed, [], ends=5)
    again = Keeper(plan)
    assert [entry.number for entry in again.book.unfinished] == sorted(running)
    given = [again.next_trial() for _ in running]
    assert [own.number for own in given if own is not None] == sorted(running)
    play(again, running, ends=100)
    assert settings_of(again) == settings_of(unbroken)
    assert [own.ended for own in again.book.entries.values()] == [own.ended for own in unbroken.book.entries.values()]


def test_the_wrapper_for_tune_saves_and_restores_where_it_was(tmp_path: Path) -> None:
    searcher = SweepSearcher(Keeper(plan_of(tmp_path, "mu_lambda", num_trials=6)))
    keeper = searcher._keeper
    given = [searcher.suggest(f"t{index}") for index in range(5)]
    assert [own["number"] for own in given[:4]] == [0, 1, 2, 3]
    assert given[4] is None  # the generation of four must be told first
    end_one(keeper, 2)
    searcher.save(str(tmp_path / "state"))

    restored = SweepSearcher(Keeper(keeper.plan))
    restored.restore(str(tmp_path / "state"))
    again = [restored.suggest(f"u{index}") for index in range(3)]
    assert again == [given[0], given[1], given[3]]
    assert restored.suggest("v") is None
    for number in (0, 1, 3):
        end_one(restored._keeper, number)
    assert [restored.suggest("w")["number"], restored.suggest("x")["number"]] == [4, 5]
    assert restored.suggest("y") == Searcher.FINISHED


@pytest.mark.parametrize(("mode", "end"), [("max", 2.0), ("min", 0.0)])
def test_evolution_goes_to_the_better_end_of_its_metric(mode: Mode, end: float) -> None:
    config = EvolutionConfig(weights=["first", "second"], population=12, parents=3)
    proposer = EvolutionProposer(config, mode, seed=0)
    weight = float("nan")
    for number in range(10 * config.population):
        asked = proposer.ask(number)
        assert asked is not None
        weight = float(asked["first"])  # pyright: ignore[reportArgumentType]
        proposer.tell(number, (weight,))
    assert weight == pytest.approx(end, abs=0.2)


def test_files_that_were_edited_are_told_not_followed(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "tpe")
    keeper = Keeper(plan)
    play(keeper, [], ends=4)
    entry = keeper.book.entries[1]
    keeper.book.put(replace(entry, asked={**entry.asked, "student_temp": 0.9}), plan.trial_folder(1))
    with pytest.raises(UserError, match="trial 1: the searcher now proposes"):
        Keeper(plan)


def test_a_trial_file_of_lists_in_lists_is_told(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "random")
    plan.trial_folder(0).mkdir(parents=True)
    (plan.trial_folder(0) / "trial.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"trial\.json: not a trial of this project"):
        TrialBook(plan.trials_folder)


def test_a_trial_whose_folder_is_gone_is_missed(tmp_path: Path) -> None:
    plan = plan_of(tmp_path, "random")
    play(Keeper(plan), [], ends=4)
    shutil.rmtree(plan.trial_folder(1))
    with pytest.raises(UserError, match="trials are missing"):
        TrialBook(plan.trials_folder)


def test_the_seconds_of_all_attempts_are_added_whatever_their_clocks_say(tmp_path: Path) -> None:
    keeper = Keeper(plan_of(tmp_path, "random"))
    assert keeper.next_trial() is not None
    for attempt, seconds in ((7, 10.0), (7, 100.0), (8, 150.0), (9, 20.0), (9, 30.0)):
        keeper.report(0, {}, {"attempt": attempt, "seconds": seconds})
    again = Keeper(keeper.plan)
    again.report(0, {}, {"attempt": 10, "seconds": 5.0})
    assert again.book.entries[0].seconds == 100 + 150 + 30 + 5


def test_a_report_of_an_earlier_step_replaces_what_came_after_it(tmp_path: Path) -> None:
    keeper = Keeper(plan_of(tmp_path, "random"))
    entry = keeper.next_trial()
    assert entry is not None
    for step, value in ((1, 0.1), (2, 0.2), (3, 0.3), (2, 0.25)):
        result = {"step": step, "seconds": float(step), METRIC: value, "metrics": {METRIC: value, "loss": 1.0}}
        keeper.report(0, dict(entry.settings), result)
    found = TrialBook(keeper.plan.trials_folder).entries[0]
    assert [(own["step"], own[METRIC]) for own in found.history] == [(1, 0.1), (2, 0.25)]
    assert found.metrics == {METRIC: 0.25, "loss": 1.0}
