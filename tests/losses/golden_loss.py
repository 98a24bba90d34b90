"""The golden batch of the reference loss in this project's shapes."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden"
TOKENS = ("cls", "pt1", "pt2", "pt3")
STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9


def load(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDEN / f"{name}.npz", allow_pickle=False))


def views_of(array: np.ndarray) -> Tensor:
    """Rows ``(V * 4, K)``, view after view, as ``(V, 4, K)``."""
    return torch.from_numpy(array).unflatten(0, (-1, 4))


def student_views(golden: dict[str, np.ndarray], step: int, kind: str = "student") -> list[Tensor]:
    """Per token ``(V_t, B, K)``: the global views, then the local ones of every part (CLS) or of its own part."""
    prefix = f"step{step}/{kind}"
    cls = torch.cat([views_of(golden[f"{prefix}/{group}_cls"]) for group in ("g", "p1", "p2", "p3")])
    parts = [
        torch.cat([views_of(golden[f"{prefix}/g_pt{part}"]), views_of(golden[f"{prefix}/p{part}_pt"])])
        for part in (1, 2, 3)
    ]
    return [cls, *parts]


def teacher_views(golden: dict[str, np.ndarray], step: int) -> list[Tensor]:
    """Per token ``(2, B, K)``."""
    return [views_of(golden[f"step{step}/teacher/{token}"]) for token in TOKENS]


def centers(golden: dict[str, np.ndarray], step: int) -> Tensor:
    """``(T, K)`` after ``step``; zeros before the first."""
    if step < 0:
        return torch.zeros(4, golden["step0/center_cls"].shape[-1])
    return torch.from_numpy(np.concatenate([golden[f"step{step}/center_{token}"] for token in TOKENS]))
