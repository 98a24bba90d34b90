"""CMA-ES: a Gaussian over the genes whose mean, size and shape follow the better half of each generation."""

# Shape letters: L individuals of a generation (lambda), D genes.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from cmaes import CMA

from passreid_ray.errors import UserError
from passreid_ray.search.individual import Individual
from passreid_ray.search.open_generation import OpenGeneration
from passreid_ray.search.saved_state import FAILED, checked_genes, from_json, to_json
from passreid_ray.search.strategy import Strategy

_SMALLEST_POPULATION = 4
"""With fewer, only one is above the middle, and the formulas divide by 0."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A generation that is complete."""

    genes: Sequence[Sequence[float]]
    fitness: list[float]
    """Of each individual; infinity where it failed."""

    def state(self) -> dict[str, Any]:
        """In JSON, a failure as None."""
        return {"genes": [list(genes) for genes in self.genes], "fitness": [to_json(one) for one in self.fitness]}

    @classmethod
    def from_state(cls, state: dict[str, Any], population: int, dimension: int) -> Self:
        """The generation that was saved; ``ValueError`` unless it is of that size."""
        fitness = [from_json(one) for one in state["fitness"]]
        if len(fitness) != population:
            raise ValueError(f"expected {population} fitnesses, got {len(fitness)}")
        return cls(checked_genes(state["genes"], population, dimension), fitness)


class CmaEs(Strategy):
    """Covariance matrix adaptation from the middle of [0, 1], on the ``cmaes`` library; it needs few generations.

    N. Hansen, "The CMA evolution strategy: a tutorial" (arXiv:1604.00772). Genes out of range are drawn again. A
    generation in which all fail changes nothing: the next one is another draw of the same Gaussian. A search that has
    come to rest, so that its steps are below what numbers can tell apart, begins again in the middle.

    The saved state is the history, genes and fitness of every generation; the library's own arrays are found again by
    telling it. For that each generation has a random stream of its own, made of seed and generation.
    """

    NAME = "cma_es"

    def __init__(self, dimension: int, *, population: int = 12, seed: int = 0, sigma: float = 0.3) -> None:
        """``population`` = lambda, ``sigma`` = the first standard deviation of every gene.

        Raises ``UserError`` unless ``dimension`` >= 1, ``population`` >= 4, ``seed`` >= 0 and 0 < ``sigma`` <= 1.
        """
        if dimension < 1 or seed < 0:
            raise UserError(f"evolution: expected one gene or more and a seed >= 0, got {dimension} and {seed}")
        if population < _SMALLEST_POPULATION:
            raise UserError(f"evolution: CMA-ES needs a population of {_SMALLEST_POPULATION} or more, got {population}")
        if not 0 < sigma <= 1:
            raise UserError(f"evolution: expected a first sigma above 0 and up to 1, got {sigma}")
        self._dimension = dimension
        self._population = population
        self._seed = seed
        self._sigma = sigma
        self._history: list[Evaluated] = []
        self._gaussian = self._in_the_middle()
        self._open = self._drawn(0, None)

    def _in_the_middle(self) -> CMA:
        return CMA(
            mean=np.full(self._dimension, 0.5),
            sigma=self._sigma,
            bounds=np.tile([0.0, 1.0], (self._dimension, 1)),
            seed=0,  # of no effect: each generation has its own
            population_size=self._population,
        )

    def _learn(self, generation: OpenGeneration) -> None:
        self._follow(Evaluated([individual.genes for individual in generation.individuals], generation.fitness))

    def _follow(self, evaluated: Evaluated) -> None:
        self._history.append(evaluated)
        follow(self._gaussian, evaluated)
        if self._gaussian.should_stop():
            self._gaussian = self._in_the_middle()

    def _drawn(self, index: int, best: tuple[Individual, float] | None) -> OpenGeneration:
        self._gaussian.reseed_rng(int(np.random.SeedSequence([self._seed, index]).generate_state(1)[0]))
        return OpenGeneration(index, [self._gaussian.ask().tolist() for _ in range(self._population)], best)

    def _own_state(self) -> dict[str, Any]:
        return {
            "settings": {
                "dimension": self._dimension,
                "population": self._population,
                "seed": self._seed,
                "sigma": self._sigma,
            },
            "history": [evaluated.state() for evaluated in self._history],
        }

    @classmethod
    def _from_state(cls, state: dict[str, Any]) -> Self:
        strategy = cls(**state["settings"])
        population, dimension = strategy._population, strategy._dimension
        for evaluated in state["history"]:
            strategy._follow(Evaluated.from_state(evaluated, population, dimension))
        strategy._open = OpenGeneration.from_state(state["open"], population, dimension)
        return strategy


def follow(gaussian: CMA, evaluated: Evaluated) -> None:
    """Move ``gaussian`` towards the better half of a generation and away from the rest; not at all where all failed.

    Only ranks count, with failures last and equals in the order of their numbers. A failure that would still be among
    the better half stands in it as the mean, which pulls nowhere.
    """
    if min(evaluated.fitness) == FAILED:
        return
    half = len(evaluated.fitness) // 2
    mean_D = gaussian.mean.copy()
    ranked = sorted(range(len(evaluated.fitness)), key=lambda row: evaluated.fitness[row])
    told = []
    for rank, row in enumerate(ranked):
        pulls_nowhere = rank < half and evaluated.fitness[row] == FAILED
        told.append((mean_D if pulls_nowhere else np.array(evaluated.genes[row]), float(rank)))
    gaussian.tell(told)
