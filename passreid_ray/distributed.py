"""Collectives that also work without a process group, where they are the identity.

Whatever is computed over a batch must not depend on how many workers share it; these are the pieces it is built from.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

T = TypeVar("T")


def is_active() -> bool:
    """Whether a process group of more than one rank exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if is_active() else 0


def world_size() -> int:
    """Number of processes; 1 without a process group."""
    return dist.get_world_size() if is_active() else 1


class _AllReduceSum(torch.autograd.Function):
    # The gradient of a sum that every rank receives is the sum of every rank's gradient. torch.distributed.nn has the
    # same, but is deprecated in parts and warns on gloo.
    @staticmethod
    def forward(ctx: object, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum of ``tensor`` over all ranks, on every rank, with gradient."""
    return cast(Tensor, _AllReduceSum.apply(tensor)) if is_active() else tensor


def all_reduce_mean(tensor: Tensor) -> Tensor:
    """Mean of ``tensor`` over all ranks, on every rank, with gradient."""
    return all_reduce_sum(tensor) / world_size()


def all_gather(tensor: Tensor) -> Tensor:
    """Rows of every rank's ``tensor`` (equal shapes), concatenated along dim 0 in rank order, without gradient."""
    if not is_active():
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.detach().contiguous())
    return torch.cat(parts)


def all_gather_with_gradient(tensor: Tensor) -> Tensor:
    """Like ``all_gather``, with gradient.

    When every rank computes the same loss of the result, averaging parameter gradients over ranks (DDP) gives the
    gradient of that loss.
    """
    if not is_active():
        return tensor
    # A sum of tensors that are zero but for the rank's own rows: its gradient is the sum of all ranks' gradients.
    length = len(tensor)
    rows = slice(rank() * length, (rank() + 1) * length)
    placed = tensor.new_zeros(world_size() * length, *tensor.shape[1:]).index_copy(
        0, torch.arange(rows.start, rows.stop, device=tensor.device), tensor
    )
    return all_reduce_sum(placed)


def all_to_all(tensor_WN: Tensor) -> Tensor:
    """``tensor_WN[r]`` goes to rank r; what every rank had for this one, in rank order, without gradient."""
    if not is_active():
        return tensor_WN
    received_WN = torch.empty_like(tensor_WN, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received_WN, tensor_WN.detach().contiguous())
    return received_WN


def is_sharded(tensor: Tensor) -> "TypeGuard[DTensor]":
    """Whether each rank holds a piece of ``tensor`` only."""
    from torch.distributed.tensor import DTensor  # costs a second, which a command that is refused need not take

    return isinstance(tensor, DTensor)


def local_part(tensor: Tensor) -> Tensor:
    """This rank's piece of a sharded tensor, with gradient; any other tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def gathered(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank, which must all ask for it; any other tensor itself."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def sharded_like(whole: Tensor, like: Tensor) -> Tensor:
    """``whole``, which every rank has, on the device of ``like`` and sharded as it is; nothing is sent."""
    whole = whole.to(like.device)
    if not is_sharded(like):
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def restore(target: Tensor, whole: Tensor) -> None:
    """Copy ``whole``, which every rank has, into ``target``, or this rank's piece of it."""
    local_part(target).copy_(local_part(sharded_like(whole, target)))


def all_gather_objects(value: object) -> list[Any]:
    """Every rank's ``value``, which must pickle, in rank order."""
    values: list[Any] = [value] * world_size()
    if is_active():
        dist.all_gather_object(values, value)
    return values


def agreed(work: Callable[[], T]) -> list[T]:
    """What ``work`` returned on every rank, in rank order; what it raises on one of them, all ranks raise.

    A rank that fails alone would leave the others waiting for it. ``OSError`` and ``ValueError`` (so ``UserError``) are
    shared; any other is a bug and ends its rank.
    """
    try:
        outcome: T | Exception = work()
    except (OSError, ValueError) as error:
        outcome = error
    outcomes = all_gather_objects(outcome)
    for one in outcomes:
        if isinstance(one, Exception):
            raise one
    return outcomes


def barrier() -> None:
    """Wait until every rank is here."""
    if is_active():
        dist.barrier()
