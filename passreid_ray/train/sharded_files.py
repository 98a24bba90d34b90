"""A checkpoint of a state of which each rank holds pieces: every rank writes its own file, none gathers the whole.
Reading it, every rank sees all of it for a moment and keeps its share.

It loads on any number of ranks: pieces are equal or nearly equal shares in rank order, so a file needs no more than
the dimension along which its tensors are joined.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from passreid_ray.distributed import agreed, is_sharded, rank, world_size
from passreid_ray.train.state_files import TENSORS_SUFFIX, invalidate, write_meta, write_tensors

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def save_pieces(folder: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write ``tensors``, some of them sharded, and JSON-able ``meta``; every rank must call it with its own pieces.

    Rank 0 writes what is whole and, when all are done, the description. ``load_state`` reads it. Raises
    ``UnwrittenCheckpoint`` on every rank when one of them cannot write.
    """
    sharded = {name: own for name, own in tensors.items() if is_sharded(own)}
    own_pieces: dict[str, Tensor] = {name: own.to_local() for name, own in sharded.items()}
    if rank() == 0:
        own_pieces |= {name: own for name, own in tensors.items() if name not in sharded}
    agreed(lambda: invalidate(folder) if rank() == 0 else None)  # the folder is there
    records = agreed(lambda: write_tensors(folder, _file_name(rank()), own_pieces))

    def describe() -> None:
        if rank() == 0:
            files = {_file_name(index): own for index, own in enumerate(records)}
            write_meta(folder, files, meta, {name: _dimension(own) for name, own in sharded.items()})

    agreed(describe)  # the checkpoint is whole


def _file_name(rank: int) -> str:
    return f"state-{rank:05d}-of-{world_size():05d}{TENSORS_SUFFIX}"


def _dimension(tensor: "DTensor") -> int:
    from torch.distributed.tensor import Shard

    (placement,) = tensor.placements
    assert isinstance(placement, Shard)
    return placement.dim
