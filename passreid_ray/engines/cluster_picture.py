"""``clusters.png``: what clusters are made of."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from passreid_ray.data import BadImage, Rows
from passreid_ray.retrieval.dbscan import OUTLIER
from passreid_ray.viz.cluster_sheet import MAX_CROPS, cluster_sheet

NUM_CLUSTERS = 8


def write_cluster_picture(rows: Rows, labels_N: NDArray[np.int64], path: Path) -> bool:
    """Crops of a few clusters, from the largest to the smallest; whether there was one to show.

    Where identities are known, a crop that is not of its cluster's most frequent person is framed in red.
    """
    sizes = np.bincount(labels_N[labels_N != OUTLIER], minlength=1)
    by_size = np.argsort(-sizes, kind="stable")[: np.count_nonzero(sizes)]
    clusters, frames = [], []
    for position in np.unique(np.linspace(0, len(by_size) - 1, NUM_CLUSTERS).astype(int)) if len(by_size) else []:
        cluster = by_size[position]
        members = np.flatnonzero(labels_N == cluster)
        cameras = {camera for camera in rows.camera_ids[members] if camera is not None}
        seen_by = f", {len(cameras)} cameras" if cameras else ""
        shown = members[np.unique(np.linspace(0, len(members) - 1, MAX_CROPS).astype(int))]
        clusters.append((f"cluster {cluster}: {len(members)} images{seen_by}", [_crop(rows, int(n)) for n in shown]))
        frames.append(_is_majority(rows.person_ids[members], rows.person_ids[shown]))
    if clusters:
        cluster_sheet(clusters, path, frames if any(mark is not None for own in frames for mark in own) else None)
    return bool(clusters)


def _is_majority(persons: NDArray[np.object_], shown: NDArray[np.object_]) -> list[bool | None]:
    names, counts = np.unique([str(person) for person in persons], return_counts=True)
    return [None if person is None else str(person) == names[np.argmax(counts)] for person in shown]


def _crop(rows: Rows, number: int) -> NDArray[np.uint8]:
    try:
        return rows.image(number)
    except BadImage:  # gone since its feature was made
        return np.full((2, 1, 3), 128, np.uint8)
