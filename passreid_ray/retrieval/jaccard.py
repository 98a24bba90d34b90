"""Jaccard distance of k-reciprocal codes: what unsupervised ReID clusters by, from sparse rows."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.k_reciprocal import (
    Neighbourhood,
    Weighting,
    expanded_codes,
    half_size,
    overlap_distance,
)
from passreid_ray.retrieval.neighbours import IndexKind, build_index, check_k, unit_features


@dataclass(frozen=True)
class CameraSizes:
    """Sizes of the neighbour sets within a row's camera and over all others; defaults of CA-Jaccard.

    ``k1_same`` and ``k1_other`` count one less than the columns of their lists, the first of which, in its own camera,
    is the row itself; ``k2_same`` and ``k2_other`` are columns.
    """

    k1_same: int = 5
    k1_other: int = 20
    k2_same: int = 2
    k2_other: int = 4


def jaccard_distance(
    features_ND: Any,
    k1: int = 30,
    k2: int = 6,
    max_distance: float = 1.0,
    *,
    index: IndexKind = "exact",
    cameras_N: Any = None,
    camera_sizes: CameraSizes | None = None,
) -> sp.csr_array:
    """Sparse ``(N, N)`` Jaccard distances of features that are L2-normalised first.

    Stores every pair at a distance below 1 and not above ``max_distance``; a pair that is not stored is at distance 1
    or above ``max_distance``. The diagonal and duplicates are stored zeros, so never call ``eliminate_zeros``. ``k1``
    is the size of the neighbour sets, the row itself included; ``k2`` that of the query expansion, 1 for none.

    With ``cameras_N`` (a camera per row) neighbours and expansion are balanced over cameras by ``camera_sizes``, and
    ``k1`` and ``k2`` are not used (CA-Jaccard, Chen et al., arXiv:2311.10605). Raises ``UserError`` for features that
    are not finite or all zero, and for sizes that do not fit N. Source: Zhong et al., arXiv:1701.08398; equal to the
    clustering distance of Cluster Contrast (arXiv:2103.11568) and PASS.
    """
    features_ND = unit_features(features_ND)
    if cameras_N is None:
        check_sizes(k1, k2, len(features_ND))
        _, rows_NK = build_index(features_ND, index).search_rows(slice(0, len(features_ND)), k1)
        neighbourhood = plain_neighbourhood(rows_NK, k2)
    else:
        neighbourhood = camera_neighbourhood(features_ND, cameras_N, camera_sizes or CameraSizes(), index)
    expanded_NN = expanded_codes(neighbourhood, features_ND, unit_weighting(features_ND))
    return overlap_distance(expanded_NN, expanded_NN.tocsc(), max_distance)


def check_sizes(k1: int, k2: int, num_rows: int) -> None:
    """Raise ``UserError`` unless neighbour sets of ``k1`` and an expansion over ``k2`` fit ``num_rows`` rows."""
    if k1 >= num_rows:
        raise UserError(f"k1: {k1} neighbours, but there are {num_rows} features; give a k1 below that, or more images")
    check_k(k1, num_rows, "k1")
    if not 1 <= k2 <= k1:
        raise UserError(f"k2: the query expansion averages 1 to k1={k1} neighbours, got {k2}")


def plain_neighbourhood(rows_NK: NDArray[np.int32], k2: int) -> Neighbourhood:
    """The neighbour lists of ``K = k1`` columns, as PASS and Cluster Contrast use them."""
    column_K = np.arange(rows_NK.shape[1])
    return Neighbourhood(rows_NK, column_K < half_size(rows_NK.shape[1]), column_K < k2)


def camera_neighbourhood(
    features_ND: NDArray[np.float32], cameras_N: Any, sizes: CameraSizes, index: IndexKind
) -> Neighbourhood:
    """Neighbour lists of so many rows of the own camera, then so many of all others.

    As in the code of CA-Jaccard no sets of the nearer half are added: cameras are balanced instead.
    """
    codes_N = np.unique(np.asarray(cameras_N), return_inverse=True)[1]
    if len(codes_N) != len(features_ND):
        raise UserError(f"cameras: {len(codes_N)} cameras for {len(features_ND)} features; give one per row")
    num_same, num_other = sizes.k1_same + 1, sizes.k1_other + 1
    rows_NK = np.full((len(features_ND), num_same + num_other), -1, np.int32)
    for camera in range(codes_N.max() + 1):
        own, others = np.flatnonzero(codes_N == camera), np.flatnonzero(codes_N != camera)
        for base, k, columns in (
            (own, num_same, slice(0, num_same)),
            (others, num_other, slice(num_same, None)),
        ):
            if len(base):
                _, found = build_index(features_ND[base], index).search(features_ND[own], k)
                rows_NK[own, columns] = np.where(found >= 0, base[found], -1)
    column_K = np.concatenate([np.arange(num_same), np.arange(num_other)])
    is_same_K = np.arange(len(column_K)) < num_same
    is_expansion_K = column_K < np.where(is_same_K, sizes.k2_same, sizes.k2_other)
    return Neighbourhood(rows_NK, np.zeros(len(column_K), np.bool_), is_expansion_K)


def unit_weighting(features_ND: NDArray[np.float32]) -> Weighting:
    """Weights ``exp(-d^2)``, as clustering uses them."""
    return Weighting(np.ones(len(features_ND), np.float32))
