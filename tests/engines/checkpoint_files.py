"""Small checkpoints of every format, and their conversion."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from passreid_ray.config import build
from passreid_ray.engines.convert import run
from passreid_ray.engines.convert_config import ConvertConfig
from passreid_ray.models import ReidModel, official_supervised_state_dict, official_usl_state_dict
from passreid_ray.models.config import HeadConfig
from passreid_ray.train.finetune_state import IDENTITY_CLASSIFIER
from passreid_ray.train.state_files import save_state
from tests.models.test_reid_formats import random_model

HEADS = {"num_heads": 3}
MODEL = {"trunk": "vit_tiny_patch16_224", "embed_dim": 48, "depth": 2, **HEADS}
VIEWS = {"image_size_px": [64, 32], "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}


def convert(source: Path, output: Path, form: str, **settings: Any) -> tuple[Path, str]:
    """The output, and what was said."""
    console = Console(record=True, soft_wrap=True, file=io.StringIO())
    values = {"checkpoint": str(source), "output": str(output), "format": form, "model": HEADS, **settings}
    return run(build(ConvertConfig, values), console), console.export_text()


def own_run(folder: Path, model: ReidModel, /, **config: Any) -> Path:
    """A tuning run's checkpoint of ``model``; with ``feature`` among the settings one of supervised tuning."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {"optimizer.exp_avg.a": torch.zeros(3), "optimizer.exp_avg.b": torch.zeros(3)}
    if "feature" in config:
        tensors[IDENTITY_CLASSIFIER] = torch.randn(7, model.feature_width)
    neck = {"fusion": model.fusion, "neck": model.neck}
    settings = {"model": MODEL, "num_parts": model.backbone.num_parts, "neck": neck, "views": VIEWS, **config}
    save_state(folder, tensors, {"step": 12, "best_mAP": 0.5, "round": 3, "config": settings})
    return folder


def own_pretraining(folder: Path) -> Path:
    tensors = {"centers": torch.randn(4, 16), "optimizer.x": torch.zeros(2)}
    for who in ("student", "teacher"):
        head = HeadConfig(num_prototypes=16, hidden_dim=8, bottleneck_dim=4).build(48, 4)
        tensors |= {f"{who}.backbone.{key}": value for key, value in random_model().backbone.state_dict().items()}
        tensors |= {f"{who}.head.{key}": value for key, value in head.state_dict().items()}
    views = {"global_size_px": [64, 32], "num_parts": 3, "mean": [0.4, 0.4, 0.4], "std": [0.2, 0.2, 0.2]}
    save_state(folder, tensors, {"step": 12, "config": {"model": MODEL, "views": views}})
    return folder


def supervised_file(path: Path, model: ReidModel) -> Path:
    torch.save(official_supervised_state_dict(model, torch.randn(7, model.feature_width)), path)
    return path


def unsupervised_file(path: Path, model: ReidModel) -> Path:
    torch.save({"state_dict": official_usl_state_dict(model), "epoch": 9, "best_mAP": np.float64(0.75)}, path)
    return path


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name
