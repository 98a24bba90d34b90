"""Mixed precision: which type a step computes in, on which device."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch.amp.grad_scaler import GradScaler

Precision = Literal["fp32", "bf16", "fp16"]


def load_scaler(scaler: GradScaler, state: Mapping[str, Any]) -> None:
    """Put back a loss scale; one of a run that had none, because its precision was another, is left at the start."""
    if state:
        scaler.load_state_dict(dict(state))


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which models compute; weights stay float32. With ``fp32`` it does nothing."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
