"""The generation that is being evaluated: who was asked for, who was told, and the best so far."""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Self

from passreid_ray.errors import UserError
from passreid_ray.search.individual import Individual
from passreid_ray.search.saved_state import FAILED, checked_genes, from_json, to_json


class OpenGeneration:
    """Individuals of one generation, numbered on from the last one's, and what is known of their fitness."""

    def __init__(
        self, index: int, genes: Iterable[Sequence[float]], best: tuple[Individual, float] | None = None
    ) -> None:
        """``genes``: of each individual; as many as in every generation before. ``best``: of those generations."""
        genes = list(genes)
        self.index = index
        self.best = best
        self.individuals = [
            Individual(index * len(genes) + row, index, tuple(map(float, genes_D))) for row, genes_D in enumerate(genes)
        ]
        self._asked: set[int] = set()
        self._fitness: dict[int, float] = {}

    @property
    def fitness(self) -> list[float]:
        """Fitness of every individual, failures as infinity; of a generation that is complete."""
        return [self._fitness[individual.number] for individual in self.individuals]

    @property
    def is_complete(self) -> bool:
        """Whether every individual was told."""
        return len(self._fitness) == len(self.individuals)

    def ask(self) -> Individual | None:
        """The first individual that was neither asked for nor told; None when there is none."""
        for individual in self.individuals:
            if individual.number not in self._asked and individual.number not in self._fitness:
                self._asked.add(individual.number)
                return individual
        return None

    def tell(self, number: int, fitness: float) -> None:
        """Keep one fitness; see ``Strategy.tell``."""
        row = number - self.individuals[0].number
        if not 0 <= row < len(self.individuals) or number in self._fitness:
            waiting = [one.number for one in self.individuals if one.number not in self._fitness]
            raise UserError(
                f"evolution: individual {number} was told, but those without a fitness are {waiting}; tell each once"
            )
        fitness = float(fitness) if math.isfinite(fitness) else FAILED
        self._fitness[number] = fitness
        # Of equals the first by number, not by time: the order of telling must not show.
        if fitness < FAILED and (self.best is None or (fitness, number) < (self.best[1], self.best[0].number)):
            self.best = (self.individuals[row], fitness)

    def state(self) -> dict[str, Any]:
        """All of it but who was asked for, in strict JSON."""
        told = {str(number): to_json(self._fitness[number]) for number in sorted(self._fitness)}
        best = None
        if self.best is not None:
            individual, fitness = self.best
            best = {
                "number": individual.number,
                "generation": individual.generation,
                "genes": list(individual.genes),
                "fitness": fitness,
            }
        return {"index": self.index, "genes": [list(one.genes) for one in self.individuals], "told": told, "best": best}

    @classmethod
    def from_state(cls, state: dict[str, Any], population: int, dimension: int) -> Self:
        """The generation that was saved, with nobody asked for who is not told; ``ValueError`` for another size."""
        best = state["best"]
        if best is not None:
            best = (Individual(best["number"], best["generation"], tuple(best["genes"])), best["fitness"])
        generation = cls(state["index"], checked_genes(state["genes"], population, dimension), best)
        generation._fitness = {int(number): from_json(fitness) for number, fitness in state["told"].items()}
        return generation
