"""What a search asks of a way to evolve."""

from typing import Any, Protocol, Self

from passreid_ray.search.individual import Individual


class Strategy(Protocol):
    """Individuals out, fitness in, a generation at a time; the same seed and fitness give the same individuals.

    The individuals of a generation are drawn when it begins. So they may be evaluated at once, and the order in which
    they are told changes nothing.
    """

    @property
    def generation(self) -> int:
        """The generation that is asked for now, from 0."""
        ...

    @property
    def best(self) -> tuple[Individual, float] | None:
        """The individual of lowest fitness of all generations, with its fitness; None before the first success."""
        ...

    def ask(self) -> Individual | None:
        """The next individual to evaluate; None while the rest of the generation is still being evaluated."""
        ...

    def tell(self, number: int, fitness: float) -> None:
        """Fitness of one individual of this generation, lower is better; the last one told begins the next generation.

        A fitness that is not finite is a failure: it is never a parent and never the best. An individual may be told
        that was not asked for, as when the record of an earlier search is told to a new one. Raises ``UserError`` for
        a number that is not of this generation or was told already.
        """
        ...

    def state(self) -> dict[str, Any]:
        """All that ``from_state`` needs, in strict JSON."""
        ...

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Self:
        """A strategy that goes on as the saved one would have; what was asked and not told is asked again.

        Raises ``UserError`` for a state that another strategy saved, and for one that is damaged.
        """
        ...
