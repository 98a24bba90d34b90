"""Exact brute-force neighbour search by torch, for GPUs."""

# Shape letters: N rows of the base, Q queries, D width, C candidates of a query.

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

_BLOCK_ELEMENTS = 2**28
_SPARE_CANDIDATES = 32
"""Candidates beyond k that are compared exactly: rounding in a matrix product can change the order of near ones."""


@dataclass(frozen=True)
class DeviceIndex:
    """All rows of a base on one device."""

    features_ND: NDArray[np.float32]
    device: torch.device

    @torch.inference_mode()
    def search(self, queries_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """See ``NeighbourIndex``. More than 32 rows at the k-th distance exactly are cut off in no set order."""
        base_ND = torch.from_numpy(self.features_ND).to(self.device)
        centre_D = base_ND.mean(dim=0)  # keeps products small, so that little is lost to rounding
        centred_ND = base_ND - centre_D
        offsets_N = centred_ND.square().sum(dim=1) / 2
        num_found = min(k, len(base_ND))
        num_candidates = min(num_found + _SPARE_CANDIDATES, len(base_ND))
        distances_QK = np.full((len(queries_QD), k), np.inf, np.float32)
        rows_QK = np.full((len(queries_QD), k), -1, np.int32)
        block = max(1, min(4096, _BLOCK_ELEMENTS // max(len(base_ND), num_candidates * base_ND.shape[1])))
        for first in range(0, len(queries_QD), block):
            own = slice(first, min(first + block, len(queries_QD)))
            queries = torch.from_numpy(queries_QD[own]).to(self.device)
            brackets_QN = torch.addmm(-offsets_N, queries - centre_D, centred_ND.T)
            candidates_QC = brackets_QN.topk(num_candidates, dim=1).indices.sort(dim=1).values
            exact_QC = (queries[:, None] - base_ND[candidates_QC]).square().sum(dim=2)
            order_QC = exact_QC.sort(dim=1, stable=True).indices[:, :num_found]  # stable: ties stay in row order
            distances_QK[own, :num_found] = exact_QC.gather(1, order_QC).cpu().numpy()
            rows_QK[own, :num_found] = candidates_QC.gather(1, order_QC).cpu().numpy()
        return distances_QK, rows_QK

    def search_rows(self, rows: slice, k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """``search`` for rows of the base itself."""
        return self.search(self.features_ND[rows], k)
