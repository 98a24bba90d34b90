"""A batch for the losses of an identity classifier, and what their tests work out from it."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ClassifierLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Of features (or inputs of a linear classifier), weights per class and ids."""


def batch(
    seed: int, num_rows: int = 8, num_classes: int = 5, width: int = 6, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Features, weights, ids; two of three features lean towards their own class."""
    generator = torch.Generator().manual_seed(seed)
    weights_CD = torch.randn(num_classes, width, generator=generator, dtype=dtype)
    ids_N = torch.randint(num_classes, (num_rows,), generator=generator)
    lean_N1 = torch.randint(3, (num_rows, 1), generator=generator).clamp(max=1)
    return (
        torch.randn(num_rows, width, generator=generator, dtype=dtype) + lean_N1 * weights_CD[ids_N],
        weights_CD,
        ids_N,
    )


def cosines(features_ND: Tensor, weights_CD: Tensor) -> Tensor:
    return F.cosine_similarity(features_ND[:, None], weights_CD[None], dim=2)


def cross_entropy(logits_NC: Tensor, ids_N: Tensor) -> Tensor:
    """Row by row: the log of the sum of exponentials, less the own logit."""
    return torch.stack([row.logsumexp(0) - row[i] for row, i in zip(logits_NC, ids_N.tolist(), strict=True)]).mean()


def gradients(
    loss_of: ClassifierLoss, features_ND: Tensor, weights_CD: Tensor, ids_N: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, its gradient to the features, its gradient to the weights."""
    features_ND, weights_CD = (tensor.detach().clone().requires_grad_() for tensor in (features_ND, weights_CD))
    loss = loss_of(features_ND, weights_CD, ids_N)
    loss.backward()
    assert features_ND.grad is not None
    assert weights_CD.grad is not None
    return loss.detach(), features_ND.grad, weights_CD.grad
