"""The trials of a sweep as HTML tables whose heads sort them (the page's script does that)."""

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import quote

from passreid_ray.viz.sweep_record import SettingValue, SweepRecord, TrialRecord
from passreid_ray.viz.sweep_values import (
    compared_trials,
    number_text,
    seconds_text,
    setting_names,
    setting_text,
    shortened,
)

MAX_CELL_LETTERS = 40
MISSING = "–"


@dataclass(frozen=True)
class Cell:
    """What a cell shows, and by what it is sorted; an empty ``sort_key`` comes last in both directions."""

    html: str
    sort_key: str
    is_number: bool = False


@dataclass(frozen=True)
class Column:
    """A head and how to fill its cells."""

    head: str
    cell: Callable[[TrialRecord], Cell]


def best_first(sweep: SweepRecord) -> list[TrialRecord]:
    """All trials: first as ``compared_trials`` has them, then the others by their status."""
    compared = compared_trials(sweep)
    known = {trial.trial_id for trial in compared}
    order = ("running", "finished", "stopped early", "failed", "waiting")
    others = [trial for trial in sweep.trials if trial.trial_id not in known]
    return compared + sorted(others, key=lambda trial: order.index(trial.status))


def trials_table(sweep: SweepRecord, trials: Sequence[TrialRecord], table_id: str) -> str:
    """A row per trial with a link to its folder: status, metrics, time, steps and every setting of the sweep."""
    metrics = [sweep.metric, *([sweep.second_metric] if sweep.second_metric else []), *sweep.also_shown]
    columns = [
        Column("trial", lambda trial: _trial_cell(trial, is_best=trial.trial_id == sweep.best_id)),
        Column("status", _status_cell),
        *(Column(name, lambda trial, name=name: _number_cell(trial.metrics.get(name))) for name in metrics),
        Column("time", lambda trial: _time_cell(trial.seconds)),
        Column("steps", _steps_cell),
        *(Column(name, lambda trial, name=name: _setting_cell(trial, name)) for name in setting_names(sweep.trials)),
    ]
    rows = [[column.cell(trial) for column in columns] for trial in trials]
    heads = "".join(_head(column.head, [row[place] for row in rows]) for place, column in enumerate(columns))
    body = "\n".join(
        _row(row, is_best=trial.trial_id == sweep.best_id) for row, trial in zip(rows, trials, strict=True)
    )
    return (
        f'<div class="scroll"><table id="{table_id}"><thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def folder_link(folder: str) -> str:
    """``folder`` as a relative address; whatever it holds, it is never another scheme such as ``javascript:``."""
    return f"./{quote(folder.strip('/') or '.')}/"


def _head(name: str, cells: Sequence[Cell]) -> str:
    shown = [cell for cell in cells if cell.sort_key]
    is_number = bool(shown) and all(cell.is_number for cell in shown)
    kind = "number" if is_number else "text"
    text = html.escape(shortened(name, 60))
    for mark in "._/":  # where a long name may break
        text = text.replace(mark, f"{mark}<wbr>")
    return (
        f'<th class="{kind}" data-kind="{kind}" aria-sort="none" title="{html.escape(name)}">'
        f'<button type="button">{text}</button></th>'
    )


def _row(cells: Sequence[Cell], *, is_best: bool) -> str:
    shown = "".join(_cell(cell) for cell in cells)
    return f'<tr class="best">{shown}</tr>' if is_best else f"<tr>{shown}</tr>"


def _cell(cell: Cell) -> str:
    kind = "number" if cell.is_number or not cell.sort_key else "text"
    return f'<td class="{kind}" data-key="{html.escape(cell.sort_key)}">{cell.html}</td>'


def _trial_cell(trial: TrialRecord, *, is_best: bool) -> Cell:
    name = html.escape(shortened(trial.trial_id, MAX_CELL_LETTERS))
    link = f'<a href="{html.escape(folder_link(trial.folder))}" title="{html.escape(trial.trial_id)}">{name}</a>'
    return Cell(f"{link} <b>best</b>" if is_best else link, trial.trial_id)


def _status_cell(trial: TrialRecord) -> Cell:
    mark = f'<span class="dot {trial.status.replace(" ", "-")}"></span>{trial.status}'
    error = f'<div class="error">{html.escape(trial.error)}</div>' if trial.error else ""
    return Cell(mark + error, trial.status)


def _number_cell(value: float | None) -> Cell:
    if value is None:
        return Cell(MISSING, "")
    return Cell(html.escape(number_text(value)), repr(float(value)) if math.isfinite(value) else "", is_number=True)


def _time_cell(seconds: float) -> Cell:
    return Cell(seconds_text(seconds), repr(float(seconds)) if math.isfinite(seconds) else "", is_number=True)


def _steps_cell(trial: TrialRecord) -> Cell:
    steps = [entry["step"] for entry in trial.history if math.isfinite(entry.get("step", math.nan))]
    return Cell(f"{int(steps[-1]):,}", repr(float(steps[-1])), is_number=True) if steps else Cell(MISSING, "")


def _setting_cell(trial: TrialRecord, name: str) -> Cell:
    if name not in trial.settings:
        return Cell(MISSING, "")
    value: SettingValue = trial.settings[name]
    text = setting_text(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _number_cell(value)
    shown = html.escape(shortened(text, MAX_CELL_LETTERS))
    return Cell(f'<span title="{html.escape(text)}">{shown}</span>' if len(text) > MAX_CELL_LETTERS else shown, text)
