"""What strategies save, to JSON and back."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from passreid_ray.errors import UserError

S = TypeVar("S")

FAILED = math.inf
"""Fitness of an individual that has none."""


def restored(name: str, state: dict[str, Any], build: Callable[[dict[str, Any]], S]) -> S:
    """``build(state)`` for a state of the strategy ``name``; ``UserError`` for another's, and for a damaged one."""
    found = state.get("strategy")
    if found != name:
        raise UserError(f"evolution: the saved state is of strategy {found!r}, not {name!r}; go on with that one")
    try:
        return build(state)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"evolution: the saved state of {name!r} is damaged ({error!r}); start a new search") from None


def checked_genes(genes: Any, population: int, dimension: int) -> list[Sequence[float]]:
    """``genes`` of a whole generation; ``ValueError`` unless they are ``(population, dimension)`` numbers."""
    genes_LD = np.array(genes, np.float64)
    if genes_LD.shape != (population, dimension):
        raise ValueError(f"expected genes {(population, dimension)}, got {genes_LD.shape}")
    return genes_LD.tolist()


def to_json(fitness: float) -> float | None:
    """A failure is None, since JSON has no infinity."""
    return None if fitness == FAILED else fitness


def from_json(fitness: float | None) -> float:
    """The fitness that ``to_json`` wrote."""
    return FAILED if fitness is None else fitness
