"""How the workers of a run share its weights: a copy on each, or pieces of some or all of them."""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from passreid_ray.config import Section
from passreid_ray.distributed import is_active, is_sharded, world_size
from passreid_ray.errors import UserError
from passreid_ray.losses.sharded_prototypes import shard_rows
from passreid_ray.models.pass_model import PassModel
from passreid_ray.train.pass_student import PassStudent
from passreid_ray.train.precision import Precision

Strategy = Literal["copies", "sharded_prototypes", "fsdp"]
"""Whole weights on every worker (DDP); all whole but the prototypes, of which each holds K / W; or pieces of all."""


class SharingConfig(Section):
    """How several workers share weights and gradients. Results depend on it by rounding only."""

    strategy: Strategy = "copies"
    """"copies": DDP. "sharded_prototypes": DDP, and each worker holds its share of the prototypes, whose gradients are
    then not sent; for many prototypes. "fsdp": FSDP2 too, each worker holds its share of all weights and of the
    optimiser's state; for large trunks."""
    bucket_mb: float = Field(default=25.0, gt=0)
    """Size of the pieces (MB) in which DDP sends gradients while backward goes on."""
    compress_gradients: bool = False
    """DDP sends gradients as bf16: half the bytes, and gradients rounded to 8 bits."""


def check_sharing(
    strategy: Strategy, num_prototypes: int, num_workers: int, precision: Precision, *, hides_patches: bool = False
) -> None:
    """Raise ``UserError`` when a run's weights cannot be shared in this way."""
    if strategy == "copies" or num_workers == 1:
        return
    shard_rows(num_prototypes, 0, num_workers)
    if strategy == "fsdp" and hides_patches:
        raise UserError(
            'sharing.strategy: "fsdp" does not go with masked_patch.weight > 0, whose head is whole on every worker; '
            'take sharing.strategy = "sharded_prototypes" or "copies"'
        )
    if precision == "fp16":
        raise UserError(
            f'sharing.strategy: {strategy!r} does not go with precision = "fp16", whose loss scale needs all gradients '
            'on every worker; take precision = "bf16", or sharing.strategy = "copies"'
        )


def shard(forward: PassStudent, teacher: PassModel, centers_TK: Tensor, strategy: Strategy) -> Tensor:
    """Leave each rank its pieces of student and teacher, which all ranks have alike; the centers, sharded likewise.

    Source of FSDP: arXiv:2304.11277; of prototypes that are shared out: ``losses.sharded_prototypes``.
    """
    if strategy == "copies" or not is_active():
        return centers_TK
    mesh = init_device_mesh(centers_TK.device.type, (world_size(),))
    for model in (forward.model, teacher):
        _shard_prototypes(model, mesh)
    if strategy == "fsdp":
        _shard_weights(forward.model, forward, mesh)
        _shard_weights(teacher, teacher.backbone, mesh)
    return distribute_tensor(centers_TK, mesh, [Shard(1)], src_data_rank=None)


def average_gradients(forward: nn.Module, sharing: SharingConfig | None = None) -> nn.Module:
    """``forward`` with the gradients of its whole weights averaged over all ranks in backward, by DDP where needed."""
    whole = [name for name, own in forward.named_parameters() if own.requires_grad and not is_sharded(own)]
    if not is_active() or not whole:
        return forward
    sharing = sharing or SharingConfig()
    sharded = [name for name, own in forward.named_parameters() if is_sharded(own)]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(forward, sharded)
    # Buffers stay equal by themselves: whatever writes them gathers over all workers first. No device_ids: inputs
    # are where they belong, and grids of patches belong on the CPU.
    network = DistributedDataParallel(
        forward, forward_sync_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=sharing.bucket_mb
    )
    if sharing.compress_gradients:
        network.register_comm_hook(None, bf16_compress_hook)
    return network


@torch.no_grad()
def _shard_prototypes(model: PassModel, mesh: DeviceMesh) -> None:
    for prototypes in model.head.prototypes():
        for name, own in list(prototypes.named_parameters()):
            sharded = distribute_tensor(own.detach(), mesh, [Shard(0)], src_data_rank=None)
            prototypes.register_parameter(name, nn.Parameter(sharded, requires_grad=own.requires_grad))


def _shard_weights(model: PassModel, root: nn.Module, mesh: DeviceMesh) -> None:
    # Pieces are gathered block by block and given back at once. Prototypes are pieces already, and are never gathered.
    prototypes = {own for layer in model.head.prototypes() for own in layer.parameters()}
    for unit in [*model.backbone.blocks, *model.head.mlps(), root]:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=prototypes)
