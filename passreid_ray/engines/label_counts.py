"""Who is in the data, by how many cameras and in which split; pure functions of the labels."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from passreid_ray.data import JUNK_PERSON_ID, Rows

TRAINING_SPLITS = ("train", "val", None)
NO_SPLIT = "none"
QUERY, GALLERY = "query", "gallery"


@dataclass(frozen=True)
class CameraCounts:
    """What one camera sees."""

    images: int
    people: int


@dataclass(frozen=True)
class PeopleCounts:
    """Identities of some rows. Junk is nobody."""

    people: int
    images_min: int
    """Images of the identity that has fewest; this and the next are 0 without identities."""
    images_median: float
    images_max: int
    single_image: int
    """Identities with one image."""
    too_few_images: int
    """Identities with fewer images than a batch takes of each (K)."""
    single_camera: int | None
    """Identities that one camera alone has seen; None when cameras are unknown."""
    cameras_median: float | None
    """Cameras per identity."""


@dataclass(frozen=True)
class LabelCounts:
    """Labels of a data set."""

    images: int
    junk_images: int
    unlabelled_images: int
    images_without_camera: int
    splits: Mapping[str, int]
    """Images of each split; ``none`` for those without one."""
    people: PeopleCounts
    """All identities."""
    training: PeopleCounts
    """Identities of the splits train and val and of rows without a split."""
    training_images: int
    """Images of these splits without junk."""
    cameras: Mapping[str, CameraCounts]
    """By camera_id, the one with most images first."""
    people_in_training_and_test: int
    """Identities that are in train or val and also in query or gallery."""
    queries: int
    """Query images without junk."""
    queries_without_match: int | None
    """Queries whose person is not in the gallery, or only under the query's own camera; None without both splits."""


def count_labels(rows: Rows, images_per_identity: int) -> LabelCounts:
    """Counts of all ``rows``; ``images_per_identity`` is the K of P x K batches."""
    person_N, camera_N = _codes(rows.person_ids), _codes(rows.camera_ids)
    is_junk_N = rows.person_ids == JUNK_PERSON_ID
    is_person_N = (person_N >= 0) & ~is_junk_N
    is_training_N = _in_splits(rows.splits, TRAINING_SPLITS)
    names, counts = np.unique([str(name or NO_SPLIT) for name in rows.splits], return_counts=True)
    tuned = np.unique(person_N[is_person_N & _in_splits(rows.splits, ("train", "val"))])
    tested = np.unique(person_N[is_person_N & _in_splits(rows.splits, (QUERY, GALLERY))])
    is_query_N, is_gallery_N = (is_person_N & (rows.splits == split) for split in (QUERY, GALLERY))
    has_both = QUERY in names and GALLERY in names
    return LabelCounts(
        images=len(rows),
        junk_images=int(is_junk_N.sum()),
        unlabelled_images=int((person_N < 0).sum()),
        images_without_camera=int((camera_N < 0).sum()),
        splits=dict(zip(names.tolist(), counts.tolist(), strict=True)),
        people=_count_people(person_N[is_person_N], camera_N[is_person_N], images_per_identity),
        training=_count_people(
            person_N[is_person_N & is_training_N], camera_N[is_person_N & is_training_N], images_per_identity
        ),
        training_images=int((is_training_N & ~is_junk_N).sum()),
        cameras=_count_cameras(rows.camera_ids, camera_N, person_N, is_person_N),
        people_in_training_and_test=len(np.intersect1d(tuned, tested)),
        queries=int(is_query_N.sum()),
        queries_without_match=_num_unmatched(person_N, camera_N, is_query_N, is_gallery_N) if has_both else None,
    )


def _count_people(person_N: NDArray[np.int64], camera_N: NDArray[np.int64], images_per_identity: int) -> PeopleCounts:
    _, inverse_N, images_I = np.unique(person_N, return_inverse=True, return_counts=True)
    if not len(images_I):
        return PeopleCounts(0, 0, 0.0, 0, 0, 0, None, None)
    cameras_I = None
    if (camera_N >= 0).all():
        pairs = np.unique(np.stack([inverse_N, camera_N]), axis=1)
        cameras_I = np.bincount(pairs[0], minlength=len(images_I))
    return PeopleCounts(
        people=len(images_I),
        images_min=int(images_I.min()),
        images_median=float(np.median(images_I)),
        images_max=int(images_I.max()),
        single_image=int((images_I == 1).sum()),
        too_few_images=int((images_I < images_per_identity).sum()),
        single_camera=None if cameras_I is None else int((cameras_I == 1).sum()),
        cameras_median=None if cameras_I is None else float(np.median(cameras_I)),
    )


def _count_cameras(
    camera_ids: NDArray[np.object_],
    camera_N: NDArray[np.int64],
    person_N: NDArray[np.int64],
    is_person_N: NDArray[np.bool_],
) -> dict[str, CameraCounts]:
    numbers, firsts, images = np.unique(camera_N, return_index=True, return_counts=True)
    pairs = np.unique(np.stack([camera_N, person_N])[:, is_person_N], axis=1)
    people = dict(zip(*(part.tolist() for part in np.unique(pairs[0], return_counts=True)), strict=True))
    return {
        str(camera_ids[firsts[place]]): CameraCounts(int(images[place]), people.get(int(numbers[place]), 0))
        for place in np.argsort(-images, kind="stable")
        if numbers[place] >= 0
    }


def _num_unmatched(
    person_N: NDArray[np.int64],
    camera_N: NDArray[np.int64],
    is_query_N: NDArray[np.bool_],
    is_gallery_N: NDArray[np.bool_],
) -> int:
    """Queries that the Market-1501 protocol leaves without a right answer."""
    if (camera_N[is_query_N | is_gallery_N] < 0).any():  # then the evaluation has no camera rule
        return int((~np.isin(person_N[is_query_N], person_N[is_gallery_N])).sum())
    num_cameras = int(camera_N.max(initial=0)) + 1
    seen = np.unique(person_N[is_gallery_N] * num_cameras + camera_N[is_gallery_N])
    cameras_of_person = np.bincount(seen // num_cameras, minlength=int(person_N.max(initial=0)) + 1)
    is_own_seen = np.isin(person_N[is_query_N] * num_cameras + camera_N[is_query_N], seen)
    return int((cameras_of_person[person_N[is_query_N]] == is_own_seen).sum())


def _in_splits(splits_N: NDArray[np.object_], names: tuple[str | None, ...]) -> NDArray[np.bool_]:
    return np.array([split in names for split in splits_N], bool)


def _codes(values_N: NDArray[np.object_]) -> NDArray[np.int64]:
    """``(N,)`` numbers of the different values, -1 for None."""
    is_known_N = np.array([value is not None for value in values_N], bool)
    codes_N = np.full(len(values_N), -1, np.int64)
    if is_known_N.any():
        codes_N[is_known_N] = np.unique(values_N[is_known_N].astype(str), return_inverse=True)[1]
    return codes_N
