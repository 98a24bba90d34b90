"""Batch norm whose batch is the batch of all ranks, so that W workers train the statistics that one would.

``torch.nn.SyncBatchNorm`` does the same on GPUs only; this one also works on gloo.
"""

import torch
from torch import Tensor, nn

from passreid_ray import distributed


class BatchNorm1d(nn.BatchNorm1d):
    """``nn.BatchNorm1d`` over the rows of all ranks; identical to it on one rank and in eval mode."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(B, C)`` or ``(B, C, L)``; every rank must call it the same number of times."""
        return _over_all_ranks(self, input) if self.training and distributed.is_active() else super().forward(input)


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` over the images of all ranks; identical to it on one rank and in eval mode."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(B, C, H, W)``; every rank must call it the same number of times."""
        return _over_all_ranks(self, input) if self.training and distributed.is_active() else super().forward(input)


def _over_all_ranks(norm: nn.BatchNorm1d | nn.BatchNorm2d, input: Tensor) -> Tensor:
    # Statistics of half precision activations are taken in float32, as torch's own kernels do.
    x = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    axes = [axis for axis in range(x.ndim) if axis != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)

    sums = distributed.all_reduce_sum(torch.cat([x.sum(axes), x.new_tensor([x.numel() / x.shape[1]])]))
    count = sums[-1].detach()
    mean_C = sums[:-1] / count
    # Two passes: a sum of squares minus a squared mean would cancel.
    centred = x - mean_C.view(shape)
    variance_C = distributed.all_reduce_sum(centred.square().sum(axes)) / count

    _update_running(norm, mean_C.detach(), variance_C.detach() * count / (count - 1).clamp(min=1))
    output = centred * torch.rsqrt(variance_C + norm.eps).view(shape)
    if norm.affine:
        output = output * norm.weight.view(shape) + norm.bias.view(shape)
    return output.to(input.dtype)


@torch.no_grad()
def _update_running(norm: nn.BatchNorm1d | nn.BatchNorm2d, mean_C: Tensor, unbiased_variance_C: Tensor) -> None:
    if norm.running_mean is None or norm.running_var is None or norm.num_batches_tracked is None:
        return
    norm.num_batches_tracked.add_(1)
    factor = norm.momentum if norm.momentum is not None else 1.0 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(mean_C.to(norm.running_mean.dtype), factor)
    norm.running_var.lerp_(unbiased_variance_C.to(norm.running_var.dtype), factor)
