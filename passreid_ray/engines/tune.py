"""Hyper-parameter search: trials of a job, chosen by a searcher, cut short by a scheduler, on Ray Tune.

Reads from top to bottom in the order it runs: ``run``, ``check_continues``, ``fit_to_cluster``, ``search``. Settings
are in ``tune_config``, the checks in ``tune_plan``, a trial in ``tune_trial``, what is kept in ``tune_book``.
"""

import json
import logging
import os
import shutil
import sys
import time
import tomllib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import tune
from rich.console import Console

from passreid_ray.config import Section, read_preset, to_toml
from passreid_ray.engines.fit import outcome_in_thread
from passreid_ray.engines.live_metrics import SweepGauges
from passreid_ray.engines.ray_cluster import connect
from passreid_ray.engines.run_folder import CONFIG_FILE, check_writable, differences
from passreid_ray.engines.tune_book import ENDED, TrialEntry
from passreid_ray.engines.tune_config import JOB_MAY_CHANGE, MAY_CHANGE, TuneConfig
from passreid_ray.engines.tune_deadline import Deadline
from passreid_ray.engines.tune_plan import SweepPlan, check_at_once, make_plan
from passreid_ray.engines.tune_report import (
    BEST_FILE,
    PAGE_FILE,
    TABLE_FILE,
    correlation_notes,
    print_table,
    ranked,
    replace_text,
    trial_line,
    write_hparams,
    write_report,
)
from passreid_ray.engines.tune_resources import Resources, check_gpus, needed_by_trial, room_for, trials_at_once
from passreid_ray.engines.tune_schedulers import make_scheduler
from passreid_ray.engines.tune_searcher import Keeper, SweepCallback, SweepSearcher
from passreid_ray.engines.tune_trial import TrialRun
from passreid_ray.errors import UserError

JOB_FILE = "job.toml"
TUNE_FOLDER = ".tune"
CLOCK_FILE = "seconds.json"
PAGE_SECONDS = 3.0
"""At most so often is the report written again."""
QUIET = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # each trial has its own records
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a trial that failed has no metric
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
}


