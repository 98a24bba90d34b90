"""From the tokens of an image to the one feature that is compared."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Fusion = Literal["cls", "parts", "cat", "mean"]


def fuse_tokens(tokens_BTD: Tensor, fusion: Fusion) -> Tensor:
    """L2-normalised features of ``(B, 1 + P, D)`` tokens.

    ``cls``: the CLS token, ``(B, D)``; ``parts``: the mean of the part tokens, ``(B, D)``; ``cat``: both side by side,
    ``(B, 2D)``; ``mean``: the mean of both, ``(B, D)``. Without part tokens all are the CLS token.
    Source: PASS (arXiv:2203.03931), section 3.3.
    """
    cls_BD = tokens_BTD[:, 0].float()
    parts_BD = tokens_BTD[:, 1:].float().mean(1) if tokens_BTD.shape[1] > 1 else None
    match fusion:
        case _ if parts_BD is None:
            features = cls_BD
        case "cls":
            features = cls_BD
        case "parts":
            features = parts_BD
        case "cat":
            features = torch.cat([cls_BD, parts_BD], dim=1)
        case "mean":
            features = (cls_BD + parts_BD) / 2
    return F.normalize(features, dim=1)
