"""Which values of a sweep can be compared, which of two is better, and how the page writes numbers."""

import math
from collections.abc import Collection, Iterable

from passreid_ray.viz.sweep_record import ENDED, Mode, SettingValue, SweepRecord, TrialRecord


def finite_value(trial: TrialRecord, metric: str) -> float | None:
    """The trial's last value of ``metric``; None when it has none or it is not finite."""
    value = trial.metrics.get(metric)
    return value if value is not None and math.isfinite(value) else None


def compared_trials(sweep: SweepRecord) -> list[TrialRecord]:
    """Trials that have ended with a finite value, best first: the finished ones before those stopped early."""
    valued = [(finite_value(trial, sweep.metric), trial) for trial in sweep.trials if trial.status in ENDED]
    known = [(cost(value, sweep.mode), trial) for value, trial in valued if value is not None]
    return [trial for _, trial in sorted(known, key=lambda pair: (pair[1].status != "finished", pair[0]))]


def cost(value: float, mode: Mode) -> float:
    """``value`` as something of which less is better."""
    return value if mode == "min" else -value


def setting_names(trials: Iterable[TrialRecord]) -> list[str]:
    """All searched keys in the order in which trials first name them."""
    return list(dict.fromkeys(name for trial in trials for name in trial.settings))


def number_text(value: float) -> str:
    """``value`` with 4 significant digits; whole numbers in full up to a million.

    >>> number_text(0.000012345), number_text(12.3456), number_text(1234567)
    ('1.234e-5', '12.35', '1.235e+6')
    """
    if isinstance(value, int) and abs(value) < 1_000_000:
        return str(value)
    if not math.isfinite(value):
        return {math.inf: "infinite", -math.inf: "-infinite"}.get(value, "NaN")
    rounded = float(f"{value:.4g}")
    if rounded == 0 or 1e-4 <= abs(rounded) < 1e6:
        return f"{rounded:.10g}"
    digits, _, exponent = f"{rounded:.4g}".partition("e")
    return f"{digits}e{int(exponent):+d}"


def seconds_text(seconds: float) -> str:
    """A duration in the unit that fits it.

    >>> seconds_text(42), seconds_text(300), seconds_text(9000)
    ('42 s', '5.0 min', '2.50 h')
    """
    if not math.isfinite(seconds):
        return "NaN"
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.2f} h"


def setting_text(value: SettingValue) -> str:
    """A setting as a preset would write it, with numbers shortened."""
    match value:
        case None:
            return "none"
        case bool():
            return "true" if value else "false"
        case int() | float():
            return number_text(value)
        case _:
            return value


def shortened(text: str, letters: int) -> str:
    """``text``, or its beginning and its end with a mark between them."""
    if len(text) <= letters:
        return text
    tail = (letters - 1) // 2
    return f"{text[: letters - 1 - tail]}…{text[len(text) - tail :]}"


def short_names(names: Collection[str]) -> dict[str, str]:
    """For each dotted name its shortest ending that no other of them has.

    >>> short_names(["optimizer.lr", "loss.triplet.weight", "loss.identity.weight"])
    {'optimizer.lr': 'lr', 'loss.triplet.weight': 'triplet.weight', 'loss.identity.weight': 'identity.weight'}
    """
    endings = {name: _endings(name) for name in names}
    counts: dict[str, int] = {}
    for own in endings.values():
        for ending in own:
            counts[ending] = counts.get(ending, 0) + 1
    return {name: next((end for end in own if counts[end] == 1), name) for name, own in endings.items()}


def _endings(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]
