"""What a sweep leaves behind: best.toml, trials.parquet, sweep.html, TensorBoard's HParams, and what it prints."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from passreid_ray.config import to_toml
from passreid_ray.engines.tune_book import TrialEntry
from passreid_ray.engines.tune_config import PbtConfig
from passreid_ray.engines.tune_jobs import LABEL_FREE
from passreid_ray.engines.tune_plan import SweepPlan, trial_name
from passreid_ray.engines.tune_space import Value
from passreid_ray.search import rank_correlation
from passreid_ray.viz.sweep_page import write_sweep_page
from passreid_ray.viz.sweep_record import ENDED, SettingValue, SweepRecord, TrialRecord

BEST_FILE = "best.toml"
TABLE_FILE = "trials.parquet"
PAGE_FILE = "sweep.html"
MEAN_AP = "evaluation/mAP"
SHOWN_TRIALS = 8
"""Rows of the table at the end."""


def ranked(plan: SweepPlan, entries: Sequence[TrialEntry]) -> list[TrialEntry]:
    """Trials that have ended with a value of the metric, the best first: the finished ones before those stopped."""
    name, sign = plan.config.metric, 1.0 if plan.config.mode == "min" else -1.0
    known = [own for own in entries if own.status in ENDED and math.isfinite(own.metrics.get(name, math.nan))]
    return sorted(known, key=lambda own: (own.status != "finished", sign * own.metrics[name], own.number))


def best_preset(plan: SweepPlan, entry: TrialEntry) -> str:
    """The settings of a trial as a preset of the job that runs by itself, in a folder beside the sweep."""
    config = plan.trial_config(entry.number, entry.settings, use_gpu=False)
    run = config.run.model_copy(update={"name": f"{plan.config.run.name}_best", "output": plan.config.run.output})
    threads, metric = config.workers.threads, plan.config.metric
    workers = plan.base.workers.model_copy(update={"threads": threads})
    config = config.model_copy(update={"run": run, "workers": workers})
    lines = [
        f"# {trial_name(entry.number)} of sweep {plan.config.run.name}: {metric} = {entry.metrics[metric]:.6g}.",
        f"# Run it: python jobs/{plan.config.job}.py {plan.config.run.folder / BEST_FILE}",
    ]
    if plan.base.workers.threads is None:  # a trial has its share of the cores: with more, sums round otherwise
        lines.append(f"# workers.threads={threads} is the trial's; none is all cores, and may round otherwise.")
    if isinstance(plan.config.scheduler, PbtConfig):
        lines.append("# Its settings changed as it trained; these are the last, which alone may give another value.")
    if entry.status != "finished":
        lines.append("# It was stopped early: the value is the last that it had then.")
    return "\n".join([*lines, "", to_toml(config)])


def trials_table(entries: Sequence[TrialEntry]) -> pa.Table:
    """A row per trial: number, status, seconds, error, and a column for each setting and metric."""
    keys = sorted({key for own in entries for key in own.settings})
    names = sorted({name for own in entries for name in own.metrics})
    columns: dict[str, list[Any]] = {
        "number": [own.number for own in entries],
        "status": [own.status for own in entries],
        "seconds": [own.seconds for own in entries],
        "error": [own.error for own in entries],
    }
    for key in keys:
        columns[f"settings.{key}"] = _of_one_type([own.settings.get(key) for own in entries])
    for name in names:
        columns[name] = [own.metrics.get(name) for own in entries]
    return pa.table(columns)


def sweep_record(plan: SweepPlan, entries: Sequence[TrialEntry], notes: list[str], *, is_done: bool) -> SweepRecord:
    """What the page shows."""
    best = next(iter(ranked(plan, entries)), None)
    config = plan.config
    return SweepRecord(
        name=config.run.name,
        job=config.job,
        metric=config.metric,
        mode=config.mode,
        second_metric=config.second_metric,
        second_mode=None if config.second_metric is None else config.second_mode,
        trials=[_record(plan, own) for own in entries],
        best_id=None if best is None else trial_name(best.number),
        best_toml="" if best is None else best_preset(plan, best),
        notes=[*notes, *correlation_notes(plan, entries)],
        is_done=is_done,
        num_trials_planned=plan.num_trials,
        also_shown=also_shown(plan, entries),
    )


def also_shown(plan: SweepPlan, entries: Sequence[TrialEntry]) -> tuple[str, ...]:
    """What tables have beside the metrics of the sweep: mAP where trials are judged without labels and it is known."""
    is_known = any(MEAN_AP in own.metrics for own in entries)
    is_wanted = plan.config.scores_without_labels and MEAN_AP not in plan.config.metrics
    return (MEAN_AP,) if is_known and is_wanted else ()


def correlation_notes(plan: SweepPlan, entries: Sequence[TrialEntry]) -> list[str]:
    """How far each score without labels went with mAP, where both were measured, good or bad."""
    if not plan.config.scores_without_labels:
        return []
    ended = [own for own in entries if own.status == "finished" and MEAN_AP in own.metrics]
    mean_aps = [own.metrics[MEAN_AP] for own in ended]
    notes = []
    for name, mode in LABEL_FREE.items():
        found = rank_correlation([own.metrics.get(name, math.nan) for own in ended], mean_aps)
        notes.append(found.in_words(name, "mAP", mode))
    return notes


def write_report(plan: SweepPlan, entries: Sequence[TrialEntry], notes: list[str], *, is_done: bool) -> None:
    """Write best.toml, trials.parquet and sweep.html, each replaced whole."""
    folder = plan.config.run.folder
    record = sweep_record(plan, entries, notes, is_done=is_done)
    if record.best_toml:
        replace_text(folder / BEST_FILE, record.best_toml)
    draft = folder / f"{TABLE_FILE}.part"
    pq.write_table(trials_table(entries), draft)
    os.replace(draft, folder / TABLE_FILE)
    write_sweep_page(record, folder / PAGE_FILE)


def write_hparams(plan: SweepPlan, entry: TrialEntry) -> None:
    """Settings and metrics of a trial for TensorBoard's HParams page, beside its curves."""
    from torch.utils.tensorboard import SummaryWriter  # costs seconds

    metrics = {f"hparam/{name}": entry.metrics[name] for name in plan.config.metrics if name in entry.metrics}
    plain = {key: "None" if value is None else _shown(value) for key, value in entry.settings.items()}
    with SummaryWriter(str(plan.trial_folder(entry.number) / "tensorboard")) as writer:
        writer.add_hparams(plain, metrics, run_name="hparams")


