"""The files below ``deploy/``, read as their tools would read them."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from passreid_ray.config import load_config
from passreid_ray.engines.fit import LEAVE_SECONDS
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.train.shares import check_shared

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
LAUNCHER_FILES = ("aws.yaml", "gcp.yaml")
KUBERAY_FILES = ("kuberay-raycluster.yaml", "kuberay-rayjob.yaml")
SHARED = "/mnt/passreid"
LUPERSON_ROWS = 4_000_000


def text_of(name: str) -> str:
    """A file as it is."""
    return (DEPLOY / name).read_text(encoding="utf-8")


def documents(name: str) -> dict[str, dict[str, Any]]:
    """The objects in a YAML file by their kind; a launcher file is one object of kind ""."""
    return {document.get("kind", ""): document for document in yaml.safe_load_all(text_of(name))}


def submitted(text: str) -> list[str]:
    """The arguments of the first ``python .../jobs/pretrain.py`` in ``text``, over ``#`` and line ends."""
    words = shlex.split(text.replace("\\\n", " "))
    start = next(index for index, word in enumerate(words) if word.endswith("jobs/pretrain.py"))
    arguments = []
    for word in words[start + 1 :]:
        if "=" not in word and not word.startswith("pretrain_"):
            break
        arguments.append(word)
    return arguments


def check_follows_spot_nodes(config: PretrainConfig, least: int, most: int) -> None:
    """Fail unless a run starts on ``least`` workers, is at home on up to ``most`` and outlives any lost node.

    Raises ``UserError`` for a number of workers in between that cannot share a batch, or data as large as LUPerson.
    """
    workers = config.workers
    assert workers.is_range
    assert workers.sizes[0] == least
    assert workers.world_size <= most
    check_shared("batch_size", "images", config.batch_size, workers.sizes, micro_batches=config.micro_batches)
    for size in workers.sizes:
        starts = np.arange(0, LUPERSON_ROWS, 1000)
        config.order.build(starts, LUPERSON_ROWS, batch_size=config.batch_size, seed=0, num_workers=size)
        share = config.batch_size // size
        assert share // config.micro_batches_of(size) <= 128, "more images at a time than as published"
    assert workers.max_failures == -1
    assert config.run.checkpoint_every_steps is not None


def leaves_time_to_save(seconds: str) -> bool:
    """Whether ``ray job stop`` that waits so long lets a job save its checkpoint."""
    return int(seconds) > LEAVE_SECONDS


def preset_with(arguments: list[str]) -> PretrainConfig:
    """The settings of a pre-training job with these arguments."""
    return load_config(PretrainConfig, arguments, presets=ROOT / "jobs" / "presets")
