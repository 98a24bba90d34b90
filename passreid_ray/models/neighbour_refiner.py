"""Features refined by those of their neighbours, before clustering and inside a batch."""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from passreid_ray.distributed import all_gather_with_gradient, rank
from passreid_ray.errors import UserError


class NeighbourRefiner(nn.Module):
    """Graph correlation learning: every feature is moved towards the neighbours that it correlates with.

    Per layer ``a_ij = softmax over neighbours j of i of cos(W_q f_i, W_k f_j) / temp`` and
    ``f_i <- normalize(f_i + strength sum_j a_ij W_v f_j)``. The matrices start as the identity, so it is of use before
    it has learnt anything. Inputs are L2-normalised here; everything is in float32, also under autocast.

    Named after "Mind Your Clever Neighbours" (arXiv:2112.01839). Only that paper's abstract was to be had: the formula
    is our own definition. With more than two layers, identities that lie close are merged.
    """

    def __init__(self, width_D: int, num_layers: int = 1, temp: float = 0.1, strength: float = 1.0) -> None:
        super().__init__()
        if width_D < 1 or num_layers < 1:
            raise UserError(f"NeighbourRefiner: width {width_D} and {num_layers} layers; give at least 1 of each")
        if temp <= 0:
            raise UserError(f"NeighbourRefiner temp: {temp}; give a number above 0")
        self.layers = nn.ModuleList(NeighbourLayer(width_D, temp, strength) for _ in range(num_layers))

    def forward(self, features_ND: Tensor, neighbours_Nk: Tensor) -> Tensor:
        """All rows of a graph refined, ``(N, D)`` of unit length.

        ``neighbours_Nk``: indices of each row's neighbours; -1 and the row's own index are left out, and a row with
        nothing else stays as it is.
        """
        row_N = torch.arange(len(features_ND), device=features_ND.device)
        for layer in self.layers:
            features_ND = layer(features_ND, row_N, neighbours_Nk)
        return features_ND

    def refine_batch(self, features_ND: Tensor, num_neighbours: int) -> Tensor:
        """This rank's rows refined by their nearest neighbours in the batch of all ranks, ``(N, D)``.

        Every rank must call this, with as many rows, and run a backward pass through the result. The neighbours are
        the ``num_neighbours`` most similar other rows, or all of them in a smaller batch. Parameter gradients of each
        rank's mean loss, averaged over ranks (DDP), are those of one process with the whole batch.
        """
        if num_neighbours < 1:
            raise UserError(f"NeighbourRefiner num_neighbours: {num_neighbours}; give at least 1")
        num_rows = len(features_ND)
        first_layer = self.layers[0]
        assert isinstance(first_layer, NeighbourLayer)
        batch_BD = all_gather_with_gradient(first_layer.normalised(features_ND))
        neighbours_Bk = _most_similar_others(batch_BD.detach(), num_neighbours)
        row_B = torch.arange(len(batch_BD), device=batch_BD.device)
        own = slice(rank() * num_rows, (rank() + 1) * num_rows)
        for layer in self.layers[:-1]:
            batch_BD = layer(batch_BD, row_B, neighbours_Bk)
        return self.layers[-1](batch_BD, row_B[own], neighbours_Bk[own])


class NeighbourLayer(nn.Module):
    """One step of ``NeighbourRefiner``."""

    def __init__(self, width_D: int, temp: float, strength: float) -> None:
        super().__init__()
        self.query_DD = nn.Parameter(torch.eye(width_D))
        self.key_DD = nn.Parameter(torch.eye(width_D))
        self.value_DD = nn.Parameter(torch.eye(width_D))
        self.temp = temp
        self.strength = strength

    def forward(self, features_ND: Tensor, row_B: Tensor, neighbours_Bk: Tensor) -> Tensor:
        """Rows ``row_B`` of ``features_ND`` refined by their neighbours among all its rows, ``(B, D)``."""
        _check_graph(features_ND, row_B, neighbours_Bk, width=len(self.query_DD))
        with torch.autocast(features_ND.device.type, enabled=False):
            features_ND = self.normalised(features_ND)
            own_BD = features_ND[row_B]
            is_neighbour_Bk = (neighbours_Bk >= 0) & (neighbours_Bk != row_B[:, None])
            neighbours_Bk = neighbours_Bk.clamp(min=0)
            query_BD = F.normalize(own_BD @ self.query_DD.t(), dim=-1)
            key_ND = F.normalize(features_ND @ self.key_DD.t(), dim=-1)
            logits_Bk = torch.einsum("bd,bkd->bk", query_BD, key_ND[neighbours_Bk]) / self.temp
            # Not minus infinity: the softmax of a row without neighbours would be NaN, and so would its gradient.
            logits_Bk = logits_Bk.masked_fill(~is_neighbour_Bk, torch.finfo(logits_Bk.dtype).min)
            weight_Bk = logits_Bk.softmax(dim=-1) * is_neighbour_Bk
            # The value matrix is applied to the sum, once per row, in place of once per neighbour.
            seen_BD = torch.einsum("bk,bkd->bd", weight_Bk, features_ND[neighbours_Bk]) @ self.value_DD.t()
            return F.normalize(own_BD + self.strength * seen_BD, dim=-1)

    def normalised(self, features_ND: Tensor) -> Tensor:
        """Unit rows in the precision of the matrices."""
        return F.normalize(features_ND.to(self.query_DD.dtype), dim=-1)


