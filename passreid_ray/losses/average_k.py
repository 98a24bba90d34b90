"""Sets of classes that hold K of them on average: few for an image that is easy to tell, many for an ambiguous one."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from passreid_ray.distributed import all_gather, all_reduce_mean, rank, world_size
from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError
from passreid_ray.losses.checks import check_ids, check_matrix


def average_k_loss(
    logits_NC: Tensor,
    set_logits_NC: Tensor,
    ids_N: Tensor,
    k: int = 5,
    *,
    set_weight: float = 1.0,
    negative_weight: float = 1.0,
) -> Tensor:
    """Cross-entropy of ``logits_NC`` plus the loss of ``set_logits_NC`` against pseudo-labels; a scalar.

    The softmax head (``logits_NC``) learns the classes, ids 0..C-1. What it holds to be likely, ``average_k_labels`` of
    its probabilities, are the pseudo-labels Y of the set head (``set_logits_NC``, a sigmoid per class). Its loss is
    ``-sum_c (Y_c log sigmoid_c + negative_weight (1 - Y_c) log(1 - sigmoid_c))``, the mean over rows, and counts
    ``set_weight`` times. Pseudo-labels have no gradient.

    Computed in float32 at least. Every rank must call this with as many rows, and gets the mean over all of them; after
    DDP has averaged gradients they are those of one process. Shapes, ids and a ``k`` that do not fit are a UserError.
    Two-head loss for average-K classification (arXiv:2303.18118). Only its abstract was to be had: the count over the
    batch, ties and the forced true class are our own definition.
    """
    _check(logits_NC, k)
    check_ids("average_k", ids_N, *logits_NC.shape)
    if set_logits_NC.shape != logits_NC.shape:
        raise UserError(
            f"average_k: set logits {tuple(set_logits_NC.shape)} beside logits {tuple(logits_NC.shape)}; "
            "give one of each per row and class"
        )
    if not (set_weight >= 0 and negative_weight >= 0):
        raise UserError(
            f"average_k: set_weight {set_weight} and negative_weight {negative_weight}; give numbers from 0"
        )
    ids_N = ids_N.long()
    with torch.autocast(logits_NC.device.type, enabled=False):
        # Logarithms order the classes as probabilities do, without the ties of those that underflow to 0.
        log_prob_NC = F.log_softmax(at_least_float32(logits_NC), dim=1)
        set_logits_NC = at_least_float32(set_logits_NC)
        label_NC = average_k_labels(log_prob_NC.detach(), ids_N, k).to(set_logits_NC.dtype)
        weight_NC = negative_weight + (1 - negative_weight) * label_NC
        set_loss_NC = F.binary_cross_entropy_with_logits(set_logits_NC, label_NC, weight_NC, reduction="none")
        loss = F.nll_loss(log_prob_NC, ids_N) + set_weight * set_loss_NC.sum(dim=1).mean()
        return all_reduce_mean(loss)


@torch.no_grad()
def average_k_threshold(scores_NC: Tensor, k: int) -> Tensor:
    """The score at or above which the rows of all ranks hold ``k`` classes on average; a scalar.

    Midpoint of the (N k)-th and the (N k + 1)-th largest score, N rows on all ranks together. When these two are equal
    more than ``k`` reach it. Every rank must call this with as many rows; each sends its largest scores only.
    """
    _check(scores_NC, k)
    num_selected = world_size() * len(scores_NC) * k
    return _largest_of_all_ranks(scores_NC, num_selected + 1)[num_selected - 1 :].mean()


@torch.no_grad()
def average_k_labels(scores_NC: Tensor, ids_N: Tensor, k: int) -> Tensor:
    """Mask ``(N, C)`` of the classes that belong to each row: ``k`` per row on average, its own always among them.

    Of the rows of all ranks, N together, the N k largest scores are chosen; of equal ones the first in rank, row and
    class order. A row's own class takes the place of the smallest chosen score, so that the count stays. Every rank
    must call this with as many rows; each sends its largest scores only.
    """
    _check(scores_NC, k)
    check_ids("average_k", ids_N, *scores_NC.shape)
    num_selected = world_size() * len(scores_NC) * k
    # Own classes come first; then the rest of the N k places go to the largest others, which is the same.
    scores_NC = scores_NC.scatter(1, ids_N.long()[:, None], math.inf)
    smallest = _largest_of_all_ranks(scores_NC, num_selected)[-1]
    above_NC, equal_NC = scores_NC > smallest, scores_NC == smallest
    counts_R2 = all_gather(torch.stack([above_NC.sum(), equal_NC.sum()])[None])
    num_equal = num_selected - counts_R2[:, 0].sum() - counts_R2[: rank(), 1].sum()  # left for this rank's equals
    order_NC = equal_NC.flatten().cumsum(0).view_as(equal_NC)
    return above_NC | (equal_NC & (order_NC <= num_equal))


def _largest_of_all_ranks(scores_NC: Tensor, num_largest: int) -> Tensor:
    """The ``num_largest`` largest scores of all ranks, descending."""
    own = scores_NC.flatten()
    own_largest = own.topk(min(num_largest, len(own)), sorted=False).values
    return all_gather(own_largest).topk(num_largest).values


def _check(scores_NC: Tensor, k: int) -> None:
    check_matrix("average_k", "scores", scores_NC, "(N, C)")
    if not 1 <= k < scores_NC.shape[1]:
        raise UserError(f"average_k k: {k} of {scores_NC.shape[1]} classes; give at least 1 and fewer than there are")
