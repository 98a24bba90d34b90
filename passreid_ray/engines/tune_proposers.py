"""What is tried next: random, grid, Optuna and evolution behind one small interface.

All of them are deterministic: the same seed, the same questions and the same answers in the same order give the same
proposals. So nothing but questions and answers has to be kept for a sweep that is killed; see ``replayed``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import optuna

from passreid_ray.engines.tune_config import EvolutionConfig, GridConfig, Mode, OptunaConfig, RandomConfig, TuneConfig
from passreid_ray.engines.tune_space import Choice, Dimension, Integer, LogUniform, Space, Uniform, Value
from passreid_ray.errors import UserError
from passreid_ray.search import CmaEs, MuLambda, Strategy, WeightSpace

Values = tuple[float, ...] | None
"""The metrics of a trial, the first one first; None when it failed."""
_SEED_KEY = 0x7E5EED


class Proposer(Protocol):
    """Gives settings to try and is told how they did."""

    def ask(self, number: int) -> dict[str, Value] | None:
        """Settings of trial ``number`` (asked in order from 0); None while answers are waited for."""
        ...

    def tell(self, number: int, values: Values) -> None:
        """How trial ``number`` did."""
        ...


@dataclass(frozen=True)
class Asked:
    """A trial as the proposer saw it."""

    number: int
    after: int
    """How many answers it had been given when it was asked."""
    settings: dict[str, Value]
    told: int | None
    """The place of its own answer among all answers; None while there is none."""
    values: Values


def make_proposer(config: TuneConfig, space: Space) -> Proposer:
    """The searcher of ``config``, with nothing tried yet."""
    match config.searcher:
        case RandomConfig():
            return RandomProposer(space, config.seed)
        case GridConfig():
            return GridProposer(space.grid())
        case OptunaConfig() as own:
            return OptunaProposer(space, own, tuple(config.metrics.values()), config.seed)
        case EvolutionConfig() as own:
            return EvolutionProposer(own, config.mode, config.seed)


def replayed(proposer: Proposer, asked: Sequence[Asked]) -> Proposer:
    """A fresh ``proposer`` after all questions and answers of an earlier process, in their order.

    Raises ``UserError`` when it does not propose what it did then: another version of a library, or files edited.
    """
    answers = iter(sorted((own for own in asked if own.told is not None), key=lambda own: own.told or 0))
    given = 0
    for own in sorted(asked, key=lambda own: own.number):
        while given < own.after:
            answer = next(answers)
            proposer.tell(answer.number, answer.values)
            given += 1
        proposed = proposer.ask(own.number)
        if proposed != own.settings:
            raise UserError(
                f"trial {own.number}: the searcher now proposes {proposed}, then it was {own.settings}; the "
                "trials' files or a library have changed since. Give another run.name to start afresh"
            )
    for answer in answers:
        proposer.tell(answer.number, answer.values)
    return proposer


class RandomProposer:
    """Draws each trial from a stream of its own: what is asked does not depend on what was."""

    def __init__(self, space: Space, seed: int) -> None:
        self._space = space
        self._seed = seed

    def ask(self, number: int) -> dict[str, Value] | None:
        return self._space.sample(np.random.default_rng([_SEED_KEY, self._seed, number]))

    def tell(self, number: int, values: Values) -> None:
        pass


class GridProposer:
    """One combination after the other."""

    def __init__(self, grid: Sequence[dict[str, Value]]) -> None:
        self._grid = grid

    def ask(self, number: int) -> dict[str, Value] | None:
        return self._grid[number]

    def tell(self, number: int, values: Values) -> None:
        pass


class OptunaProposer:
    """An Optuna study in memory."""

    def __init__(self, space: Space, config: OptunaConfig, modes: Sequence[Mode], seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        match config.sampler:
            case "tpe":
                sampler: Any = optuna.samplers.TPESampler(n_startup_trials=config.startup_trials, seed=seed)
            case "cmaes":
                sampler = optuna.samplers.CmaEsSampler(
                    n_startup_trials=config.startup_trials, seed=seed, warn_independent_sampling=False
                )
        up, down = optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE
        directions = [up if mode == "max" else down for mode in modes]
        self._study = optuna.create_study(sampler=sampler, directions=directions)
        self._space = space
        self._trials: dict[int, optuna.Trial] = {}

    def ask(self, number: int) -> dict[str, Value] | None:
        trial = self._trials[number] = self._study.ask()
        settings: dict[str, Value] = {}
        for key, dimension in self._space.dimensions.items():
            if self._space.is_searched(key, settings):
                settings[key] = _suggested(trial, key, dimension)
        return settings

    def tell(self, number: int, values: Values) -> None:
        if values is None or any(math.isnan(value) for value in values):
            self._study.tell(self._trials[number], state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(self._trials[number], list(values))


class EvolutionProposer:
    """Individuals of an evolution, a trial each; lower is better to it."""

    def __init__(self, config: EvolutionConfig, mode: Mode, seed: int) -> None:
        self._weights = WeightSpace(tuple(config.weights), config.total)
        dimension, population = self._weights.dimension, config.population
        match config.strategy:
            case "mu_lambda":
                strategy: Strategy = MuLambda(dimension, population=population, parents=config.parents, seed=seed)
            case "cma_es":
                strategy = CmaEs(dimension, population=population, seed=seed)
        self._strategy = strategy
        self._sign = 1.0 if mode == "min" else -1.0
        self._individuals: dict[int, int] = {}

    def ask(self, number: int) -> dict[str, Value] | None:
        individual = self._strategy.ask()
        if individual is None:
            return None
        self._individuals[number] = individual.number
        return {**self._weights.to_weights(individual.genes)}

    def tell(self, number: int, values: Values) -> None:
        self._strategy.tell(self._individuals[number], math.inf if values is None else self._sign * values[0])


def _suggested(trial: optuna.Trial, key: str, dimension: Dimension) -> Value:
    match dimension:
        case Choice(values=values):
            # By position: Optuna takes no lists as values.
            return values[trial.suggest_categorical(key, list(range(len(values))))]
        case Uniform(low=low, high=high):
            return trial.suggest_float(key, low, high)
        case LogUniform(low=low, high=high):
            return trial.suggest_float(key, low, high, log=True)
        case Integer(low=low, high=high):
            return trial.suggest_int(key, low, high)
