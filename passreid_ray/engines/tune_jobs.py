"""The jobs that a sweep can search over: their settings, their engines, and what they report."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path

from rich.console import Console

from passreid_ray.config import Section
from passreid_ray.engines import finetune, pretrain, usl
from passreid_ray.engines.board import Listener
from passreid_ray.engines.finetune_config import FinetuneConfig
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.engines.tune_config import JobName, Mode
from passreid_ray.engines.usl_config import MUST_AGREE as USL_MUST_AGREE
from passreid_ray.engines.usl_config import USLConfig
from passreid_ray.retrieval.health import ClusterHealth
from passreid_ray.train.pass_rates import PassRates

JobConfig = PretrainConfig | USLConfig | FinetuneConfig
INTERVAL = (
    *("loss", "grad_norm", "images_per_second", "data_wait_share", "peak_memory_bytes", "data_object_store_bytes"),
    *("refused_steps", "lr"),
)
"""Metrics of every record of an interval of training."""
EVALUATION = tuple(f"evaluation/{name}" for name in ("mAP", "mINP", "rank1", "rank5", "rank10"))
LABEL_FREE: dict[str, Mode] = {
    "label_free/kl": "min",
    "label_free/effective_rank": "max",
    "label_free/uniformity": "min",
}
"""Scores of features without labels, and which end of each should be the better."""


@dataclass(frozen=True)
class Job:
    """One of the jobs, as ``jobs/<name>.py`` runs it."""

    name: JobName
    config_cls: type[Section]
    run: Callable[[JobConfig, Console, Listener | None], Path]


def job_of(name: JobName) -> Job:
    """The job of that name."""
    match name:
        case "pretrain":
            return Job(name, PretrainConfig, pretrain.run)  # pyright: ignore[reportArgumentType]
        case "usl":
            return Job(name, USLConfig, usl.run)  # pyright: ignore[reportArgumentType]
        case "finetune":
            return Job(name, FinetuneConfig, finetune.run)  # pyright: ignore[reportArgumentType]


def must_agree(config: JobConfig) -> tuple[str, ...]:
    """Settings, or beginnings of them, that a run which goes on from a checkpoint must share with its beginning."""
    match config:
        case PretrainConfig():
            return pretrain.MUST_AGREE
        case USLConfig():
            return USL_MUST_AGREE
        case FinetuneConfig():
            return config.must_agree


def reported_metrics(config: JobConfig) -> set[str]:
    """Names of what a run of ``config`` logs as it trains, but for what depends on chance."""
    names = {*INTERVAL, *(EVALUATION if config.evaluation.data is not None else ())}
    match config:
        case PretrainConfig():
            tokens = ["cls", *(f"part{part}" for part in range(config.views.num_parts))]
            by_token = ("loss", "teacher_entropy", "kl", "feature_std")
            of_tokens = {f"{name}/{token}" for name in by_token for token in tokens}
            of_patches = {f"{name}/patches" for name in by_token[:3]} if config.masked_patch.weight > 0 else set()
            return names | {own.name for own in fields(PassRates)} | of_tokens | of_patches
        case USLConfig():
            refined = {"loss/refined"} if config.refine.kind != "none" else set()
            clusters = {f"cluster/{own.name}" for own in fields(ClusterHealth)}
            return names | {"round", "loss/features", "cluster/eps"} | refined | clusters
        case FinetuneConfig():
            ranking = {"ranking/mined_loss", "ranking/random_loss", "ranking/staleness_steps", "loss/ranking"}
            losses = {f"loss/{name}" for name in config.losses.in_use}
            return names | {"epoch"} | losses | (ranking if config.ranking.steps else set())
