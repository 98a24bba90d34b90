"""Settings of a sweep: which job, which of its settings are searched, by what, and how much it may cost."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from passreid_ray.config import Section, UserPath
from passreid_ray.data import Source
from passreid_ray.engines.run_folder import folder_name

Mode = Literal["min", "max"]
JobName = Literal["pretrain", "usl", "finetune"]


class NoScheduler(Section):
    """Every trial runs to its end."""

    kind: Literal["none"] = "none"


class AshaConfig(Section):
    """Asynchronous successive halving (arXiv:1810.05934): at rungs, trials that are not among the best stop."""

    kind: Literal["asha"] = "asha"
    grace: float = Field(default=0.25, gt=0, lt=1)
    """Share of a run before the first rung."""
    reduction: int = Field(default=3, ge=2)
    """One of so many trials goes on at a rung; the next rung is so many times as far."""


class HyperBandConfig(Section):
    """HyperBand (arXiv:1603.06560), asynchronous: as asha, with brackets of trials whose first rungs differ."""

    kind: Literal["hyperband"] = "hyperband"
    grace: float = Field(default=0.1, gt=0, lt=1)
    """Share of a run before the first rung of the first bracket."""
    reduction: int = Field(default=3, ge=2)
    """One of so many trials goes on at a rung; the next rung, and the next bracket's first, is so many times as far."""
    brackets: int = Field(default=2, ge=1)
    """How many; a trial is put into one at random."""


class MedianConfig(Section):
    """A trial stops that is worse than the median of the others' averages at the same point (Vizier)."""

    kind: Literal["median"] = "median"
    grace: float = Field(default=0.25, gt=0, lt=1)
    """Share of a run before any trial stops."""
    min_trials: int = Field(default=3, ge=1)
    """Trials that must have come as far before one is compared with them."""


class PbtConfig(Section):
    """Population based training (arXiv:1711.09846): bad trials go on from good ones' checkpoints with new settings."""

    kind: Literal["pbt"] = "pbt"
    interval: float = Field(default=0.25, gt=0, lt=1)
    """Share of a run between exchanges."""
    quantile: float = Field(default=0.25, gt=0, le=0.5)
    """Share of the trials that give up, and that are copied."""
    resample: float = Field(default=0.25, ge=0, le=1)
    """How often a setting is drawn anew, not changed by a factor."""


class RandomConfig(Section):
    """Settings drawn at random."""

    kind: Literal["random"] = "random"


class GridConfig(Section):
    """All combinations of choices and whole numbers, one after the other."""

    kind: Literal["grid"] = "grid"


class OptunaConfig(Section):
    """Optuna: new settings where good ones were found."""

    kind: Literal["optuna"] = "optuna"
    sampler: Literal["tpe", "cmaes"] = "tpe"
    """Tree-structured Parzen estimators, which take any space and two metrics; or CMA-ES, for ranges and one metric."""
    startup_trials: int = Field(default=6, ge=1)
    """Trials that are drawn at random first."""


class EvolutionConfig(Section):
    """Weights of losses that evolve at a constant sum, so that the learning rate does not (ELo, arXiv:2002.12177)."""

    kind: Literal["evolution"] = "evolution"
    weights: list[str] = Field(default=[])
    """Settings of the job that are weights, such as losses.identity.weight or token_weights.0."""
    total: float | None = Field(default=None, gt=0)
    """Their sum; none: how many they are."""
    strategy: Literal["mu_lambda", "cma_es"] = "mu_lambda"
    """How the next generation is made: parents, their mean and mutation, or CMA-ES."""
    population: int = Field(default=12, ge=2)
    """Individuals of a generation, each of them a trial."""
    parents: int = Field(default=3, ge=1)
    """The best of a generation, from which the next is made; of mu_lambda."""


