"""How well a ranked gallery answers queries: mAP, mINP and CMC; and true accept rates."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.distances import as_array, normalized
from passreid_ray.retrieval.distinct import distinct_unit_features
from passreid_ray.retrieval.protocol import protocol_of, read_labels
from passreid_ray.retrieval.rank_counts import QueryRanks, query_ranks
from passreid_ray.retrieval.verification import accept_rates

_BLOCK_BYTES = 256 * 2**20
"""Most bytes of distances that are computed at once."""
_BLOCK_QUERIES = 256
_TILE_COLUMNS = 4096
_COPY_BYTES = 4 * 2**20
"""Most bytes of given distances that are copied at once: they stay in a core's cache."""


@dataclass(frozen=True, slots=True)
class RankingResult:
    """Fractions 0..1 over the valid queries: those with a match in the gallery."""

    mAP: float
    """Mean average precision."""
    mINP: float
    """Mean inverse negative penalty: matches / rank of the last match (Ye et al., arXiv:2001.04193)."""
    cmc: NDArray[np.float64]
    """``cmc[r - 1]``: share of queries whose first match is among the first r; ``max_rank`` long."""
    num_valid_queries: int
    average_precision_Q: NDArray[np.float64]
    """Average precision of every query; nan where it has no match."""
    true_accept_rates: dict[float, float] = field(default_factory=dict)
    """Of each false accept rate asked for; nan when the gallery has no non-match."""


def evaluate_ranking(
    query_QD: Any,
    gallery_GD: Any,
    query_ids: Any,
    gallery_ids: Any,
    query_cameras: Any,
    gallery_cameras: Any,
    *,
    distance: Any = None,
    max_rank: int = 50,
    false_accept_rates: tuple[float, ...] = (),
) -> RankingResult:
    """mAP, mINP and CMC of ranking the gallery for every query, by cosine distance of the features.

    ``query_QD``, ``gallery_GD``: features, numpy or tensors; or None for both with ``distance`` ``(Q, G)``. Ids and
    cameras: whole numbers or strings, one per row; cameras None for both: no camera rule. Market-1501 protocol (Zheng
    et al., ICCV 2015): gallery images of the query's person *and* camera are left out, queries without another match do
    not count. Every id is a person; junk detections (-1 in Market-1501) are left out when the data is read.

    The order of the gallery does not matter. Items at equal distance: average precision as scikit-learn's (they share
    the precision at their end), CMC and INP count non-matches first, so that collapsed features do not score well.

    ``false_accept_rates`` asks for ``true_accept_rates``, over all pairs of a query and a gallery image that is not
    left out; queries without a match have pairs, too. A true accept rate is the largest share of matches that a
    threshold accepts which accepts no larger share of non-matches. Exact up to 2**24 pairs. Beyond, distances are
    counted in bins, 2**-14 as wide as the power of two that they are in (1.5e-5 to 6.1e-5 for distances from 0.25 to
    2), and a threshold stands between two bins, so that the result is never above the exact one.

    Memory: a normalised copy of the features, and distances block by block, never all of them. A ``distance`` that is
    an ``np.memmap`` is read block by block.

    Raises ``UserError`` when no query has a match, for numbers that are not finite and for shapes that do not fit.
    """
    labels = read_labels(query_ids, gallery_ids, query_cameras, gallery_cameras)
    num_queries, num_gallery = len(labels.persons_Q), len(labels.persons_G)
    if max_rank < 1:
        raise UserError(f"max_rank: expected at least 1, got {max_rank}")
    for rate in false_accept_rates:
        if not 0 <= rate <= 1:
            raise UserError(f"false_accept_rates: expected fractions from 0 to 1, got {rate}")
    if (query_QD is None) != (gallery_GD is None) or (query_QD is None) == (distance is None):
        raise UserError("give the features of query and gallery, or None for both and their distance")

    if distance is None:
        distances = _of_features(query_QD, gallery_GD, (num_queries, num_gallery))
    else:
        distances = _given(distance, (num_queries, num_gallery))
    protocol = protocol_of(labels, distances.column_of_G, distances.num_columns)
    accepted = accept_rates(num_queries, num_gallery, distances.dtype) if false_accept_rates else None
    blocks = []
    for first_query, distance_RM in distances.blocks:
        blocks.append(query_ranks(distance_RM, protocol, first_query))
        if accepted is not None:
            accepted.add(distance_RM, protocol, first_query)
    ranks = QueryRanks(*(np.concatenate(of_blocks) for of_blocks in zip(*blocks, strict=True)))

    is_valid_Q = ranks.before_first_R >= 0
    if not is_valid_Q.any():
        raise UserError(
            f"none of {num_queries} queries has a match among {num_gallery} gallery images"
            + ("" if query_cameras is None else " of another camera")
            + "; check the split and the ids"
        )
    num_found = np.bincount(np.minimum(ranks.before_first_R[is_valid_Q], max_rank), minlength=max_rank)[:max_rank]
    num_valid_queries = int(is_valid_Q.sum())
    return RankingResult(
        mAP=float(np.nanmean(ranks.average_precision_R)),
        mINP=float(np.nanmean(ranks.inverse_penalty_R)),
        cmc=np.cumsum(num_found) / num_valid_queries,
        num_valid_queries=num_valid_queries,
        average_precision_Q=ranks.average_precision_R,
        true_accept_rates={} if accepted is None else accepted.at(false_accept_rates),
    )


