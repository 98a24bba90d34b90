"""The book of a sweep: one JSON file per trial, and nothing else that has to survive a kill.

Every file is replaced whole, so it is always readable. From them a sweep that is given again knows which trials are
done, which go on, and what its searcher was asked and told. Ray Tune's own snapshots are not read: they are written
late, and a restored Tune run started trials again that had checkpoints.
"""

import json
import os
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from passreid_ray.engines.tune_proposers import Asked, Values
from passreid_ray.engines.tune_space import Value
from passreid_ray.errors import UserError
from passreid_ray.viz.sweep_record import TrialStatus

TRIAL_FILE = "trial.json"
ENDED: tuple[TrialStatus, ...] = ("finished", "stopped early", "failed")


@dataclass(frozen=True)
class TrialEntry:
    """What is known of one trial."""

    number: int
    settings: dict[str, Value]
    """What it runs with now; differs from ``asked`` when population based training has changed it."""
    asked: dict[str, Value]
    """What the searcher proposed."""
    after: int
    """How many trials had ended when it was proposed."""
    status: TrialStatus = "waiting"
    ended: int | None = None
    """Its place among the trials that have ended."""
    metrics: dict[str, float] = field(default_factory=dict)
    """Last value of each metric."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Reports with the metrics of the sweep, ``step``, ``seconds`` and what schedulers count in."""
    seconds: float = 0.0
    """Time under way, all attempts together."""
    error: str = ""
    """Why it failed, in a line."""

    def with_report(self, report: dict[str, float], metrics: dict[str, float]) -> "TrialEntry":
        """After one more report; one of an earlier step replaces what came after that step."""
        kept = [own for own in self.history if own["step"] < report["step"]]
        return replace(self, status="running", history=[*kept, report], metrics={**self.metrics, **metrics})

    def values(self, names: tuple[str, ...]) -> Values:
        """What the searcher is told."""
        if self.status == "failed" or any(name not in self.metrics for name in names):
            return None
        return tuple(self.metrics[name] for name in names)


class TrialBook:
    """The entries of a sweep, in memory and in the trials' folders."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.entries: dict[int, TrialEntry] = {}
        for path in sorted(folder.glob(f"*/{TRIAL_FILE}")):
            entry = _read(path)
            self.entries[entry.number] = entry
        if sorted(self.entries) != list(range(len(self.entries))):
            raise UserError(
                f"{folder}: trials are missing: found {sorted(self.entries)}; restore their folders, or give another "
                "run.name to start afresh"
            )

    @property
    def num_ended(self) -> int:
        """Trials that will not change any more."""
        return sum(entry.status in ENDED for entry in self.entries.values())

    @property
    def unfinished(self) -> list[TrialEntry]:
        """Trials that an earlier process did not bring to an end."""
        return [entry for entry in self.entries.values() if entry.status not in ENDED]

    def put(self, entry: TrialEntry, folder: Path) -> None:
        """Keep ``entry``, also in the trial's ``folder``."""
        self.entries[entry.number] = entry
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f"{TRIAL_FILE}.part"
        draft.write_text(json.dumps(asdict(entry), indent=1), encoding="utf-8")
        os.replace(draft, folder / TRIAL_FILE)

    def asked(self, metrics: tuple[str, ...]) -> list[Asked]:
        """What the searcher was asked and told."""
        return [
            Asked(own.number, own.after, own.asked, own.ended, own.values(metrics)) for own in self.entries.values()
        ]


def _read(path: Path) -> TrialEntry:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return TrialEntry(**values)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a trial of this project ({error}); delete it with its folder") from None
