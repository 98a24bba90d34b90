"""Distinct features in an order that depends on their content alone."""

# Shape letters: G gallery features, M distinct ones, D width.

from typing import Any

import numba
import numpy as np
from numpy.typing import DTypeLike, NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.distances import as_array

_BLOCK_BYTES = 16 * 2**20


def distinct_unit_features(
    features_GD: Any, name: str, dtype: DTypeLike
) -> tuple[NDArray[np.floating], NDArray[np.intp]]:
    """Each distinct L2-normalised row once, ``(M, D)`` of ``dtype``; and which of them each feature is, ``(G,)``.

    A matrix product rounds differently from column to column, so that equal features may get unequal distances. They
    do not with the columns returned here, and the order of ``features_GD`` changes nothing. (Different features of one
    64-bit hash stay different, but in the order that they came in: expected once in 1e8 galleries of half a million.)

    Needs memory for the result and for little blocks. Rows are normalised as by ``cosine_distance``, the errors too.
    """
    features_GD = as_array(features_GD)
    if features_GD.ndim != 2:
        raise UserError(f"{name}: expected a matrix with one feature per row, got shape {features_GD.shape}")
    block = max(1, _BLOCK_BYTES // (8 * max(1, features_GD.shape[1])))
    norm_G = np.empty(len(features_GD), np.float64 if features_GD.dtype == np.float64 else np.float32)
    hash_G = np.empty(len(features_GD), np.uint64)
    for start in range(0, len(features_GD), block):
        rows = slice(start, start + block)
        norms = np.linalg.norm(features_GD[rows].astype(norm_G.dtype, copy=False), axis=1)
        if not np.isfinite(norms).all():
            row = start + int(np.flatnonzero(~np.isfinite(norms))[0])
            raise UserError(
                f"{name}: row {row} is not finite; check the weights and the images they were extracted with"
            )
        norm_G[rows] = np.where(norms > 0, norms, 1)
        hash_G[rows] = _hashes(_unit(features_GD, norm_G, rows).view(np.uint32))

    order_G = np.argsort(hash_G, kind="stable")
    is_new_G = np.ones(len(order_G), np.bool_)
    same_hash = np.flatnonzero(hash_G[order_G[1:]] == hash_G[order_G[:-1]]) + 1
    for start in range(0, len(same_hash), block):
        places = same_hash[start : start + block]
        rows, before = (_unit(features_GD, norm_G, order_G[at]) for at in (places, places - 1))
        is_new_G[places] = (rows != before).any(axis=1)
    column_of_G = np.empty(len(order_G), np.intp)
    column_of_G[order_G] = np.cumsum(is_new_G) - 1

    first_M = order_G[is_new_G]
    unit_MD = np.empty((len(first_M), features_GD.shape[1]), dtype)
    for start in range(0, len(first_M), block):
        unit_MD[start : start + block] = _unit(features_GD, norm_G, first_M[start : start + block])
    return unit_MD, column_of_G


def _unit(
    features_GD: NDArray[Any], norm_G: NDArray[np.floating], rows: slice | NDArray[np.intp]
) -> NDArray[np.floating]:
    unit_ND = features_GD[rows].astype(norm_G.dtype, order="C")
    unit_ND /= norm_G[rows, None]
    unit_ND += 0.0  # no negative zeros: they are equal to zero, so their bytes must be, too
    return unit_ND


@numba.njit(nogil=True, cache=True)
def _hashes(words_NW) -> NDArray[np.uint64]:
    hash_N = np.empty(words_NW.shape[0], np.uint64)
    for n in range(words_NW.shape[0]):
        value = np.uint64(0x9E3779B97F4A7C15)
        for word in words_NW[n]:
            value = (value ^ np.uint64(word)) * np.uint64(0xFF51AFD7ED558CCD)
            value ^= value >> np.uint64(32)
        hash_N[n] = value
    return hash_N
