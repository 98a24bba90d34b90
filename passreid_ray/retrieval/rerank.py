"""k-reciprocal re-ranking of a gallery (Zhong et al., arXiv:1701.08398), from sparse codes."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.k_reciprocal import (
    Neighbourhood,
    Weighting,
    expanded_codes,
    half_size,
    overlap_distance,
)
from passreid_ray.retrieval.neighbours import unit_features
from passreid_ray.retrieval.scan import exact_index

_QUERY_ROWS = 512


def rerank(
    query_QD: Any,
    gallery_GD: Any,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    *,
    squared_twice: bool = False,
) -> NDArray[np.float32]:
    """``(Q, G)`` distances: ``(1 - lambda_value)`` of the Jaccard distance plus ``lambda_value`` of the original one.

    Features are L2-normalised first. ``k1`` does not count the item itself. The original distance is the squared
    Euclidean one over its row's maximum; ``squared_twice`` squares it again, as the evaluator of PASS's
    cluster-contrast code does. Raises ``UserError`` for features that are not finite or all zero or of different
    widths, and for sizes that do not fit.
    """
    query_QD, gallery_GD = unit_features(query_QD, "query"), unit_features(gallery_GD, "gallery")
    if query_QD.shape[1] != gallery_GD.shape[1]:
        raise UserError(f"query is {query_QD.shape[1]} wide, gallery {gallery_GD.shape[1]}; they must be of one model")
    features_ND = np.concatenate([query_QD, gallery_GD])
    num_rows = len(features_ND)
    if not 1 <= k1 < num_rows:
        raise UserError(f"k1: expected 1 to {num_rows - 1} neighbours of {num_rows} images, got {k1}")
    if not 1 <= k2 <= k1 + 1:
        raise UserError(f"k2: the query expansion averages 1 to k1 + 1 = {k1 + 1} neighbours, got {k2}")
    _, rows_NK, largest_N = exact_index(features_ND).search_rows_and_farthest(slice(0, num_rows), k1 + 1)
    squared_QG = np.maximum(2 - 2 * (query_QD @ gallery_GD.T), 0)
    return rerank_from(features_ND, rows_NK, largest_N, squared_QG, k2, lambda_value, squared_twice=squared_twice)


def rerank_from(
    features_ND: NDArray[np.float32],
    rows_NK: NDArray[np.int32],
    largest_N: NDArray[np.float32],
    squared_QG: NDArray[np.float32],
    k2: int,
    lambda_value: float,
    *,
    squared_twice: bool = False,
) -> NDArray[np.float32]:
    """``rerank`` after the distances; overwrites ``squared_QG`` with its result.

    Unit features of queries then gallery, their ``k1 + 1`` nearest rows, each row's largest squared distance, and the
    squared distances of query and gallery.
    """
    num_queries, k1 = len(squared_QG), rows_NK.shape[1] - 1
    column_K = np.arange(k1 + 1)
    neighbourhood = Neighbourhood(rows_NK, column_K < half_size(k1), column_K < k2)
    expanded_NN = expanded_codes(neighbourhood, features_ND, Weighting(largest_N, squared=squared_twice))
    columns_NG = expanded_NN[num_queries:].tocsc()
    for first in range(0, num_queries, _QUERY_ROWS):
        own = slice(first, min(first + _QUERY_ROWS, num_queries))
        block_QG = squared_QG[own]
        block_QG /= largest_N[own, None]
        if squared_twice:
            np.square(block_QG, out=block_QG)
        block_QG *= lambda_value
        block_QG += 1 - lambda_value
        near = overlap_distance(expanded_NN[own], columns_NG, 1.0)
        lengths_Q = np.diff(near.indptr)
        row = np.repeat(np.arange(len(lengths_Q)), lengths_Q)
        block_QG[row, near.indices] -= (1 - lambda_value) * (1 - near.data)
    return squared_QG
