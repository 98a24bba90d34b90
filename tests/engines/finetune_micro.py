"""The smallest supervised tuning run that does everything a large one does."""

from pathlib import Path
from typing import Any

from passreid_ray.config import build, to_toml
from passreid_ray.engines.finetune_config import FinetuneConfig

EPOCHS, STEPS_PER_EPOCH = 2, 6
RANKING_STEPS, REFRESH_STEPS = 7, 3
LAST_STEP = EPOCHS * STEPS_PER_EPOCH + RANKING_STEPS
PEOPLE: dict[str, Any] = {"kind": "synthetic", "num_people": 12, "images_per_person": 8}
SETTINGS: dict[str, Any] = {
    "epochs": EPOCHS,
    "batch_size": 8,
    "images_per_identity": 2,
    "log_every_steps": 1,
    "average_decay": 0.5,
    "data": {**PEOPLE, "splits": ["train"]},
    "evaluation": {"every_epochs": 2, "data": PEOPLE},
    "views": {"image_size_px": (64, 32), "pad_px": 2},
    "model": {"trunk": "vit_tiny_patch16_224", "embed_dim": 24, "depth": 2, "num_heads": 2},
    "losses": {"center": {"weight": 0.001}, "am_softmax": {"weight": 0.1}},
    "optimizer": {"lr": 0.01, "warmup_epochs": 1},
    "ranking": {
        "steps": RANKING_STEPS,
        "triplets_per_step": 4,
        "refresh_steps": REFRESH_STEPS,
        "pool_size": 40,
        "num_hardest": 5,
        "checkpoint_every_minings": 1,
        "evaluate_every_steps": 3,
        "lr": 0.01,
    },
}


def finetune_config(output: Path, **changes: Any) -> FinetuneConfig:
    """Settings of a run below ``output``; ``changes`` replace whole sections or values."""
    return build(FinetuneConfig, {**SETTINGS, "run": {"name": "finetune", "output": str(output)}, **changes})


def finetune_preset(output: Path) -> Path:
    """The same settings as a preset file below ``output``."""
    path = output / "micro.toml"
    path.write_text(to_toml(finetune_config(output)), encoding="utf-8")
    return path
