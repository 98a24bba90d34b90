"""One candidate of an evolution."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Individual:
    """A number that is never used twice in a search, its generation from 0, and its genes, each in [0, 1]."""

    number: int
    generation: int
    genes: tuple[float, ...]