@dataclass(frozen=True)
class _Distances:
    """All distances, to be read once. Gallery items of equal features may share a column."""

    blocks: Iterator[tuple[int, NDArray[np.floating]]]
    """Number of the first query, and the finite distances of it and those after it; overwritten by the next block."""
    dtype: np.dtype
    num_columns: int
    column_of_G: NDArray[np.intp]


def _given(distance: Any, shape: tuple[int, int]) -> _Distances:
    distance = as_array(distance)
    if distance.shape != shape or distance.dtype.kind not in "fiub":
        raise UserError(
            f"distance: expected the shape {shape} of query and gallery ids, got {distance.shape} of {distance.dtype}"
        )
    is_single = np.result_type(distance, np.float32) == np.float32
    dtype = np.dtype(np.float32 if is_single else np.float64)
    return _Distances(_copied_blocks(distance, dtype), dtype, shape[1], np.arange(shape[1]))


def _copied_blocks(distance: NDArray[Any], dtype: np.dtype) -> Iterator[tuple[int, NDArray[np.floating]]]:
    """A copy is always contiguous, writable and of two types at most: one compiled function for each."""
    num_queries, num_gallery = distance.shape
    rows = max(1, _COPY_BYTES // (dtype.itemsize * num_gallery))
    buffer = np.empty((min(rows, num_queries), num_gallery), dtype)
    for first in range(0, len(distance), len(buffer)):
        block = buffer[: len(distance) - first]
        np.copyto(block, distance[first : first + len(buffer)], casting="same_kind")
        is_finite_R = np.isfinite(block).all(axis=1)
        if not is_finite_R.all():
            raise UserError(f"distance: row {first + int(np.argmin(is_finite_R))} is not finite")
        yield first, block


def _of_features(query_QD: Any, gallery_GD: Any, shape: tuple[int, int]) -> _Distances:
    query_QD, gallery_GD = normalized(query_QD, "query features"), as_array(gallery_GD)
    dtype = np.dtype(np.float64 if np.float64 in (query_QD.dtype, gallery_GD.dtype) else np.float32)
    columns_MD, column_of_G = distinct_unit_features(gallery_GD, "gallery features", dtype)
    if (len(query_QD), len(column_of_G)) != shape:
        raise UserError(
            f"features: {len(query_QD)} and {len(column_of_G)} rows do not fit {shape[0]} and {shape[1]} ids"
        )
    if query_QD.shape[1] != columns_MD.shape[1]:
        raise UserError(f"features are {query_QD.shape[1]} and {columns_MD.shape[1]} wide; they must be of one model")
    blocks = _cosine_blocks(query_QD.astype(dtype, copy=False), columns_MD)
    return _Distances(blocks, dtype, len(columns_MD), column_of_G)


def _cosine_blocks(
    query_QD: NDArray[np.floating], columns_MD: NDArray[np.floating]
) -> Iterator[tuple[int, NDArray[np.floating]]]:
    num_columns = len(columns_MD)
    most = min(_BLOCK_QUERIES, _BLOCK_BYTES // (columns_MD.itemsize * num_columns), len(query_QD))
    buffer = np.empty((max(1, most), num_columns), columns_MD.dtype)
    for first in range(0, len(query_QD), len(buffer)):
        queries_RD = query_QD[first : first + len(buffer)]
        block = buffer[: len(queries_RD)]
        for column in range(0, num_columns, _TILE_COLUMNS):
            tile = block[:, column : column + _TILE_COLUMNS]
            np.matmul(queries_RD, columns_MD[column : column + _TILE_COLUMNS].T, out=tile)
            np.subtract(1, tile, out=tile)  # while it is in a core's cache
        yield first, block
