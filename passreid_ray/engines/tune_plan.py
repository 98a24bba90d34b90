"""What a sweep is going to do, worked out and checked before Ray starts."""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from passreid_ray.config import assignments, overridden, read_preset
from passreid_ray.data import open_rows
from passreid_ray.data.storage import is_remote
from passreid_ray.engines.ray_cluster import num_cores
from passreid_ray.engines.tune_config import (
    EvolutionConfig,
    GridConfig,
    OptunaConfig,
    PbtConfig,
    TuneConfig,
)
from passreid_ray.engines.tune_jobs import LABEL_FREE, Job, JobConfig, job_of, must_agree, reported_metrics
from passreid_ray.engines.tune_space import Choice, Space, Value, parse_space
from passreid_ray.errors import UserError
from passreid_ray.search import WeightSpace

TRIALS_FOLDER = "trials"


@dataclass(frozen=True)
class SweepPlan:
    """A sweep whose settings fit each other; small enough to go along with every trial."""

    config: TuneConfig
    values: dict[str, Any]
    """Nested settings of the job before anything is searched: its preset."""
    space: Space
    """Empty where weights evolve."""
    num_trials: int
    """Trials in all."""

    @property
    def job(self) -> Job:
        """What is searched over."""
        return job_of(self.config.job)

    @property
    def trials_folder(self) -> Path:
        """The folder of the trials' run folders."""
        return self.config.run.folder / TRIALS_FOLDER

    def trial_folder(self, number: int) -> Path:
        """The run folder of a trial."""
        return self.trials_folder / trial_name(number)

    @cached_property
    def base(self) -> JobConfig:
        """Settings of the job with nothing searched."""
        return self.job_config({})

    def job_config(self, settings: Mapping[str, Value], *more: str) -> JobConfig:
        """Settings of the job where ``settings`` are searched; ``more``: further section.key=value.

        The same path as that of the command line. Raises ``UserError`` for what the job refuses.
        """
        cls = self.job.config_cls
        searched = [line for key, value in settings.items() for line in assignments({key: value})]
        return cast(JobConfig, overridden(cls, self.values, [*assignments(self.config.overrides), *searched, *more]))

    def trial_config(self, number: int, settings: Mapping[str, Value], *, use_gpu: bool) -> JobConfig:
        """Settings of a trial: a run of the job in a folder of its own, with its share of this machine's cores."""
        workers = self.base.workers
        at_once = self.config.concurrency * workers.world_size
        threads = workers.threads or max(1, num_cores() // at_once)
        place = {"name": trial_name(number), "output": str(self.trials_folder)}
        own = {"run": place, "workers": {"threads": threads, "use_gpu": use_gpu if workers.num_workers else "auto"}}
        return self.job_config(settings, *assignments(own))


def trial_name(number: int) -> str:
    """Name of a trial's folder; names sort by number."""
    return f"trial_{number:04d}"


def make_plan(config: TuneConfig, presets: Path | None) -> SweepPlan:
    """The plan of ``config``, whose preset is looked for in ``presets`` too.

    Raises ``UserError`` for what cannot work: a preset, a setting or a metric that does not exist, ends of ranges that
    the job refuses, a searcher or a scheduler that cannot deal with the space.
    """
    values = read_preset(config.preset, presets)
    space = parse_space(config.space)
    plan = SweepPlan(config, values, space, config.budget.trials)
    try:
        plan.job_config({})
    except UserError as error:
        raise UserError(f"{config.job} with preset {config.preset} and overrides: {error}") from None
    workers = plan.base.workers
    if workers.is_range:
        raise UserError(
            f"overrides.workers.num_workers: {workers.described}, but a sweep sets a fixed share of the cluster aside "
            f"for each trial; give one number, such as {workers.sizes[0]}"
        )
    check_searcher(plan)
    check_space(plan)
    check_metrics(plan)
    check_scheduler(plan)
    if isinstance(config.searcher, GridConfig):
        return SweepPlan(config, values, space, min(config.budget.trials, len(space.grid())))
    return plan


def check_searcher(plan: SweepPlan) -> None:
    """Raise ``UserError`` when the searcher has nothing to search, or not what it can."""
    config = plan.config
    dimensions = plan.space.dimensions
    match config.searcher:
        case EvolutionConfig() as own:
            if dimensions:
                raise UserError(
                    f"space: {', '.join(dimensions)}: evolution searches searcher.weights alone; give the rest as "
                    "overrides"
                )
            if len(own.weights) < 2:
                raise UserError("searcher.weights: expected two or more settings of the job that are weights")
            if config.job == "usl":
                raise UserError("searcher.kind: evolution is for jobs pretrain and finetune, whose losses have weights")
            if config.second_metric is not None:
                raise UserError("second_metric: evolution has one fitness; leave it out")
            if own.parents > own.population:
                raise UserError(f"searcher.parents: {own.parents} of a population of {own.population}")
        case OptunaConfig(sampler="cmaes"):
            if config.second_metric is not None:
                raise UserError("searcher.sampler: cmaes has one metric; take tpe, or leave second_metric out")
            if not any(not isinstance(own, Choice) for own in dimensions.values()):
                raise UserError("searcher.sampler: cmaes searches ranges and the space has none; take tpe")
        case _:
            pass
    if not dimensions and not isinstance(config.searcher, EvolutionConfig):
        raise UserError('space: empty; give at least one table such as [space.optimizer.lr] with kind = "log_uniform"')


def check_space(plan: SweepPlan) -> None:
    """Try every choice and both ends of every range on the job; ``UserError`` with a line per mistake."""
    mistakes: dict[str, None] = {}
    for key, value, settings in _probes(plan):
        if key.startswith(("run.", "workers.")):
            mistakes[f"space.{key}: is the sweep's own affair; search settings of the method"] = None
            continue
        try:
            plan.job_config(settings)
        except UserError as error:
            told = f"space.{key}: {plan.config.job} refuses"
            # One line for a setting that does not exist, not one for each end of its range.
            mistakes[f"{told}: {error}" if "no such setting" in str(error) else f"{told} {value!r}: {error}"] = None
    if mistakes:
        raise UserError("\n".join(mistakes))


def _probes(plan: SweepPlan) -> list[tuple[str, Value, dict[str, Value]]]:
    """As ``Space.probes``; of evolution each weight alone."""
    if isinstance(own := plan.config.searcher, EvolutionConfig):
        weights = WeightSpace(tuple(own.weights), own.total)
        alone = [weights.to_weights([float(name == other) for other in own.weights]) for name in own.weights]
        return [(name, found[name], {**found}) for name, found in zip(own.weights, alone, strict=True)]
    return list(plan.space.probes())


def check_metrics(plan: SweepPlan) -> None:
    """Raise ``UserError`` for a metric that no trial would report, and for crops that cannot be scored."""
    config, base = plan.config, plan.base
    probes = [plan.job_config(settings) for _, _, settings in _probes(plan)]  # a loss may be what is searched
    known = set[str]().union(*map(reported_metrics, [base, *probes]))
    known |= set(LABEL_FREE) if config.scores_without_labels else set()
    for key, name in (("metric", config.metric), ("second_metric", config.second_metric)):
        if name is None or name in known:
            continue
        nearest = difflib.get_close_matches(name, known, n=1)
        if name.startswith("evaluation/") and base.evaluation.data is None:
            hint = "there is no evaluation; give overrides.evaluation.data"
        elif nearest:
            hint = f"did you mean {nearest[0]}?"
        else:
            hint = f"it reports {', '.join(sorted(known))}"
        raise UserError(f"{key}: {config.job} never reports {name!r}; {hint}")
    if config.second_metric == config.metric:
        raise UserError(f"second_metric: {config.metric} is the metric already")
    if config.scores_without_labels:
        if (source := config.label_free.data or base.evaluation.data) is None:
            raise UserError("label_free.data: must be given, since the job has no evaluation.data")
        if (num_rows := len(open_rows(source))) < config.label_free.num_clusters:
            raise UserError(
                f"label_free.num_clusters: {config.label_free.num_clusters} clusters of {num_rows} crops; lower it, or "
                "give more crops as label_free.data"
            )
        if base.run.storage is not None and is_remote(base.run.storage):
            raise UserError(
                "run.storage: checkpoints in a bucket cannot be scored without labels; give a shared folder"
            )


def check_scheduler(plan: SweepPlan) -> None:
    """Raise ``UserError`` when trials cannot be stopped or changed as the scheduler would."""
    config, base = plan.config, plan.base
    if config.scheduler.kind == "none":
        return
    if config.metric.startswith("label_free/"):
        raise UserError(
            f"scheduler.kind: {config.metric} is known at the end of a trial only, so there is nothing to stop it by; "
            "set scheduler.kind=none"
        )
    check_at_once(plan)
    if isinstance(config.scheduler, PbtConfig):
        if config.job == "usl":
            raise UserError(
                "scheduler.kind: pbt is for jobs whose checkpoints hold all there is; usl keeps labels beside"
            )
        fixed = must_agree(base)
        for key, dimension in plan.space.dimensions.items():
            if key.startswith(fixed) or key in ("epochs", "rounds"):
                raise UserError(
                    f"space.{key}: cannot change in the middle of a run, as pbt would; take another scheduler"
                )
            if dimension.when:
                raise UserError(f"space.{key}.when: pbt changes every setting; leave conditions out")
        if config.searcher.kind != "random":
            raise UserError(f"searcher.kind: pbt begins with random settings, not with {config.searcher.kind}")


def check_at_once(plan: SweepPlan, fitting: int | None = None) -> None:
    """Raise ``UserError`` when the scheduler needs more trials under way at once than there are.

    ``fitting``: for how many the cluster has room, once that is known.
    """
    if not isinstance(plan.config.scheduler, PbtConfig):
        return
    told = f"scheduler.kind: pbt trains its whole population at once, {plan.num_trials} trials, but"
    if plan.num_trials > plan.config.concurrency:
        raise UserError(f"{told} concurrency is {plan.config.concurrency}; give as many as budget.trials")
    if fitting is not None and plan.num_trials > fitting:
        raise UserError(f"{told} the cluster has room for {fitting}; lower budget.trials or add machines")
