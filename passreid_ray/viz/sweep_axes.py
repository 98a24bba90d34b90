"""Where the values of a setting stand on an axis: numbers, powers of ten or categories, with a place for "not set"."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from passreid_ray.viz.sweep_record import SettingValue
from passreid_ray.viz.sweep_values import number_text, setting_text

MIN_LOG_RATIO = 10.0
"""Below one power of ten both axes look alike."""
NOT_SET = "not set"
NOT_SET_GAP = 0.15
"""How far below the smallest value the place for "not set" is, as a share of the axis."""


@dataclass(frozen=True)
class Axis:
    """Positions of the values, one per trial, and the ticks that say what they mean."""

    positions: list[float]
    tick_positions: list[float]
    tick_texts: list[str]
    is_log: bool

    @property
    def range(self) -> tuple[float, float]:
        """Lowest and highest position, never equal."""
        places = [*self.positions, *self.tick_positions]
        low, high = min(places), max(places)
        return (low, high) if high > low else (low - 0.5, high + 0.5)


def setting_axis(values: Sequence[SettingValue]) -> Axis:
    """The axis of one setting over all trials; ``None`` stands for a value that is not set.

    Numbers keep their order and are spread by their logarithm where ``is_log_like``; everything else is a category.
    """
    known = [value for value in values if value is not None]
    if not known:
        return Axis([0.0] * len(values), [0.0], [NOT_SET], is_log=False)
    numbers = [float(value) for value in known if is_finite_number(value)]
    if len(numbers) < len(known):
        texts = [NOT_SET if value is None else setting_text(value) for value in values]
        categories = sorted({text for text, value in zip(texts, values, strict=True) if value is not None})
        categories += [NOT_SET] if len(known) < len(values) else []
        return Axis([float(categories.index(text)) for text in texts], list(_count(categories)), categories, False)
    is_log = is_log_like(numbers)
    ticks = _log_ticks(numbers) if is_log else _ticks(numbers)
    texts = [number_text(int(tick) if tick == int(tick) else tick) for tick in ticks]
    places = iter([math.log10(number) if is_log else number for number in numbers])
    tick_places = [math.log10(tick) if is_log else tick for tick in ticks]
    positions = [None if value is None else next(places) for value in values]
    if len(numbers) < len(values):
        set_places = [place for place in positions if place is not None]
        low, high = min([*set_places, *tick_places]), max([*set_places, *tick_places])
        below = low - NOT_SET_GAP * ((high - low) or 1.0)
        return Axis(
            [below if place is None else place for place in positions],
            [below, *tick_places],
            [NOT_SET, *texts],
            is_log,
        )
    return Axis([place for place in positions if place is not None], tick_places, texts, is_log)


def is_finite_number(value: SettingValue) -> bool:
    """Whether ``value`` has a place on an axis of numbers."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def is_log_like(numbers: Iterable[float]) -> bool:
    """Whether the numbers span a power of ten and are spread more evenly by their logarithm than by themselves."""
    sorted_N = np.unique(np.fromiter(numbers, float))
    if len(sorted_N) < 2 or sorted_N[0] <= 0 or sorted_N[-1] / sorted_N[0] < MIN_LOG_RATIO:
        return False
    return _unevenness(np.log10(sorted_N)) < _unevenness(sorted_N)


def _unevenness(sorted_N: np.ndarray) -> float:
    """Largest distance between the numbers' distribution and an even one over the same range."""
    shares_N = (sorted_N - sorted_N[0]) / (sorted_N[-1] - sorted_N[0])
    return float(np.abs(shares_N - np.linspace(0, 1, len(sorted_N))).max())


def _ticks(numbers: Sequence[float]) -> list[float]:
    """The numbers themselves when they are few, else about five round ones within their range."""
    distinct = sorted(set(numbers))
    low, high = distinct[0], distinct[-1]
    if len(distinct) == 1:
        return distinct
    if len(distinct) <= 6 and min(np.diff(distinct)) > 0.06 * (high - low):
        return distinct
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{step * count:.10g}") for count in range(first, last + 1)]


def _log_ticks(numbers: Sequence[float]) -> list[float]:
    """The numbers themselves when they are few, else 1, 2 and 5 of each power of ten, or its 1 when there are many."""
    distinct = sorted(set(numbers))
    low, high = distinct[0], distinct[-1]
    if len(distinct) <= 6 and min(np.diff(np.log10(distinct))) > 0.06 * math.log10(high / low):
        return distinct
    digits = (1, 2, 5) if high / low < 200 else (1,)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{digit}e{power}") for power in powers for digit in digits]
    return [tick for tick in ticks if low <= tick <= high]


def _count(categories: Sequence[str]) -> Iterable[float]:
    return map(float, range(len(categories)))
