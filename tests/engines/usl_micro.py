"""The smallest unsupervised tuning run that does everything a large one does."""

from pathlib import Path
from typing import Any

from passreid_ray.config import build, to_toml
from passreid_ray.engines.usl_config import USLConfig

ROUNDS, STEPS_PER_ROUND = 3, 4
PEOPLE: dict[str, Any] = {"kind": "synthetic", "num_people": 16, "images_per_person": 12}
SETTINGS: dict[str, Any] = {
    "rounds": ROUNDS,
    "steps_per_round": STEPS_PER_ROUND,
    "batch_size": 8,
    "images_per_identity": 2,
    "drop_path": 0.1,
    "log_every_steps": 1,
    "data": {**PEOPLE, "splits": ["train"]},
    "evaluation": {"every_rounds": 2, "data": PEOPLE},
    "views": {"image_size_px": (64, 32), "pad_px": 2},
    "model": {"trunk": "vit_tiny_patch16_224", "embed_dim": 24, "depth": 2, "num_heads": 2},
    "cluster": {"k1": 8, "k2": 3, "eps": 0.5, "block_rows": 40},
    "optimizer": {"lr": 0.001, "decay_every_rounds": 2},
}


def usl_config(output: Path, **changes: Any) -> USLConfig:
    """Settings of a run below ``output``; ``changes`` replace whole sections or values."""
    return build(USLConfig, {**SETTINGS, "run": {"name": "usl", "output": str(output)}, **changes})


def usl_preset(output: Path) -> Path:
    """The same settings as a preset file below ``output``."""
    path = output / "micro.toml"
    path.write_text(to_toml(usl_config(output)), encoding="utf-8")
    return path
