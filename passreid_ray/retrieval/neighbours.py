"""Who lies nearest to whom: exact and approximate search, the same answer for any division into blocks."""

from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.device_search import DeviceIndex
from passreid_ray.retrieval.distances import as_array
from passreid_ray.retrieval.inverted_lists import inverted_lists_index
from passreid_ray.retrieval.scan import exact_index, int8_index, order_by_distance

RECALL_ROWS = 256
RECALL_BLOCK = 65536

IndexKind = Literal["exact", "int8", "ivf"]


class NeighbourIndex(Protocol):
    """A searchable base of features; small to hand around, since its arrays are shared."""

    @property
    def features_ND(self) -> NDArray[np.float32]:
        """The base."""
        ...

    def search_rows(self, rows: slice, k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """``search`` for rows of the base itself."""
        ...

    def search(self, queries_QD: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """(squared Euclidean distances, row numbers), ``(Q, k)`` ascending, ties by row; infinity and -1 where none."""
        ...


def nearest_neighbours(
    features_ND: Any, k: int, *, index: IndexKind = "exact"
) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
    """The ``k`` nearest rows of every row, itself included: ``(distances, indices)``, both ``(N, k)``.

    Distances are squared Euclidean, ascending; equal ones are in the order of the rows. Numpy or tensors in, numpy out.
    ``index``: "exact"; "int8" compares all rows by 8-bit codes and the best of them exactly (finds practically the same
    rows in a fraction of the time); "ivf" searches the inverted lists of k-means cells (faiss), whose time grows slower
    than N^2, for features that have such a structure.

    Raises ``UserError`` when features are not a finite matrix or ``k`` is not in 1..N.
    """
    features_ND = finite_features(features_ND)
    check_k(k, len(features_ND), "k")
    return build_index(features_ND, index).search_rows(slice(0, len(features_ND)), k)


def build_index(features_ND: NDArray[np.float32], kind: IndexKind) -> NeighbourIndex:
    """An index of ``finite_features``; exact search is on the GPU where this process has one."""
    match kind:
        case "exact" if torch.cuda.is_available():
            return DeviceIndex(features_ND, torch.device("cuda"))
        case "exact":
            return exact_index(features_ND)
        case "int8":
            return int8_index(features_ND)
        case "ivf":
            return inverted_lists_index(features_ND)


def sampled_recall(features_ND: NDArray[np.float32], found_NK: NDArray[np.int32]) -> float:
    """Share of the true neighbours among the found ones, on rows spread evenly over all."""
    num_rows, k = found_NK.shape
    sample = np.linspace(0, num_rows - 1, min(RECALL_ROWS, num_rows), dtype=np.int64)
    rows_SM = np.zeros((len(sample), 0), np.int32)
    for first in range(0, num_rows, RECALL_BLOCK):  # in pieces, so that no second copy of all features is made
        piece = features_ND[first : first + RECALL_BLOCK]
        _, rows_SK = exact_index(piece).search(features_ND[sample], k)
        rows_SM = np.concatenate([rows_SM, np.where(rows_SK >= 0, rows_SK + first, -1)], axis=1)
        rows_SM = order_by_distance(features_ND[sample], features_ND, rows_SM)[1][:, :k]
    hits = sum(len(np.intersect1d(*pair)) for pair in zip(found_NK[sample], rows_SM, strict=True))
    return hits / rows_SM.size


def finite_features(features_ND: Any, name: str = "features") -> NDArray[np.float32]:
    """``features_ND`` as a contiguous float32 matrix; ``UserError`` when it is none or holds a number that is not."""
    features_ND = np.ascontiguousarray(as_array(features_ND), np.float32)
    if features_ND.ndim != 2 or not len(features_ND):
        raise UserError(f"{name}: expected a matrix with one feature per row, got shape {features_ND.shape}")
    # The sum of a row is finite only if all of it is (or it is so large that distances are not).
    bad = ~np.isfinite(np.einsum("nd,nd->n", features_ND, features_ND))
    if bad.any():
        raise UserError(
            f"{name}: {int(bad.sum())} of {len(bad)} rows are not finite, the first is row {int(np.argmax(bad))}; "
            "check the weights and the images they were extracted with"
        )
    return features_ND


def unit_features(features_ND: Any, name: str = "features", *, overwrite: bool = False) -> NDArray[np.float32]:
    """``finite_features`` scaled to length 1; ``UserError`` when a row is all zero.

    ``overwrite``: a float32 matrix is scaled in place, which saves the memory of a second one.
    """
    features_ND = finite_features(features_ND, name)
    norms_N1 = np.sqrt(np.einsum("nd,nd->n", features_ND, features_ND))[:, None]
    zero = norms_N1[:, 0] == 0
    if zero.any():
        raise UserError(
            f"{name}: {int(zero.sum())} of {len(zero)} rows are all zero, the first is row {int(np.argmax(zero))}; "
            "such a feature points nowhere, leave the row out"
        )
    return np.divide(features_ND, norms_N1, out=features_ND if overwrite else None)


def check_k(k: int, num_rows: int, name: str) -> None:
    """Raise ``UserError`` unless ``k`` neighbours can be found among ``num_rows`` rows."""
    if not 1 <= k <= num_rows:
        raise UserError(f"{name}: {k} neighbours of {num_rows} rows (a row is its own first); give 1 to {num_rows}")
