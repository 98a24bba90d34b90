"""One positive pair per identity against all its negative pairs."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.distributed import all_gather, all_gather_with_gradient
from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError
from passreid_ray.losses.checks import check_choice, check_ids, check_matrix

SparsePositive = Literal["adaptive", "hard", "least_hard"]


def sparse_pairwise_loss(
    features_ND: Tensor, ids_N: Tensor, positive: SparsePositive = "adaptive", temp: float = 0.04
) -> Tensor:
    """``log(1 + exp(n - S / temp))``, the mean over the identities in the batch of all ranks; a scalar.

    With cosine similarities ``s_ab``, self-pairs and both orders of a pair included, an identity i has:

    - ``n = log sum exp(s_ab / temp)`` over a in i and b outside; without another identity its loss is 0.
    - ``S`` for ``hard``: ``S_h = -temp log sum exp(-s_ab / temp)`` over a, b in i, the hardest positive pair (SP-H).
    - ``S`` for ``least_hard``: ``S_lh = temp log sum_a exp(S_a / temp)``, the least hard of the anchors' hardest pairs
      ``S_a = -temp log sum_b exp(-s_ab / temp)`` (SP-LH).
    - ``S`` for ``adaptive``: ``alpha S_h + (1 - alpha) S_lh`` (AdaSP); alpha, the harmonic mean of both, is 0 for a
      negative ``S_h``, stays within [0, 1] and has no gradient.

    Identities may come in groups of any size and in any order. Computed in float32 at least. Every rank must call this
    with as many rows, and gets the value over all of them; after DDP has averaged gradients they are those of one
    process. Shapes and settings that do not fit are a UserError.
    Adaptive Sparse Pairwise Loss (arXiv:2303.18247, section 3).
    """
    check_matrix("sparse_pairwise_loss", "features", features_ND, "(N, D)")
    check_ids("sparse_pairwise_loss", ids_N, len(features_ND))
    check_choice("sparse_pairwise_loss positive", positive, SparsePositive)
    if not temp > 0:
        raise UserError(f"sparse_pairwise_loss temp: {temp}; give a number above 0")
    ids_N = all_gather(ids_N)
    with torch.autocast(features_ND.device.type, enabled=False):
        features_ND = F.normalize(all_gather_with_gradient(at_least_float32(features_ND)), dim=1)
        logits_NN = features_ND @ features_ND.T / temp
        present_I, identity_N = ids_N.unique(return_inverse=True)
        same_NN = identity_N[:, None] == identity_N
        member_IN = torch.arange(len(present_I), device=ids_N.device)[:, None] == identity_N
        pairs_N = _masked_logsumexp(-logits_NN, same_NN)
        hardest_I = -_masked_logsumexp(pairs_N, member_IN)  # S_h / temp
        least_hard_I = _masked_logsumexp(-pairs_N, member_IN)  # S_lh / temp
        negative_I = _masked_logsumexp(_masked_logsumexp(logits_NN, ~same_NN), member_IN)
        match positive:
            case "hard":
                positive_I = hardest_I
            case "least_hard":
                positive_I = least_hard_I
            case "adaptive":
                alpha_I = _alpha(temp * hardest_I.detach(), temp * least_hard_I.detach())
                positive_I = alpha_I * hardest_I + (1 - alpha_I) * least_hard_I
        return F.softplus(negative_I - positive_I).mean()


def _alpha(hardest_I: Tensor, least_hard_I: Tensor) -> Tensor:
    """Weight of the hardest pair in ``adaptive``: near 1 for an identity whose similarities are all high."""
    total_I = (hardest_I + least_hard_I).clamp(min=torch.finfo(hardest_I.dtype).eps)
    return (2 * hardest_I * least_hard_I / total_I).clamp(0, 1).masked_fill(hardest_I < 0, 0)


def _masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """Log-sum-exp along the last dimension of the values in the mask; the lowest finite number where there are none.

    Finite, since a log-sum-exp of nothing but -inf sends NaN back.
    """
    lowest = torch.finfo(values.dtype).min
    return torch.where(mask, values, lowest).logsumexp(dim=-1)
