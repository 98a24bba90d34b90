"""What the page of a sweep is made from: one record per trial, and what they have in common."""

from dataclasses import dataclass
from typing import Literal

Mode = Literal["min", "max"]
SettingValue = float | int | str | bool | None
TrialStatus = Literal["waiting", "running", "finished", "stopped early", "failed"]

ENDED: tuple[TrialStatus, ...] = ("finished", "stopped early")
"""Trials whose last value counts: it does not change any more."""


@dataclass(frozen=True)
class TrialRecord:
    """One trial as it stands now."""

    trial_id: str
    settings: dict[str, SettingValue]
    """The searched keys only, such as ``optimizer.lr``; a conditional setting is left out where it does not apply."""
    metrics: dict[str, float]
    """Last value of each reported metric."""
    history: list[dict[str, float]]
    """What was reported, oldest first: ``step``, ``seconds`` since the trial's start, and the metrics reported then."""
    status: TrialStatus
    seconds: float
    folder: str
    """Path of the trial's folder relative to the page."""
    error: str = ""
    """One line, of a failed trial."""


@dataclass(frozen=True)
class SweepRecord:
    """A sweep as it stands now."""

    name: str
    job: str
    metric: str
    mode: Mode
    second_metric: str | None
    second_mode: Mode | None
    trials: list[TrialRecord]
    best_id: str | None
    best_toml: str
    notes: list[str]
    is_done: bool
    num_trials_planned: int
    also_shown: tuple[str, ...] = ()
    """Metrics that the table of trials has beside those of the sweep."""
