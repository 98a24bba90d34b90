"""Which gallery items a query is ranked against: the Market-1501 protocol (Zheng et al., ICCV 2015)."""

# Shape letters: Q queries, G gallery, M columns of a distance matrix. Several gallery items may share a column.

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passreid_ray.errors import UserError
from passreid_ray.retrieval.distances import as_array


@dataclass(frozen=True)
class Labels:
    """Persons and cameras of query and gallery, as numbers that are equal where the labels are."""

    persons_Q: NDArray[np.int64]
    persons_G: NDArray[np.int64]
    cameras_Q: NDArray[np.int64]
    cameras_G: NDArray[np.int64]
    """Without a camera rule no camera of the gallery is one of a query's."""


@dataclass(frozen=True)
class Protocol:
    """Where the gallery items of a query's person stand in the columns of the distances.

    Those of the query's camera are left out, the others are its matches. All other columns are non-matches.
    """

    items_M: NDArray[np.int32]
    """Gallery items that share a column."""
    columns_G: NDArray[np.int32]
    """Columns of the gallery items, one person after the other."""
    cameras_G: NDArray[np.int64]
    """Their cameras."""
    first_Q: NDArray[np.int64]
    """Where the items of each query's person start in the two above."""
    end_Q: NDArray[np.int64]
    cameras_Q: NDArray[np.int64]


def read_labels(query_ids: Any, gallery_ids: Any, query_cameras: Any, gallery_cameras: Any) -> Labels:
    """The labels of both sides; cameras None for both: no camera rule.

    Raises ``UserError`` for labels that are neither whole numbers nor strings, and for numbers of them that do not fit.
    """
    persons_Q, persons_G = _codes(query_ids, gallery_ids, "ids")
    if (query_cameras is None) != (gallery_cameras is None):
        raise UserError("cameras: given for one of query and gallery only; give both, or None for both")
    if query_cameras is None:
        cameras_Q, cameras_G = np.full(len(persons_Q), -1), np.zeros(len(persons_G), np.int64)
    else:
        cameras_Q, cameras_G = _codes(query_cameras, gallery_cameras, "cameras")
    if len(cameras_Q) != len(persons_Q) or len(cameras_G) != len(persons_G):
        raise UserError(
            f"cameras: expected {len(persons_Q)} of query and {len(persons_G)} of gallery, as many as ids; "
            f"got {len(cameras_Q)} and {len(cameras_G)}"
        )
    return Labels(persons_Q, persons_G, cameras_Q, cameras_G)


def protocol_of(labels: Labels, column_of_G: NDArray[np.integer], num_columns: int) -> Protocol:
    """The protocol for distances whose column ``column_of_G[g]`` holds gallery item ``g``."""
    by_person = np.argsort(labels.persons_G, kind="stable")
    persons = labels.persons_G[by_person]
    return Protocol(
        items_M=np.bincount(column_of_G, minlength=num_columns).astype(np.int32),
        columns_G=column_of_G[by_person].astype(np.int32),
        cameras_G=labels.cameras_G[by_person],
        first_Q=np.searchsorted(persons, labels.persons_Q, "left"),
        end_Q=np.searchsorted(persons, labels.persons_Q, "right"),
        cameras_Q=labels.cameras_Q,
    )


def _codes(query: Any, gallery: Any, name: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    query, gallery = one_per_row(query, f"query {name}"), one_per_row(gallery, f"gallery {name}")
    if (query.dtype.kind == "U") != (gallery.dtype.kind == "U"):
        raise UserError(f"{name}: query has {query.dtype}, gallery has {gallery.dtype}; give both the same type")
    codes = np.unique(np.concatenate([query, gallery]), return_inverse=True)[1].astype(np.int64)
    return codes[: len(query)], codes[len(query) :]


def one_per_row(values: Any, name: str) -> NDArray[Any]:
    """``values`` as an array of whole numbers or strings; ``UserError`` with ``name`` when they are something else."""
    labels = as_array(values)
    labels = np.asarray(labels.tolist()) if labels.dtype == object else labels
    if labels.ndim != 1 or labels.size == 0 or labels.dtype.kind not in "iuU":
        raise UserError(f"{name}: expected one whole number or string per row, got {labels.dtype} {labels.shape}")
    return labels
