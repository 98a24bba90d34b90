"""How well a ranked gallery answers queries: mAP, mINP and CMC."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.distances import as_array, normalized, one_minus_dot

_BLOCK_BYTES = 64 * 2**20


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
) -> RankingResult:
    """mAP, mINP and CMC of ranking the gallery for every query, by cosine distance of the features.

    ``query_QD``, ``gallery_GD``: features, numpy or tensors; or None for both with ``distance`` ``(Q, G)``. Ids and
    cameras: whole numbers or strings, one per row; cameras None for both: no camera rule. Market-1501 protocol (Zheng
    et al., ICCV 2015): gallery images of the query's person *and* camera are left out, queries without another match do
    not count. Every id is a person; junk detections (-1 in Market-1501) are left out when the data is read.

    The order of the gallery does not matter. Items at equal distance: average precision as scikit-learn's (they share
    the precision at their end), CMC and INP count non-matches first, so that collapsed features do not score well.

    Raises ``UserError`` when no query has a match, for numbers that are not finite and for shapes that do not fit.
    """
    query_codes, gallery_codes = _codes(query_ids, gallery_ids, "ids")
    if (query_cameras is None) != (gallery_cameras is None):
        raise UserError("cameras: given for one of query and gallery only; give both, or None for both")
    cameras = None if query_cameras is None else _codes(query_cameras, gallery_cameras, "cameras")
    if cameras is not None and (len(cameras[0]) != len(query_codes) or len(cameras[1]) != len(gallery_codes)):
        raise UserError(
            f"cameras: expected {len(query_codes)} of query and {len(gallery_codes)} of gallery, as many as ids; "
            f"got {len(cameras[0])} and {len(cameras[1])}"
        )
    if max_rank < 1:
        raise UserError(f"max_rank: expected at least 1, got {max_rank}")

    by_id = np.argsort(gallery_codes, kind="stable")
    first_match = np.searchsorted(gallery_codes[by_id], query_codes, "left")
    end_match = np.searchsorted(gallery_codes[by_id], query_codes, "right")
    rows = _distance_rows(query_QD, gallery_GD, distance, (len(query_codes), len(gallery_codes)))

    average_precision_Q = np.full(len(query_codes), np.nan)
    inverse_penalties, ranks_of_first = [], []
    for query, distance_G in enumerate(rows):
        matches = by_id[first_match[query] : end_match[query]]
        if cameras is not None:
            same_camera = cameras[1][matches] == cameras[0][query]
            distance_G[matches[same_camera]] = np.inf  # left out: behind everything that counts
            matches = matches[~same_camera]
        if len(matches) == 0:
            continue
        match_distances = np.sort(distance_G[matches])
        # Up to and including everything tied with a match: how many items, and how many matches.
        num_items = np.searchsorted(np.sort(distance_G), match_distances, "right")
        num_matches = np.searchsorted(match_distances, match_distances, "right")
        average_precision_Q[query] = np.mean(num_matches / num_items)
        inverse_penalties.append(len(matches) / num_items[-1])
        ranks_of_first.append(num_items[0] - num_matches[0])

    if not ranks_of_first:
        raise UserError(
            f"none of {len(query_codes)} queries has a match among {len(gallery_codes)} gallery images"
            + ("" if cameras is None else " of another camera")
            + "; check the split and the ids"
        )
    within_rank = np.asarray(ranks_of_first)[:, None] < np.arange(1, max_rank + 1)
    return RankingResult(
        mAP=float(np.nanmean(average_precision_Q)),
        mINP=float(np.mean(inverse_penalties)),
        cmc=within_rank.mean(axis=0),
        num_valid_queries=len(ranks_of_first),
        average_precision_Q=average_precision_Q,
    )


def _codes(query: Any, gallery: Any, name: str) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """The labels as numbers 0, 1, ... that are equal where the labels are."""
    query, gallery = _labels(query, f"query {name}"), _labels(gallery, f"gallery {name}")
    if (query.dtype.kind == "U") != (gallery.dtype.kind == "U"):
        raise UserError(f"{name}: query has {query.dtype}, gallery has {gallery.dtype}; give both the same type")
    codes = np.unique(np.concatenate([query, gallery]), return_inverse=True)[1]
    return codes[: len(query)], codes[len(query) :]


def _labels(values: Any, name: str) -> NDArray[Any]:
    labels = as_array(values)
    labels = np.asarray(labels.tolist()) if labels.dtype == object else labels
    if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iuU":
        raise UserError(f"{name}: expected one whole number or string per row, got {labels.dtype} {labels.shape}")
    return labels


def _distance_rows(
    query_QD: Any, gallery_GD: Any, distance: Any, shape: tuple[int, int]
) -> Iterator[NDArray[np.floating]]:
    """The finite distances of one query after the other, as arrays that may be changed."""
    if (query_QD is None) != (gallery_GD is None) or (query_QD is None) == (distance is None):
        raise UserError("give the features of query and gallery, or None for both and their distance")
    if distance is None:
        rows = _cosine_rows(query_QD, gallery_GD, shape)
    else:
        distance = as_array(distance)
        if distance.shape != shape:
            raise UserError(f"distance: expected the shape {shape} of query and gallery ids, got {distance.shape}")
        rows = (np.array(row, dtype=np.result_type(row, np.float32)) for row in distance)
    for query, row in enumerate(rows):
        if not np.isfinite(row).all():
            raise UserError(f"distance: row {query} is not finite")
        yield row


def _cosine_rows(query_QD: Any, gallery_GD: Any, shape: tuple[int, int]) -> Iterator[NDArray[np.floating]]:
    query_QD, gallery_GD = normalized(query_QD, "query features"), normalized(gallery_GD, "gallery features")
    if (len(query_QD), len(gallery_GD)) != shape:
        raise UserError(
            f"features: {len(query_QD)} and {len(gallery_GD)} rows do not fit {shape[0]} and {shape[1]} ids"
        )
    # Equal features must be at equal distances wherever they stand, but a matrix product rounds differently from
    # column to column. So each distinct feature is compared once, in an order that the gallery's order cannot change.
    bytes_G = np.ascontiguousarray(gallery_GD).view(np.dtype((np.void, gallery_GD.itemsize * gallery_GD.shape[1])))
    _, first, column_of = np.unique(bytes_G.ravel(), return_index=True, return_inverse=True)
    distinct_MD = gallery_GD[first]
    block = max(1, _BLOCK_BYTES // (distinct_MD.itemsize * len(distinct_MD)))
    for start in range(0, len(query_QD), block):
        for row in one_minus_dot(query_QD[start : start + block], distinct_MD):
            yield row[column_of]