@torch.inference_mode()
def refine_features(
    refiner: NeighbourRefiner,
    features_ND: NDArray[np.floating],
    neighbours_Nk: NDArray[np.integer],
    rows: slice,
    *,
    layer: int = 0,
) -> NDArray[np.float32]:
    """One layer's output for a block of rows, float32; memory grows with the block and k, not with N.

    A whole graph is refined layer after layer: all blocks of layer 0, then all blocks of layer 1 given those as
    ``features_ND``, with the same ``neighbours_Nk``. Arrays mapped from a file will do. Rows do not depend on how
    they are cut into blocks (up to rounding).
    """
    if not 0 <= layer < len(refiner.layers):
        raise UserError(f"refine_features layer: {layer}; the refiner has {len(refiner.layers)}, counted from 0")
    if len(features_ND) != len(neighbours_Nk):
        raise UserError(f"refine_features: {len(neighbours_Nk)} rows of neighbours beside {len(features_ND)} features")
    block_B = np.arange(len(features_ND))[rows]
    neighbours_Bk = np.asarray(neighbours_Nk[rows], dtype=np.int64)
    if neighbours_Bk.size and not -1 <= neighbours_Bk.min() <= neighbours_Bk.max() < len(features_ND):
        raise UserError(
            f"refine_features: neighbours {neighbours_Bk.min()}..{neighbours_Bk.max()} among {len(features_ND)} "
            "features; give row indices, -1 for none"
        )
    # Only the rows that this block looks at are read; the small graph among them is numbered anew.
    used_M = np.union1d(block_B, neighbours_Bk[neighbours_Bk >= 0])
    small_Bk = np.where(neighbours_Bk >= 0, np.searchsorted(used_M, neighbours_Bk), -1)
    device = next(refiner.parameters()).device
    refined_BD = refiner.layers[layer](
        torch.from_numpy(np.asarray(features_ND[used_M], dtype=np.float32)).to(device),
        torch.from_numpy(np.searchsorted(used_M, block_B)).to(device),
        torch.from_numpy(small_Bk).to(device),
    )
    return refined_BD.float().cpu().numpy()


def _most_similar_others(features_ND: Tensor, num_neighbours: int) -> Tensor:
    with torch.autocast(features_ND.device.type, enabled=False):
        similarity_NN = features_ND @ features_ND.t()
    similarity_NN.fill_diagonal_(-torch.inf)
    return similarity_NN.topk(min(num_neighbours, len(features_ND) - 1), dim=1).indices


def _check_graph(features_ND: Tensor, row_B: Tensor, neighbours_Bk: Tensor, *, width: int) -> None:
    if features_ND.ndim != 2 or features_ND.shape[1] != width:
        raise UserError(
            f"NeighbourRefiner: features of shape {tuple(features_ND.shape)}; its matrices have width {width}, "
            f"give (N, {width})"
        )
    if neighbours_Bk.ndim != 2 or len(neighbours_Bk) != len(row_B) or neighbours_Bk.is_floating_point():
        raise UserError(
            f"NeighbourRefiner: neighbours of shape {tuple(neighbours_Bk.shape)} and {neighbours_Bk.dtype} for "
            f"{len(row_B)} rows; give {len(row_B)} rows of integer indices"
        )
    # Values are looked at on the CPU only: on a GPU every step would wait for it.
    if neighbours_Bk.device.type == "cpu" and neighbours_Bk.numel():
        least, largest = int(neighbours_Bk.min()), int(neighbours_Bk.max())
        if least < -1 or largest >= len(features_ND):
            raise UserError(
                f"NeighbourRefiner: neighbours {least}..{largest} among {len(features_ND)} features; "
                "give row indices, -1 for none"
            )
