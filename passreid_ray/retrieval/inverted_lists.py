"""Approximate search in the cells of k-means (faiss IVF), for features that lie in clusters."""

from dataclasses import dataclass
from functools import cached_property

import faiss
import numpy as np
from numpy.typing import NDArray

from passreid_ray.retrieval.scan import exact_index, order_by_distance

TARGET_RECALL = 0.97
NUM_SAMPLED = 256
SAMPLED_K = 30
TRAINING_ROWS_PER_CELL = 64


@dataclass(frozen=True)
class InvertedLists:
    """faiss' inverted lists over a base, and how many cells a query looks into."""

    features_ND: NDArray[np.float32]
    serialized: NDArray[np.uint8]
    num_probed: int
    sampled_recall: float
    """Share of the true neighbours that a sample of rows finds with ``num_probed`` cells."""

    def search(self, queries_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """See ``NeighbourIndex``. Distances are computed anew, so that they do not depend on the index."""
        _, rows_QK = self._index.search(queries_QD, k, params=_probing(self.num_probed))
        return order_by_distance(queries_QD, self.features_ND, rows_QK.astype(np.int32))

    def search_rows(self, rows: slice, k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """``search`` for rows of the base itself."""
        return self.search(self.features_ND[rows], k)

    @cached_property
    def _index(self) -> faiss.Index:
        return faiss.deserialize_index(self.serialized)

    def __reduce__(self) -> tuple[type["InvertedLists"], tuple[object, ...]]:
        return InvertedLists, (self.features_ND, self.serialized, self.num_probed, self.sampled_recall)


def inverted_lists_index(features_ND: NDArray[np.float32]) -> InvertedLists:
    """Inverted lists whose number of probed cells is doubled until a sample reaches ``TARGET_RECALL``.

    Where rows have no structure that k-means finds, that is nearly all cells, and "int8" is faster.
    """
    num_rows, width = features_ND.shape
    num_cells = max(1, min(int(4 * np.sqrt(num_rows)), num_rows // 39))
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(width), width, num_cells)
    index.cp.seed = 0
    index.cp.max_points_per_centroid = TRAINING_ROWS_PER_CELL
    index.cp.min_points_per_centroid = 1
    index.train(features_ND)
    index.add(features_ND)
    sample = np.linspace(0, num_rows - 1, min(NUM_SAMPLED, num_rows), dtype=np.int64)
    k = min(SAMPLED_K, num_rows)
    _, true_Qk = exact_index(features_ND).search(features_ND[sample], k)
    num_probed, found = 1, 0.0
    while found < TARGET_RECALL and num_probed < num_cells:
        num_probed = min(2 * num_probed, num_cells)
        _, rows_Qk = index.search(features_ND[sample], k, params=_probing(num_probed))
        found = sum(len(np.intersect1d(*pair)) for pair in zip(rows_Qk, true_Qk, strict=True)) / true_Qk.size
    return InvertedLists(features_ND, faiss.serialize_index(index), max(1, num_probed), found)


def _probing(num_cells: int) -> faiss.SearchParametersIVF:
    parameters = faiss.SearchParametersIVF()
    parameters.nprobe = num_cells
    return parameters
