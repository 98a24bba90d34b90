"""The (mu, lambda) strategy: the best few of a generation are the parents of the whole next one."""

# Shape letters: L individuals of a generation (lambda), M parents (mu), D genes.

import math
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.search.individual import Individual
from passreid_ray.search.open_generation import OpenGeneration
from passreid_ray.search.saved_state import FAILED
from passreid_ray.search.strategy import Strategy

_SMALLEST_STEP = 1e-9
"""A step that selection has driven to 0 would never grow again."""
_LARGEST_STEP = 0.5
"""Reflected into [0, 1], a longer one is hardly different from a draw of new genes."""


class MuLambda(Strategy):
    """Gaussian mutation with a step size that evolves with the genes; parents die with their generation.

    H.-G. Beyer, H.-P. Schwefel, "Evolution strategies: a comprehensive introduction", Natural Computing 1 (2002): the
    (mu/mu, lambda) strategy with self-adaptation. See ``children`` for crossover and mutation. The first generation is
    drawn evenly from the whole range. A generation in which all fail changes nothing: its parents are the next one's.
    """

    NAME = "mu_lambda"

    def __init__(
        self,
        dimension: int,
        *,
        population: int = 12,
        parents: int = 3,
        seed: int = 0,
        step: float = 0.2,
    ) -> None:
        """``population`` = lambda, ``parents`` = mu, ``step`` = the first standard deviation of every gene.

        Raises ``UserError`` unless ``dimension`` >= 1, 1 <= ``parents`` < ``population``, ``seed`` >= 0 and
        0 < ``step`` <= 0.5.
        """
        if dimension < 1 or seed < 0:
            raise UserError(f"evolution: expected one gene or more and a seed >= 0, got {dimension} and {seed}")
        if not 1 <= parents < population:
            raise UserError(f"evolution: expected 1 <= parents < population, got {parents} and {population}")
        if not 0 < step <= _LARGEST_STEP:
            raise UserError(f"evolution: expected a first step above 0 and up to {_LARGEST_STEP}, got {step}")
        self._dimension = dimension
        self._population = population
        self._num_parents = parents
        self._seed = seed
        self._first_step = step
        self._parent_genes_MD = np.zeros((0, dimension))
        self._parent_steps_M = np.zeros(0)
        self._steps_L = np.zeros(0)
        self._open = self._drawn(0, None)

    def _learn(self, generation: OpenGeneration) -> None:
        chosen = selected(generation.fitness, self._num_parents)
        if chosen:
            self._parent_genes_MD = np.array([generation.individuals[row].genes for row in chosen])
            self._parent_steps_M = self._steps_L[chosen]

    def _drawn(self, index: int, best: tuple[Individual, float] | None) -> OpenGeneration:
        # A stream of its own for each generation: then nothing of the generator need be saved.
        rng = np.random.default_rng([self._seed, index])
        if len(self._parent_genes_MD):
            genes_LD, self._steps_L = children(self._parent_genes_MD, self._parent_steps_M, self._population, rng)
        else:
            genes_LD = rng.random((self._population, self._dimension))
            self._steps_L = np.full(self._population, self._first_step)
        return OpenGeneration(index, genes_LD.tolist(), best)

    def _own_state(self) -> dict[str, Any]:
        return {
            "settings": {
                "dimension": self._dimension,
                "population": self._population,
                "parents": self._num_parents,
                "seed": self._seed,
                "step": self._first_step,
            },
            "parent_genes": self._parent_genes_MD.tolist(),
            "parent_steps": self._parent_steps_M.tolist(),
            "steps": self._steps_L.tolist(),
        }

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Self:
        strategy = cls(**state["settings"])
        parents_MD = np.array(state["parent_genes"], np.float64).reshape(-1, strategy._dimension)
        strategy._parent_genes_MD = parents_MD
        strategy._parent_steps_M = np.array(state["parent_steps"], np.float64).reshape(len(parents_MD))
        strategy._steps_L = np.array(state["steps"], np.float64).reshape(strategy._population)
        strategy._open = OpenGeneration.from_state(state["open"], strategy._population, strategy._dimension)
        return strategy


def selected(fitness: list[float], num_parents: int) -> list[int]:
    """Rows of the ``num_parents`` lowest, best first, of equals the first; fewer where too many failed."""
    succeeded = [row for row, value in enumerate(fitness) if value < FAILED]
    return sorted(succeeded, key=lambda row: fitness[row])[:num_parents]


def children(
    parent_genes_MD: NDArray[np.float64],
    parent_steps_M: NDArray[np.float64],
    population: int,
    rng: np.random.Generator,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Genes in [0, 1] ``(L, D)`` and step sizes ``(L,)`` of the next generation.

    Crossover is intermediate: genes and step of every child are the means of all parents'.

    Mutation (Beyer and Schwefel 2002, one step size an individual): the step is multiplied by
    exp(N(0, 1) / sqrt(D)); then each gene moves by step times N(0, 1) and is reflected at 0 and 1.
    """
    shape = (population, parent_genes_MD.shape[1])
    # One step an individual: with a step for each gene, a dozen children are too few to tell the good steps.
    growth_L = np.exp(rng.standard_normal(population) / math.sqrt(shape[1]))
    steps_L = np.clip(parent_steps_M.mean() * growth_L, _SMALLEST_STEP, _LARGEST_STEP)
    return reflected(parent_genes_MD.mean(0) + steps_L[:, None] * rng.standard_normal(shape)), steps_L


def reflected(genes: NDArray[np.float64]) -> NDArray[np.float64]:
    """``genes`` folded into [0, 1], as a mirror at either end would: 1.2 becomes 0.8, and -0.3 becomes 0.3."""
    folded = np.abs(genes) % 2
    return np.where(folded > 1, 2 - folded, folded)