class LabelFreeConfig(Section):
    """How good features are is guessed without labels at the end of each trial, as label_free/* (ELo)."""

    enabled: bool | Literal["auto"] = "auto"
    """auto: when it is a metric of the sweep or the searcher is evolution."""
    data: Source | None = None
    """Crops that were not learnt from; none: those of the job's evaluation, without their labels."""
    num_clusters: int = Field(default=20, ge=2)
    """Clusters of k-means; about as many as there are people."""
    num_starts: int = Field(default=8, ge=1)
    """Starts of k-means that the score is the mean of; a single one is mostly chance where runs differ little."""
    prior: Literal["zipf", "uniform"] = "zipf"
    """How large the clusters should be, largest first."""
    exponent: float = Field(default=1.0, gt=0)
    """Of zipf."""


class SweepFolder(Section):
    """Name and place of a sweep. The same name continues the sweep that is there."""

    name: Annotated[str, AfterValidator(folder_name)] = "sweep"
    """Name of the sweep and of its folder."""
    output: UserPath = Path("outputs")
    """Folder that holds the folders of sweeps; on a cluster one that all nodes share."""

    @property
    def folder(self) -> Path:
        """The sweep's own folder."""
        return (self.output / self.name).absolute()


class BudgetConfig(Section):
    """How much a sweep may cost, trials of earlier calls included."""

    trials: int = Field(default=12, ge=1)
    """Trials in all, whatever becomes of them."""
    hours: float | None = Field(default=None, gt=0)
    """Hours in all; none: as long as it takes. Trials that are under way then can be continued with more."""


class TuneConfig(Section):
    """Everything a sweep is made of."""

    run: SweepFolder = SweepFolder()
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Decides what is searched next; the trials themselves have the seed of their job."""
    job: JobName = "pretrain"
    """The job that is searched over."""
    preset: str = "pretrain_synthetic"
    """Preset of the job: a path, or the name of one that comes with it."""
    overrides: dict[str, Any] = Field(default={})
    """Settings of the job that are the same in all trials, as tables: overrides.epochs=3."""
    space: dict[str, Any] = Field(default={})
    """What is searched: a table for each setting of the job, such as [space.optimizer.lr], with kind = "choice" and its
    values, or kind = "uniform", "log_uniform" or "integer" and low and high; when = {key = value}: only where another
    searched setting has that value."""
    metric: str = "evaluation/mAP"
    """What is judged by: the last value that the job reports under this name."""
    mode: Mode = "max"
    """Whether more of it is better."""
    second_metric: str | None = None
    """A metric to be traded against the first, such as images_per_second; none: one alone."""
    second_mode: Mode = "max"
    """Whether more of the second metric is better."""
    budget: BudgetConfig = BudgetConfig()
    concurrency: int = Field(default=2, ge=1)
    """Trials at once; fewer when the cluster has no room."""
    retries: int = Field(default=1, ge=0)
    """How often a trial that crashed is tried again, from its checkpoint, before it counts as failed."""
    scheduler: Annotated[
        NoScheduler | AshaConfig | HyperBandConfig | MedianConfig | PbtConfig, Field(discriminator="kind")
    ] = NoScheduler()
    """Which trials end early."""
    searcher: Annotated[RandomConfig | GridConfig | OptunaConfig | EvolutionConfig, Field(discriminator="kind")] = (
        RandomConfig()
    )
    """What is tried next."""
    label_free: LabelFreeConfig = LabelFreeConfig()

    @property
    def metrics(self) -> dict[str, Mode]:
        """The metrics of the sweep and their modes."""
        second: dict[str, Mode] = {} if self.second_metric is None else {self.second_metric: self.second_mode}
        return {self.metric: self.mode, **second}

    @property
    def scores_without_labels(self) -> bool:
        """Whether ``label_free/*`` are made."""
        if self.label_free.enabled != "auto":
            return self.label_free.enabled
        return isinstance(self.searcher, EvolutionConfig) or any(
            name.startswith("label_free/") for name in self.metrics
        )


# What may differ when a sweep is continued, of its own settings and of those of its job.
MAY_CHANGE = ("run.", "budget.", "concurrency", "retries", "preset", "overrides.")  # the last two: what they make of it
JOB_MAY_CHANGE = ("run.", "workers.")
