"""Features averaged with their neighbours: query expansion and database augmentation."""

# Shape letters: Q queries, G gallery, N rows to expand, k neighbours of each, D width.

from typing import Any

import numpy as np
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.neighbours import build_index, unit_features

_BLOCK_ROWS = 4096


def average_query_expansion(query_QD: Any, gallery_GD: Any, k: int = 5, alpha: float = 0.0) -> NDArray[np.float32]:
    """``(Q, D)`` unit features: the mean of every query and its ``k`` nearest gallery features.

    Features are L2-normalised first; numpy or tensors in, numpy out. ``alpha`` 0 is the plain mean (AQE; Chum et al.,
    ICCV 2007). A larger one weights each neighbour by its cosine similarity to the query to the power ``alpha``, the
    query itself by 1 (alpha-QE; Radenovic et al., arXiv:1711.02512); a negative similarity weighs nothing then.
    Expanding looks at the whole gallery, so its figures are not comparable with those of single queries.

    Raises ``UserError`` for features that are not finite or all zero or of different widths, for a ``k`` that is not
    in 0..G, for a negative ``alpha``, and where a mean is zero (a query and its exact opposite).
    """
    query_QD, gallery_GD = unit_features(query_QD, "query"), unit_features(gallery_GD, "gallery")
    if query_QD.shape[1] != gallery_GD.shape[1]:
        raise UserError(f"query is {query_QD.shape[1]} wide, gallery {gallery_GD.shape[1]}; they must be of one model")
    if not 0 <= k <= len(gallery_GD):
        raise UserError(f"k: {k} neighbours of {len(gallery_GD)} gallery rows; give 0 to {len(gallery_GD)}")
    _check_alpha(alpha)
    if k == 0:
        return query_QD
    distances_Qk, rows_Qk = build_index(gallery_GD, "exact").search(query_QD, k)
    return _mean_with_neighbours(query_QD, gallery_GD, distances_Qk, rows_Qk, alpha)


def database_augmentation(gallery_GD: Any, k: int = 5, alpha: float = 0.0) -> NDArray[np.float32]:
    """``(G, D)`` unit features: the mean of every gallery row and its ``k`` nearest others.

    DBA (Turcot and Lowe, ICCV workshops 2009), weighted like ``average_query_expansion``. All means are taken of the
    features as given, so the order of the rows does not matter.

    Raises ``UserError`` for features that are not finite or all zero, for a ``k`` that is not in 0..G-1, for a
    negative ``alpha``, and where a mean is zero.
    """
    gallery_GD = unit_features(gallery_GD, "gallery")
    num_rows = len(gallery_GD)
    if not 0 <= k < num_rows:
        raise UserError(f"k: {k} other neighbours of {num_rows} gallery rows; give 0 to {num_rows - 1}")
    _check_alpha(alpha)
    if k == 0:
        return gallery_GD
    distances_GK, rows_GK = build_index(gallery_GD, "exact").search_rows(slice(0, num_rows), k + 1)
    # Only exact copies of a row can come before it, so without the first is as good as without itself.
    return _mean_with_neighbours(gallery_GD, gallery_GD, distances_GK[:, 1:], rows_GK[:, 1:], alpha)


def _check_alpha(alpha: float) -> None:
    if not 0 <= alpha < np.inf:
        raise UserError(f"alpha: expected 0 (plain mean) or a positive power of the similarity, got {alpha}")


def _mean_with_neighbours(
    features_ND: NDArray[np.float32],
    gallery_GD: NDArray[np.float32],
    distances_Nk: NDArray[np.float32],
    rows_Nk: NDArray[np.int32],
    alpha: float,
) -> NDArray[np.float32]:
    # Of unit rows, |a - b|^2 = 2 - 2 cos. A weighted sum points where the weighted mean does.
    weights_Nk = np.maximum(1 - distances_Nk / 2, 0) ** np.float32(alpha)
    total_ND = features_ND.copy()
    for first in range(0, len(features_ND), _BLOCK_ROWS):
        own = slice(first, first + _BLOCK_ROWS)
        for weight_N, row_N in zip(weights_Nk[own].T, rows_Nk[own].T, strict=True):
            total_ND[own] += weight_N[:, None] * gallery_GD[row_N]
    return unit_features(total_ND, "mean of a feature and its neighbours", overwrite=True)
