"""The space that a sweep searches: one dimension per setting of the job, some only under conditions.

Plain values in, plain values out: nothing here knows a searcher. A space is written as tables that mirror the settings
of the job, so ``[space.optimizer.lr]`` is the dimension of ``optimizer.lr``.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from passreid_ray.config import Section
from passreid_ray.config.mistakes import explain
from passreid_ray.errors import UserError

Value = bool | int | float | str | None | list[Any] | dict[str, Any]
"""Of a setting, as TOML has it."""


class _Dimension(Section):
    when: dict[str, Any] = Field(default={})
    """Other searched settings and the value that each must have for this one to be searched; else the job's own value
    stands."""


class Choice(_Dimension):
    """One of some values."""

    kind: Literal["choice"] = "choice"
    values: list[Any]
    """The values, as in TOML."""

    @model_validator(mode="after")
    def _check(self) -> "Choice":
        if not self.values:
            raise ValueError("values: expected at least one, got none")
        return self


class _Range(_Dimension):
    low: float
    """The lower end, included."""
    high: float
    """The upper end."""

    @model_validator(mode="after")
    def _check(self) -> "_Range":
        if not self.low < self.high:
            raise ValueError(f"high: expected more than low, which is {self.low:g}, got {self.high:g}")
        return self


class Uniform(_Range):
    """Any number between two."""

    kind: Literal["uniform"] = "uniform"


class LogUniform(_Range):
    """Any number between two above 0; each power of ten is as likely as another."""

    kind: Literal["log_uniform"] = "log_uniform"

    @model_validator(mode="after")
    def _check_sign(self) -> "LogUniform":
        if self.low <= 0:
            raise ValueError(f"low: expected more than 0, which has no logarithm, got {self.low:g}")
        return self


class Integer(_Dimension):
    """Any whole number between two, both included."""

    kind: Literal["integer"] = "integer"
    low: int
    """The lowest."""
    high: int
    """The highest."""

    @model_validator(mode="after")
    def _check(self) -> "Integer":
        if not self.low < self.high:
            raise ValueError(f"high: expected more than low, which is {self.low}, got {self.high}")
        return self


Dimension = Choice | Uniform | LogUniform | Integer
KINDS: dict[str, type[Section]] = {
    "choice": Choice,
    "uniform": Uniform,
    "log_uniform": LogUniform,
    "integer": Integer,
}
_DIMENSION: TypeAdapter[Dimension] = TypeAdapter(Annotated[Dimension, Field(discriminator="kind")])


@dataclass(frozen=True)
class Space:
    """Dimensions by the dotted key of their setting; a condition's key comes before what it decides."""

    dimensions: dict[str, Dimension]

    def is_searched(self, key: str, settings: Mapping[str, Value]) -> bool:
        """Whether the conditions of ``key`` hold in ``settings``, which has what comes before it."""
        when = self.dimensions[key].when
        return all(name in settings and settings[name] == value for name, value in when.items())

    def sample(self, rng: np.random.Generator) -> dict[str, Value]:
        """Settings drawn at random, those whose conditions do not hold left out."""
        settings: dict[str, Value] = {}
        for key, dimension in self.dimensions.items():
            if self.is_searched(key, settings):
                settings[key] = sampled(dimension, rng)
        return settings

    def grid(self) -> list[dict[str, Value]]:
        """All settings, the last key varying fastest; only choices and whole numbers can be counted through.

        Raises ``UserError`` for a range of any numbers.
        """
        found: list[dict[str, Value]] = [{}]
        for key in self.dimensions:
            longer: list[dict[str, Value]] = []
            for settings in found:
                if self.is_searched(key, settings):
                    longer += [{**settings, key: value} for value in self._counted(key)]
                else:
                    longer.append(settings)
            found = longer
        return found

    def probes(self) -> Iterator[tuple[str, Value, dict[str, Value]]]:
        """(key, value, settings that bring it about): every choice and both ends of every range."""
        for key, dimension in self.dimensions.items():
            for value in ends(dimension):
                yield key, value, {**self._conditions(key), key: value}

    def _conditions(self, key: str) -> dict[str, Value]:
        """Settings under which ``key`` is searched, and those settings too."""
        settings: dict[str, Value] = {}
        for needed, value in self.dimensions[key].when.items():
            settings |= {**self._conditions(needed), needed: value}
        return settings

    def _counted(self, key: str) -> list[Value]:
        match self.dimensions[key]:
            case Choice(values=values):
                return list(values)
            case Integer(low=low, high=high):
                return list(range(low, high + 1))
            case other:
                raise UserError(
                    f"space.{key}: a grid cannot count through a {other.kind} range; give it as a choice of values, or "
                    "take searcher.kind=random"
                )