def trial_line(plan: SweepPlan, entry: TrialEntry, entries: Sequence[TrialEntry]) -> str:
    """A trial that has ended, in a line."""
    if entry.status == "failed":
        return f"{trial_name(entry.number)} failed: {entry.error}"
    judged = "  ".join(f"{metric} {entry.metrics.get(metric, math.nan):.4g}" for metric in plan.config.metrics)
    first = next(iter(ranked(plan, entries)), None)
    best = "  best so far" if first is not None and first.number == entry.number else ""
    return (
        f"{trial_name(entry.number)} {entry.status}: {judged}  {_in_words(entry.settings)}  {entry.seconds:.0f} s{best}"
    )


def print_table(plan: SweepPlan, entries: Sequence[TrialEntry], console: Console) -> None:
    """The best trials, and the settings of the first; nothing when none has ended."""
    best = ranked(plan, entries)
    if not best:
        return
    metrics = [*plan.config.metrics, *also_shown(plan, best)]
    table = Table("trial", "", *metrics, "seconds")
    for own in best[:SHOWN_TRIALS]:
        values = [f"{own.metrics.get(name, math.nan):.4g}" for name in metrics]
        number, status = str(own.number), own.status if own.status != "finished" else ""
        table.add_row(number, status, *values, f"{own.seconds:.0f}")
    console.print(table)
    console.print(f"best: {trial_name(best[0].number)}  {_in_words(best[0].settings)}", markup=False)


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path``, whole or not at all."""
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _record(plan: SweepPlan, entry: TrialEntry) -> TrialRecord:
    return TrialRecord(
        trial_id=trial_name(entry.number),
        settings={key: _shown(value) for key, value in entry.settings.items()},
        metrics=entry.metrics,
        history=entry.history,
        status=entry.status,
        seconds=entry.seconds,
        folder=str(plan.trial_folder(entry.number).relative_to(plan.config.run.folder)),
        error=entry.error,
    )


def _shown(value: Value) -> SettingValue:
    """Lists and tables as text."""
    return str(value) if isinstance(value, list | dict) else value


def _in_words(settings: Mapping[str, Value]) -> str:
    return " ".join(
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in settings.items()
    )


def _of_one_type(values: list[Any]) -> list[Any]:
    """Values that fit one column: text where they are lists, tables or of several types."""
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float} or (len(kinds) == 1 and not kinds & {list, dict}):
        return [float(value) if kinds == {int, float} and value is not None else value for value in values]
    return [None if value is None else json.dumps(value) for value in values]
