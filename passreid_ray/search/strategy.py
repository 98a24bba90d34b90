"""A way to evolve: individuals out, fitness in, a generation at a time."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Self

from passreid_ray.search.individual import Individual
from passreid_ray.search.open_generation import OpenGeneration
from passreid_ray.search.saved_state import restored


class Strategy(ABC):
    """What every strategy does alike; the same seed and fitness give the same individuals.

    The individuals of a generation are drawn when it begins. So they may be evaluated at once, and the order in which
    they are told changes nothing.
    """

    NAME: ClassVar[str]
    """Of the strategy, in what it saves."""

    _open: OpenGeneration

    @property
    def generation(self) -> int:
        """The generation that is asked for now, from 0."""
        return self._open.index

    @property
    def best(self) -> tuple[Individual, float] | None:
        """The individual of lowest fitness of all generations, with its fitness; None before the first success."""
        return self._open.best

    def ask(self) -> Individual | None:
        """The next individual to evaluate; None while the rest of the generation is still being evaluated."""
        return self._open.ask()

    def tell(self, number: int, fitness: float) -> None:
        """Fitness of one individual of this generation, lower is better; the last one told begins the next generation.

        A fitness that is not finite is a failure: it is never a parent and never the best. An individual may be told
        that was not asked for, as when the record of an earlier search is told to a new one. Raises ``UserError`` for
        a number that is not of this generation or was told already.
        """
        self._open.tell(number, fitness)
        if self._open.is_complete:
            self._learn(self._open)
            self._open = self._drawn(self._open.index + 1, self._open.best)

    @abstractmethod
    def _learn(self, generation: OpenGeneration) -> None:
        """Take in a generation that is complete."""

    @abstractmethod
    def _drawn(self, index: int, best: tuple[Individual, float] | None) -> OpenGeneration:
        """The generation ``index``, from what was learnt; its random numbers depend on seed and ``index`` alone."""

    def state(self) -> dict[str, Any]:
        """All that ``from_state`` needs, in strict JSON."""
        return {"strategy": self.NAME, **self._own_state(), "open": self._open.state()}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """A strategy that goes on as the saved one would have; what was asked and not told is asked again.

        Raises ``UserError`` for a state that another strategy saved, and for one that is damaged.
        """
        return restored(cls.NAME, state, cls._from_state)

    @abstractmethod
    def _own_state(self) -> dict[str, Any]:
        """What the strategy itself must save."""

    @classmethod
    @abstractmethod
    def _from_state(cls, state: dict[str, Any]) -> Self:
        """The strategy of a state that is its own; any error means that the state is damaged."""