def parse_space(tables: Mapping[str, Any]) -> Space:
    """The space in nested ``tables``; raises ``UserError`` with a line per mistake."""
    found: dict[str, Dimension] = {}
    mistakes: list[str] = []
    for key, table in _leaves(tables, ""):
        kind = table.get("kind")
        if kind not in KINDS:
            mistakes.append(f"space.{key}.kind: expected one of {', '.join(KINDS)}, got {kind!r}")
            continue
        try:
            when = dict(flattened(table.get("when", {})))  # a key with dots may come back from TOML as tables
            found[key] = _DIMENSION.validate_python({**table, "when": when})
        except ValidationError as error:
            details = [{**detail, "loc": detail["loc"][1:]} for detail in error.errors()]  # less the kind
            mistakes += [f"space.{key}.{line}" for line in explain(KINDS[kind], details)]
    if mistakes:
        raise UserError("\n".join(mistakes))
    for key, dimension in found.items():
        for needed, value in dimension.when.items():
            match found.get(needed):
                case Choice(values=values):
                    can_be, known = value in values, f"its values are {values}"
                case Integer(low=low, high=high):
                    can_be, known = value in range(low, high + 1), f"it goes from {low} to {high}"
                case _:
                    raise UserError(
                        f"space.{key}.when: {needed} is not searched as a choice or an integer; a condition is on "
                        "another searched setting"
                    )
            if not can_be:
                raise UserError(f"space.{key}.when: {needed} is never {value!r}; {known}")
    order = [key for key in found if not found[key].when]
    while len(order) < len(found):
        ready = [key for key in found if key not in order and set(found[key].when) <= set(order)]
        if not ready:
            raise UserError(f"space: {', '.join(sorted(set(found) - set(order)))} are conditions of each other")
        order += ready
    return Space({key: found[key] for key in order})


def flattened(tables: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested ``tables``."""
    for name, value in tables.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def sampled(dimension: Dimension, rng: np.random.Generator) -> Value:
    """A value drawn at random."""
    match dimension:
        case Choice(values=values):
            return values[int(rng.integers(len(values)))]
        case Uniform(low=low, high=high):
            return float(rng.uniform(low, high))
        case LogUniform(low=low, high=high):
            return float(np.exp(rng.uniform(math.log(low), math.log(high))))
        case Integer(low=low, high=high):
            return int(rng.integers(low, high + 1))


def ends(dimension: Dimension) -> list[Value]:
    """All choices, or both ends."""
    match dimension:
        case Choice(values=values):
            return list(values)
        case _:
            return [dimension.low, dimension.high]


def clipped(dimension: Dimension, value: Any) -> Value:
    """The value of ``dimension`` that is nearest to ``value``."""
    match dimension:
        case Choice(values=values):
            return value if value in values else values[0]
        case Integer(low=low, high=high):
            return min(max(round(value), low), high)
        case _:
            return min(max(float(value), dimension.low), dimension.high)


def _leaves(tables: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name, table in tables.items():
        key = f"{prefix}{name}"
        if not isinstance(table, Mapping):
            raise UserError(
                f"space.{key}: expected a table such as [space.optimizer.lr] with kind, low and high, got {table!r}"
            )
        # A setting may itself be called kind: its dimension is a table, not text.
        is_dimension = "kind" in table and not isinstance(table["kind"], Mapping)
        is_dimension = is_dimension or not all(isinstance(value, Mapping) for value in table.values())
        if is_dimension:
            yield key, table
        else:
            yield from _leaves(table, f"{key}.")
