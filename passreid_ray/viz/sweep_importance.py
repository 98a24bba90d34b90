"""How much of the difference between trials each setting explains."""

import warnings
from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution, FloatDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.importance import FanovaImportanceEvaluator
from scipy.stats import rankdata

from passreid_ray.viz.sweep_axes import setting_axis
from passreid_ray.viz.sweep_record import SettingValue

MIN_TRIALS = 6
"""With fewer, a forest fits any order of the trials."""
MAX_DEPTH = 6
"""Of the trees. With 500 made-up trials twenty times as fast as full depth, and no share changed by more than 0.03."""
METHOD = "functional ANOVA of a random forest (fANOVA, Hutter et al. 2014, as in Optuna)"


def importances(settings: Sequence[dict[str, SettingValue]], values: Sequence[float]) -> dict[str, float]:
    """Share of the variance of the trials' ranks that each setting explains alone, largest first; they sum to <= 1.

    ``settings`` and the finite ``values`` of the metric have one entry per trial. Ranks, because a diverged trial
    would be all of the variance otherwise. A setting that not every trial has gets a place of its own for "not set";
    one that never changes explains nothing. The forest has a fixed seed: the same trials give the same shares.

    Source: Hutter, Hoos, Leyton-Brown, An Efficient Approach for Assessing Hyperparameter Importance, ICML 2014.
    """
    names = list(dict.fromkeys(name for own in settings for name in own))
    axes = {name: setting_axis([own.get(name) for own in settings]) for name in names}
    changing = {name: axis for name, axis in axes.items() if len(set(axis.positions)) > 1}
    shares = dict.fromkeys(names, 0.0)
    if changing and len(set(values)) > 1:
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        try:
            study = optuna.create_study()
        finally:
            optuna.logging.set_verbosity(verbosity)
        spaces: dict[str, BaseDistribution] = {name: FloatDistribution(*axis.range) for name, axis in changing.items()}
        for trial, rank in enumerate(rankdata(values)):
            places = {name: axis.positions[trial] for name, axis in changing.items()}
            study.add_trial(optuna.trial.create_trial(params=places, distributions=spaces, value=float(rank)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)  # normalize
            found = optuna.importance.get_param_importances(
                study, evaluator=FanovaImportanceEvaluator(seed=0, max_depth=MAX_DEPTH), normalize=False
            )
        shares.update({name: float(share) for name, share in found.items()})
    return dict(sorted(shares.items(), key=lambda item: -item[1]))
