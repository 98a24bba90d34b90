"""Which trials end early: Ray Tune's schedulers, counting the share of a run that is done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from passreid_ray.engines.tune_book import ENDED, TrialEntry
from passreid_ray.engines.tune_config import AshaConfig, HyperBandConfig, MedianConfig, NoScheduler, PbtConfig
from passreid_ray.engines.tune_plan import SweepPlan
from passreid_ray.engines.tune_space import Choice, Dimension, clipped, sampled
from passreid_ray.engines.tune_trial import TIME, UNITS

Histories = Mapping[int, Sequence[dict[str, float]]]
"""What trials, by number, reported in earlier calls of the sweep."""


@dataclass(frozen=True, eq=False)
class _Past:
    """A trial that ended in an earlier call, as schedulers see one."""

    trial_id: str
    config: dict[str, Any]


def make_scheduler(plan: SweepPlan, entries: Sequence[TrialEntry] = ()) -> TrialScheduler:
    """The scheduler of the sweep, which knows what the trials of ``entries`` reported in earlier calls."""
    scheduler = _scheduler(plan, {own.number: own.history for own in entries})
    if isinstance(scheduler, _Rungs | _Median):
        for own in entries:
            if own.status in ENDED and own.history:
                past: Any = _Past(f"trial {own.number} of an earlier call", {"number": own.number})
                scheduler.on_trial_add(cast(Any, None), past)
                if own.status != "failed":
                    scheduler.on_trial_complete(cast(Any, None), past, own.history[-1])
    return scheduler


def _scheduler(plan: SweepPlan, histories: Histories) -> TrialScheduler:
    config = plan.config
    goal: dict[str, Any] = {"metric": config.metric, "mode": config.mode}
    match config.scheduler:
        case NoScheduler():
            return FIFOScheduler()
        case AshaConfig(grace=grace, reduction=reduction):
            rungs = {"grace_period": grace * UNITS, "reduction_factor": reduction, "max_t": UNITS}
            return _Rungs(histories, time_attr=TIME, **rungs, **goal)
        case HyperBandConfig(grace=grace, reduction=reduction, brackets=brackets):
            # Not Ray's synchronous one: it pauses trials until a bracket is full, which a searcher that waits for
            # results never fills.
            rungs = {"grace_period": grace * UNITS, "reduction_factor": reduction, "max_t": UNITS, "brackets": brackets}
            return _Rungs(histories, time_attr=TIME, **rungs, **goal)
        case MedianConfig(grace=grace, min_trials=min_trials):
            rule = {"grace_period": grace * UNITS, "min_samples_required": min_trials}
            return _Median(histories, time_attr=TIME, **rule, **goal)
        case PbtConfig() as own:
            return _KeepsNumbers(
                time_attr=TIME,
                perturbation_interval=own.interval * UNITS,
                quantile_fraction=own.quantile,
                resample_probability=own.resample,
                hyperparam_mutations={"settings": _mutations(plan, np.random.default_rng(config.seed))},
                custom_explore_fn=_Explore(plan.space.dimensions),
                require_attrs=False,
                log_config=False,
                **goal,
            )


class _Rungs(AsyncHyperBandScheduler):
    """A trial that goes on stands on the rungs that it passed in an earlier call, with what it had there."""

    def __init__(self, histories: Histories, **settings: Any) -> None:
        super().__init__(**settings)
        self._histories = histories

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for report in self._histories.get(trial.config["number"], ()):
            self.on_trial_result(tune_controller, trial, report)  # its verdict was given then


class _Median(MedianStoppingRule):
    """Averages hold what was reported in earlier calls; a trial that failed has nothing to compare with."""

    def __init__(self, histories: Histories, **settings: Any) -> None:
        super().__init__(**settings)
        self._histories = histories

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        history = self._histories.get(trial.config["number"], ())
        # Not by on_trial_result, which would stop it for what it had then.
        if known := [own for own in history if self._metric in own and TIME in own]:
            self._results[trial] += known

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        if self._metric in result and TIME in result:
            super().on_trial_complete(tune_controller, trial, result)

    def _on_insufficient_samples(self, tune_controller: Any, trial: Any, time: float) -> str:
        return self.CONTINUE  # not a pause, for which a trial would be saved and loaded again


class _KeepsNumbers(PopulationBasedTraining):
    """A trial that goes on from another's checkpoint takes over its settings, but not its number."""

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        # It refuses searchers, which might propose more than the population; ours ends with it.
        super().on_trial_add(cast(Any, SimpleNamespace(search_alg=None)), trial)

    def _get_new_config(self, trial: Any, trial_to_clone: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        config, operations = super()._get_new_config(trial, trial_to_clone)
        return {**config, "number": trial.config["number"]}, operations


class _Explore:
    """Brings settings that were changed by a factor back into their ranges."""

    def __init__(self, dimensions: dict[str, Dimension]) -> None:
        self._dimensions = dimensions

    def __call__(self, config: dict[str, Any]) -> dict[str, Any]:
        settings = {key: clipped(self._dimensions[key], value) for key, value in config["settings"].items()}
        return {**config, "settings": settings}


def _mutations(plan: SweepPlan, rng: np.random.Generator) -> dict[str, Any]:
    return {
        key: list(own.values) if isinstance(own, Choice) else lambda own=own: sampled(own, rng)
        for key, own in plan.space.dimensions.items()
    }
