"""What Ray Tune asks for trials, and what it tells of them; all that is known goes into the trials' files at once."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.tune import Callback
from ray.tune.search import Searcher

from passreid_ray.engines.tune_book import ENDED, TrialBook, TrialEntry
from passreid_ray.engines.tune_deadline import Deadline
from passreid_ray.engines.tune_plan import SweepPlan
from passreid_ray.engines.tune_proposers import make_proposer, replayed
from passreid_ray.engines.tune_trial import TIME
from passreid_ray.errors import UserError

ERROR_FILE = "error.log"


class Keeper:
    """The sweep as it stands: the proposer and the book, always in step with each other.

    A trial that an earlier process left unfinished is given out again, with its settings and its folder, before
    anything new is proposed.
    """

    def __init__(self, plan: SweepPlan) -> None:
        self.plan = plan
        self.metrics = tuple(plan.config.metrics)
        self.book = TrialBook(plan.trials_folder)
        self._proposer = replayed(make_proposer(plan.config, plan.space), self.book.asked(self.metrics))
        self._left_over = [entry.number for entry in self.book.unfinished]
        self._before = {entry.number: entry.seconds for entry in self.book.entries.values()}
        """Seconds of earlier attempts."""
        self._attempt: dict[int, int | None] = {}
        """The attempt that each trial last reported from."""

    @property
    def is_complete(self) -> bool:
        """Whether every trial of the budget has been given out."""
        return not self._left_over and len(self.book.entries) >= self.plan.num_trials

    def next_trial(self) -> TrialEntry | None:
        """The next trial to run; None while the proposer waits for answers."""
        if self._left_over:
            return self.book.entries[self._left_over.pop(0)]
        number = len(self.book.entries)
        after = self.book.num_ended
        settings = self._proposer.ask(number)
        if settings is None:
            return None
        entry = TrialEntry(number, settings, settings, after)
        self._put(entry)
        return entry

    def report(self, number: int, settings: dict[str, Any], result: dict[str, Any]) -> None:
        """A trial reported ``result``; population based training may have changed its ``settings``."""
        entry = replace(self.book.entries[number], settings=settings)
        if "seconds" in result:
            if self._attempt.get(number) != (attempt := result.get("attempt")):
                self._attempt[number], self._before[number] = attempt, entry.seconds  # its clock began again
            entry = replace(entry, seconds=self._before.get(number, 0.0) + float(result["seconds"]))
        if "step" in result:
            judged = {name: result[name] for name in (TIME, *self.metrics) if name in result}
            report = {"step": float(result["step"]), "seconds": entry.seconds, **judged}
            entry = entry.with_report(report, result.get("metrics", {}))
        self._put(entry)

    def end(self, number: int, result: dict[str, Any]) -> TrialEntry:
        """A trial has ended by itself or was stopped; its entry."""
        entry = self.book.entries[number]
        if failure := result.get("failure"):
            return self._close(replace(entry, status="failed", error=str(failure)))
        return self._close(replace(entry, status="finished" if result.get("finished") else "stopped early"))

    def fail(self, number: int, error: str) -> TrialEntry:
        """A trial has crashed too often; its entry."""
        return self._close(replace(self.book.entries[number], status="failed", error=error))

    def _close(self, entry: TrialEntry) -> TrialEntry:
        entry = replace(entry, ended=self.book.num_ended)
        self._put(entry)
        self._proposer.tell(entry.number, entry.values(self.metrics))
        return entry

    def _put(self, entry: TrialEntry) -> None:
        self.book.put(entry, self.plan.trial_folder(entry.number))


class SweepSearcher(Searcher):
    """The keeper, as Ray Tune asks it."""

    def __init__(self, keeper: Keeper) -> None:
        super().__init__(metric=keeper.metrics[0], mode=keeper.plan.config.mode)
        self._keeper = keeper

    def suggest(self, trial_id: str) -> Any:
        """Number and settings of the next trial."""
        if self._keeper.is_complete:
            return Searcher.FINISHED
        entry = self._keeper.next_trial()
        return None if entry is None else {"number": entry.number, "settings": dict(entry.settings)}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Nothing: the keeper hears it from ``SweepCallback``, which also knows why a trial failed."""

    def save(self, checkpoint_path: str) -> None:
        """Write where the trials' files are: they are the state."""
        Path(checkpoint_path).write_text(json.dumps({"trials": str(self._keeper.plan.trials_folder)}), encoding="utf-8")

    def restore(self, checkpoint_path: str) -> None:
        """Read the trials' files again and put the proposer where they leave it."""
        try:
            saved = json.loads(Path(checkpoint_path).read_bytes())["trials"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise UserError(f"{checkpoint_path}: not the state of a sweep of this project ({error})") from None
        if saved != str(self._keeper.plan.trials_folder):
            raise UserError(f"{checkpoint_path}: of the sweep in {saved}, not of {self._keeper.plan.trials_folder}")
        self._keeper = Keeper(self._keeper.plan)


class SweepCallback(Callback):
    """Brings what Ray Tune tells of trials to the keeper, and calls ``changed`` with the entry that has changed."""

    def __init__(self, keeper: Keeper, deadline: Deadline | None, changed: Callable[[TrialEntry], None]) -> None:
        self._keeper = keeper
        self._deadline = deadline
        self._changed = changed

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **info: Any) -> None:
        number = trial.config["number"]
        self._keeper.report(number, dict(trial.config["settings"]), result)
        self._changed(self._keeper.book.entries[number])

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        number = trial.config["number"]
        ended_itself = result.get("finished") or result.get("failure")
        if not ended_itself and self._deadline is not None and self._deadline.is_over:
            return  # out of time, not out of the race: it goes on when there is more
        if self._keeper.book.entries[number].status not in ENDED:
            self._changed(self._keeper.end(number, result))

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **info: Any) -> None:
        number = trial.config["number"]
        if self._keeper.book.entries[number].status not in ENDED:
            # The file: what Tune itself reads is copied to its storage only later.
            text = Path(trial.error_file).read_text(encoding="utf-8") if trial.error_file else ""
            path = self._keeper.plan.trial_folder(number) / ERROR_FILE
            path.write_text(text, encoding="utf-8")
            self._changed(self._keeper.fail(number, f"{_last_line(text)} (all of it: {path})"))


def _last_line(text: str) -> str:
    """What an error says, in a line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else "its process died"
