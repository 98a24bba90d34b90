"""What losses share whose logits exist for a few rows at a time only."""

# Shape letters: B batch, G global views, V views of one token, R rows (views x images) of a chunk, N rows of a block,
# K prototypes.

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

BLOCK_BYTES = 2**21
"""What the passes between the matmuls work on at a time on a CPU: it stays in its cache."""

GRADIENT_UNIT = 64.0
"""What gradients of logits are multiplied by on their way into a matmul: float16 would lose those of 1 / 65,536."""


def targets_of_views(targets_GBK: Tensor, num_views: int) -> list[Tensor]:
    """Per student view the sum of the other views' targets, ``(B, K)``: cross-entropy is linear in the target."""
    views = list(targets_GBK)
    if len(views) == 1:  # the only global view has no other to learn from
        return [torch.zeros_like(views[0])] + views * (num_views - 1)
    own = [_sum([*views[:view], *views[view + 1 :]]) for view in range(len(views))]
    return own + [_sum(views)] * (num_views - len(views))


def in_matmul_dtype(tensor: Tensor) -> Tensor:
    """``tensor`` in autocast's dtype where it is on, as for ``F.linear``: float64 is kept."""
    device_type = tensor.device.type
    if torch.is_autocast_enabled(device_type) and tensor.dtype != torch.float64:
        return tensor.to(torch.get_autocast_dtype(device_type))
    return tensor


def row_blocks(logits_RK: Tensor, targets: Sequence[Tensor], first: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Consecutive rows of one view each, and their targets; ``first`` is the number of the chunk's first row."""
    batch = len(targets[0])
    row_bytes = logits_RK.shape[1] * logits_RK.element_size()
    at_most = max(1, BLOCK_BYTES // row_bytes) if logits_RK.device.type == "cpu" else batch
    start = 0
    while start < len(logits_RK):
        view, image = divmod(first + start, batch)
        stop = min(start + at_most, start + batch - image, len(logits_RK))
        yield logits_RK[start:stop], targets[view][image : image + stop - start]
        start = stop


def _sum(targets: Sequence[Tensor]) -> Tensor:
    return reduce(torch.add, targets)  # one tensor is handed on, not copied
