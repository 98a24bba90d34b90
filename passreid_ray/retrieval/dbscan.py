"""DBSCAN on sparse distances: pseudo-labels, also from row blocks that never meet in one memory."""

from collections.abc import Sequence

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.sparse.csgraph import connected_components

from passreid_ray.errors import UserError

OUTLIER = -1


def dbscan_labels(distance: sp.csr_array, eps: float = 0.6, min_samples: int = 4) -> NDArray[np.int64]:
    """Cluster of every row, ``(N,)``, numbered by their first core row; -1 for outliers.

    ``distance`` stores at least all pairs up to ``eps``, the diagonal and stored zeros included, and is symmetric. A
    row is core when at least ``min_samples`` rows, itself among them, lie within ``eps``; another row within ``eps`` of
    a core row joins the lowest of their clusters. Equal to scikit-learn's on the dense matrix (Ester et al., KDD 1996),
    but that rows with nothing in common, at a distance of 1, are never neighbours. Raises ``UserError`` when ``eps`` is
    not in (0, 1] or ``min_samples`` is not positive.
    """
    check_density(eps, min_samples)
    distance = sp.csr_array(distance)
    is_core_N = count_within(distance, eps) >= min_samples
    links = core_links(distance, eps, 0, is_core_N)
    cluster_N = merge_links([links], is_core_N)
    return attach_border(distance, eps, 0, cluster_N)


def check_density(eps: float, min_samples: int) -> None:
    """Raise ``UserError`` unless ``eps`` is a Jaccard distance and ``min_samples`` positive."""
    if not 0 < eps <= 1:
        raise UserError(f"eps: expected a distance in (0, 1], got {eps:g}")
    if min_samples < 1:
        raise UserError(f"min_samples: expected at least 1, got {min_samples}")


def count_within(block_RN: sp.csr_array, eps: float) -> NDArray[np.int64]:
    """How many rows lie within ``eps`` of each row of a block, itself included."""
    return np.add.reduceat(np.append(block_RN.data <= np.float32(eps), False), block_RN.indptr[:-1], dtype=np.int64) * (
        np.diff(block_RN.indptr) > 0
    )


def core_links(block_RN: sp.csr_array, eps: float, first_row: int, is_core_N: NDArray[np.bool_]) -> NDArray[np.int32]:
    """``(L, 2)`` pairs of core rows that connect just what the block's rows (from ``first_row`` on) connect.

    At most one pair for every core row that the block reaches.
    """
    row, column = _pairs_within(block_RN, eps, first_row)
    both = is_core_N[row] & is_core_N[column]
    row, column = row[both], column[both]
    num_rows = len(is_core_N)
    graph = sp.coo_array((np.ones(len(row), np.int8), (row, column)), shape=(num_rows, num_rows))
    component_N = connected_components(graph, directed=False)[1]
    reached = np.unique(np.concatenate([row, column]))
    _, first, inverse = np.unique(component_N[reached], return_index=True, return_inverse=True)
    return np.stack([reached, reached[first][inverse]], axis=1).astype(np.int32)


def merge_links(links: Sequence[NDArray[np.int32]], is_core_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Cluster of every core row from the links of all blocks, numbered by first core row; -1 for the others."""
    pairs = np.concatenate([*links, np.empty((0, 2), np.int32)])
    num_rows = len(is_core_N)
    # Several blocks may give the same pair, and its ones are added up: in a narrow type hundreds of them would be zero.
    ones = np.ones(len(pairs), np.float32)
    graph = sp.coo_array((ones, (pairs[:, 0], pairs[:, 1])), shape=(num_rows, num_rows))
    component_N = connected_components(graph, directed=False)[1]
    core = np.flatnonzero(is_core_N)
    _, first, inverse = np.unique(component_N[core], return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(len(first))
    cluster_N = np.full(len(is_core_N), OUTLIER, np.int64)
    cluster_N[core] = rank[inverse]
    return cluster_N


def attach_border(
    block_RN: sp.csr_array, eps: float, first_row: int, core_cluster_N: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Final labels of a block's rows: their own cluster, or the lowest of a core row within ``eps``, or -1."""
    num_rows = len(block_RN.indptr) - 1
    labels_R = core_cluster_N[first_row : first_row + num_rows].copy()
    row, column = _pairs_within(block_RN, eps, first_row)
    row = row - first_row
    is_border = (labels_R[row] == OUTLIER) & (core_cluster_N[column] != OUTLIER)
    unset = np.iinfo(np.int64).max
    lowest_R = np.full(num_rows, unset)
    np.minimum.at(lowest_R, row[is_border], core_cluster_N[column[is_border]])
    return np.where(lowest_R < unset, lowest_R, labels_R)


def _pairs_within(block_RN: sp.csr_array, eps: float, first_row: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    near = block_RN.data <= np.float32(eps)
    lengths_R = np.diff(block_RN.indptr)
    row = np.repeat(np.arange(first_row, first_row + len(lengths_R)), lengths_R)
    return row[near], block_RN.indices[near].astype(np.int32, copy=False)
