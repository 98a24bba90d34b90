"""From the tokens of an image to the one feature that is compared."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from passreid_ray.dtypes import at_least_float32

Fusion = Literal["cls", "parts", "cat", "mean"]


def fuse_tokens(tokens_BTD: Tensor, fusion: Fusion) -> Tensor:
    """L2-normalised features of ``(B, 1 + P, D)`` tokens; ``combine_tokens`` says what each fusion is."""
    return F.normalize(combine_tokens(tokens_BTD, fusion), dim=1)


def combine_tokens(tokens_BTD: Tensor, fusion: Fusion) -> Tensor:
    """Features of ``(B, 1 + P, D)`` tokens at the length they come out with, in float32.

    ``cls``: the CLS token, ``(B, D)``; ``parts``: the mean of the part tokens, ``(B, D)``; ``cat``: both side by side,
    ``(B, 2D)``; ``mean``: the mean of both, ``(B, D)``. Without part tokens all are the CLS token.
    Source: PASS (arXiv:2203.03931), section 3.3.
    """
    cls_BD = at_least_float32(tokens_BTD[:, 0])
    if tokens_BTD.shape[1] == 1:
        return cls_BD
    parts_BD = at_least_float32(tokens_BTD[:, 1:]).mean(1)
    match fusion:
        case "cls":
            return cls_BD
        case "parts":
            return parts_BD
        case "cat":
            return torch.cat([cls_BD, parts_BD], dim=1)
        case "mean":
            return (cls_BD + parts_BD) / 2


def fused_width(width: int, num_parts: int, fusion: Fusion) -> int:
    """Width of the features that ``combine_tokens`` makes of tokens of width ``width``."""
    return 2 * width if fusion == "cat" and num_parts else width
