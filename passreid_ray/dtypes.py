"""Where half precision ends."""

import torch
from torch import Tensor


def at_least_float32(tensor: Tensor) -> Tensor:
    """``tensor`` in float32, or as it is when it is float64: norms and losses are not computed in half precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