def run(config: TuneConfig, console: Console | None = None, presets: Path | None = None) -> Path:
    """Search as ``config`` says, or go on with the sweep of that name; the folder of the sweep.

    Every check that needs no cluster comes before Ray starts. Raises ``UserError`` when all trials failed.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    presets = Path(sys.argv[0]).resolve().parent / "presets" if presets is None else presets
    plan = make_plan(config, presets)
    check_gpus(plan.base.workers)
    folder = config.run.folder
    check_writable(folder, "run.output")
    check_continues(plan)
    keeper = Keeper(plan)
    plan, use_gpu, notes = fit_to_cluster(plan, console)
    keeper.plan = plan
    console.print(
        f"{plan.num_trials} trials of {config.job}, {plan.config.concurrency} at once, "
        f"searcher {config.searcher.kind}, scheduler {config.scheduler.kind}, {config.metric} {config.mode}, "
        f"sweep folder {folder}"
    )
    if keeper.book.entries:
        ended = keeper.book.num_ended
        console.print(f"continuing: {ended} trials are done, {len(keeper.book.unfinished)} go on where they were")
    with SweepGauges(config.job, config.run.name, config.metric, plan.num_trials) as gauges:
        reporter = Reporter(keeper, console, notes, gauges)
        search(keeper, reporter, use_gpu)
        return reporter.finish()


def check_continues(plan: SweepPlan) -> None:
    """Write the settings of sweep and job into the sweep's folder.

    Raises ``UserError`` when a sweep of that name is there whose trials could not be compared with new ones.
    """
    folder = plan.config.run.folder
    parts = ((CONFIG_FILE, plan.config, MAY_CHANGE), (JOB_FILE, plan.base, JOB_MAY_CHANGE))
    for file, config, may_change in parts:
        if (folder / file).is_file() and any(plan.trials_folder.glob("*")):
            # A sweep may be older than a setting: it was made as the setting's default says.
            then, now, default = read_preset(str(folder / file)), _as_written(config), _as_written(type(config)())
            for name, (old, new) in differences(then, now, default).items():
                if not name.startswith(may_change):
                    raise UserError(
                        f"{folder}: this sweep was made with {name} = {old!r}, now it is {new!r}; give the same "
                        "settings to continue it, or another run.name to start afresh"
                    )
    for file, config, _ in parts:  # after both were compared: a command that is refused changes nothing
        replace_text(folder / file, to_toml(config))


def _as_written(config: Section) -> dict[str, Any]:
    return tomllib.loads(to_toml(config))


def fit_to_cluster(plan: SweepPlan, console: Console) -> tuple[SweepPlan, bool, list[str]]:
    """Start or join Ray; the plan with as many trials at once as fit, whether they have GPUs, and notes.

    Raises ``UserError`` with a table when one trial could never be scheduled.
    """
    workers, wanted = plan.base.workers, min(plan.config.concurrency, plan.num_trials)
    connect(room_for(workers, wanted))
    total = ray.cluster_resources()
    found = Resources(total.get("CPU", 0), total.get("GPU", 0))
    fitting = trials_at_once(workers, found, wanted)
    notes = []
    if fitting < wanted:
        notes.append(f"concurrency: {fitting} trials at once instead of {wanted}: the cluster has room for no more")
    for note in notes:
        console.print(note)
    own, _ = needed_by_trial(workers, found)
    check_at_once(plan, fitting)
    plan = replace(plan, config=plan.config.model_copy(update={"concurrency": fitting}))
    return plan, own.gpus > 0, notes


def search(keeper: Keeper, reporter: "Reporter", use_gpu: bool) -> None:
    """Run trials until the budget is spent."""
    plan = keeper.plan
    if keeper.is_complete:
        return
    os.environ.update(QUIET)
    # It looks for records that the trials do not write, since they have their own.
    logging.getLogger("ray.tune.analysis.experiment_analysis").setLevel(logging.ERROR)
    config, hours = plan.config, plan.config.budget.hours
    left_seconds = None if hours is None else 3600 * hours - reporter.seconds
    if left_seconds is not None and left_seconds <= 0:
        raise UserError(f"budget.hours: {hours:g} are spent; give more to go on")
    deadline = None if left_seconds is None else Deadline(left_seconds)
    trainable = tune.with_parameters(TrialRun, plan=plan, use_gpu=use_gpu, cwd=os.getcwd())
    # Not tune.Tuner, which writes down all it is given at once: a study or a console cannot be.
    search_all = partial(
        tune.run,
        tune.with_resources(trainable, placement(plan, use_gpu)),
        name=f"{time.time_ns()}",  # never one that was there: the trials' files are what a sweep goes on from
        storage_path=str(config.run.folder / TUNE_FOLDER),
        num_samples=-1,
        search_alg=SweepSearcher(keeper),
        scheduler=make_scheduler(plan, list(keeper.book.entries.values())),
        max_concurrent_trials=config.concurrency,
        stop=deadline,
        max_failures=config.retries,
        reuse_actors=plan.base.workers.num_workers == 0,  # workers of their own end with the process of the trial
        checkpoint_config=tune.CheckpointConfig(num_to_keep=3),
        callbacks=[SweepCallback(keeper, deadline, reporter.changed)],
        raise_on_failed_trial=False,
        verbose=0,
    )
    try:
        error = outcome_in_thread(search_all)
    except KeyboardInterrupt:
        logging.getLogger("ray").setLevel(logging.CRITICAL)  # Tune's thread would complain that Ray is gone
        raise
    shutil.rmtree(config.run.folder / TUNE_FOLDER, ignore_errors=True)  # the trials' own files are all that counts
    # Complete is a sweep whose trials are all given out; only when all have ended too has nothing been lost.
    if error is not None and (keeper.book.unfinished or not keeper.is_complete):
        raise error


def placement(plan: SweepPlan, use_gpu: bool) -> tune.PlacementGroupFactory:
    """What Tune sets aside for the process of a trial; its workers, if it has any, take their own."""
    workers = plan.base.workers
    if workers.num_workers == 0:
        return tune.PlacementGroupFactory([{"CPU": 1.0, **({"GPU": 1.0} if use_gpu else {})}])
    # Beside this process: a run writes its records where it is, and the report is made of them.
    return tune.PlacementGroupFactory([{f"node:{ray.util.get_node_ip_address()}": 0.001}])


def _read_seconds(clock: Path) -> float:
    try:
        return float(json.loads(clock.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{clock}: no number of seconds ({error}); delete it to count them from 0 again") from None


class Reporter:
    """Prints trials as they end and keeps the report up to date."""

    def __init__(self, keeper: Keeper, console: Console, notes: list[str], gauges: SweepGauges) -> None:
        self._keeper = keeper
        self._console = console
        self._notes = notes
        self._next = 0.0
        self._clock = keeper.plan.config.run.folder / CLOCK_FILE
        self._seconds_before = _read_seconds(self._clock) if self._clock.is_file() else 0.0
        self._start = time.monotonic()
        self._gauges = gauges
        self._show()

    @property
    def seconds(self) -> float:
        """How long the sweep has taken, earlier calls included."""
        return self._seconds_before + time.monotonic() - self._start

    def changed(self, entry: TrialEntry) -> None:
        """A trial has reported or ended."""
        plan = self._keeper.plan
        if entry.status in ENDED:
            self._console.print(trial_line(plan, entry, self._entries), markup=False)
            write_hparams(plan, entry)
        self._show()
        if time.monotonic() >= self._next:
            start = time.monotonic()
            self._write(is_done=False)
            # Trials wait meanwhile: a report of thousands of them comes less often.
            self._next = time.monotonic() + max(PAGE_SECONDS, 10 * (time.monotonic() - start))

    def finish(self) -> Path:
        """Write the last report and print the table; ``UserError`` when all trials failed."""
        keeper, folder = self._keeper, self._keeper.plan.config.run.folder
        entries = self._entries
        self._write(is_done=keeper.is_complete and not keeper.book.unfinished)
        failed = [own for own in entries if own.status == "failed"]
        if failed and len(failed) == len(entries):
            raise UserError(
                f"all {len(failed)} trials failed, the first: {failed[0].error}. Their folders are in "
                f"{keeper.plan.trials_folder}"
            )
        print_table(keeper.plan, entries, self._console)
        for note in correlation_notes(keeper.plan, entries):
            self._console.print(note)
        stopped = sum(own.status == "stopped early" for own in entries)
        written = [*([BEST_FILE] if ranked(keeper.plan, entries) else []), TABLE_FILE, PAGE_FILE]
        self._console.print(
            f"{len(entries)} trials, {stopped} stopped early, {len(failed)} failed. "
            f"{', '.join(written)} are in {folder}"
        )
        if keeper.book.unfinished or not keeper.is_complete:
            left = keeper.plan.num_trials - keeper.book.num_ended
            why = "the same command goes on with them, with a larger budget.hours if they are spent"
            self._console.print(f"{left} trials are left; {why}", style="yellow")
        return folder

    def _show(self) -> None:
        best = next(iter(ranked(self._keeper.plan, self._entries)), None)
        value = None if best is None else best.metrics[self._keeper.plan.config.metric]
        self._gauges.show([own.status for own in self._entries], value)

    def _write(self, *, is_done: bool) -> None:
        write_report(self._keeper.plan, self._entries, self._notes, is_done=is_done)
        replace_text(self._clock, json.dumps(self.seconds))

    @property
    def _entries(self) -> list[TrialEntry]:
        book: Any = self._keeper.book
        return [book.entries[number] for number in sorted(book.entries)]
