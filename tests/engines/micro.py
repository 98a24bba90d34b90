"""The smallest pre-training run that does everything a large one does."""

from pathlib import Path
from typing import Any

from passreid_ray.config import build, to_toml
from passreid_ray.engines.pretrain import PretrainConfig

STEPS_PER_EPOCH = 6
SETTINGS: dict[str, Any] = {
    "epochs": 6,  # long enough to be killed in the middle on a busy machine
    "batch_size": 8,
    "log_every_steps": 1,
    "data": {"kind": "synthetic", "num_people": 8, "images_per_person": 12, "splits": ["train"]},
    "evaluation": {"every_epochs": 2, "data": {"kind": "synthetic", "num_people": 8, "images_per_person": 12}},
    "views": {"global_size_px": (64, 32), "local_size_px": (32, 16), "local_views_per_part": 1},
    "model": {"trunk": "vit_tiny_patch16_224", "embed_dim": 24, "depth": 2, "num_heads": 2},
    "head": {"num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
    "optimizer": {"warmup_epochs": 1, "lr": 0.01},
}


IN_PROCESS = {"num_workers": 0}
"""``workers`` of a run whose worker is this process: for tests of what does not depend on where it is."""


def micro_config(output: Path, **changes: Any) -> PretrainConfig:
    """Settings of a run below ``output``; ``changes`` replace whole sections or values."""
    return build(PretrainConfig, {**SETTINGS, "run": {"output": str(output)}, **changes})


def micro_preset(output: Path) -> Path:
    """The same settings as a preset file below ``output``."""
    path = output / "micro.toml"
    path.write_text(to_toml(micro_config(output)), encoding="utf-8")
    return path
