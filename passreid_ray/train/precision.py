"""Mixed precision: which type a step computes in, on which device."""

from typing import Literal

import torch

Precision = Literal["fp32", "bf16", "fp16"]


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """The context in which models compute; weights stay float32. With ``fp32`` it does nothing."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype=dtype, enabled=precision != "fp32")
