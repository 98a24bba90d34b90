"""Who is in the data, by how many cameras and in which split; pure functions of the labels."""

from collections import Counter
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


@dataclass(frozen=True)
class _Coded:
    """A column as numbers: long labels are there once, and nothing is made a Python object for each row."""

    codes_N: NDArray[np.int64]
    """``(N,)`` positions in ``names``, -1 where unknown."""
    names: list[str]

    def is_one_of(self, *names: str | None) -> NDArray[np.bool_]:
        """``(N,)``: which rows have one of ``names``; None is an unknown one."""
        is_wanted = np.array([*(name in names for name in self.names), None in names], bool)
        return is_wanted[self.codes_N]  # -1 is the last


def count_labels(rows: Rows, images_per_identity: int) -> LabelCounts:
    """Counts of all ``rows``; ``images_per_identity`` is the K of P x K batches."""
    person, camera, split = (_coded(rows, name) for name in ("person_id", "camera_id", "split"))
    person_N, camera_N = person.codes_N, camera.codes_N
    is_junk_N = person.is_one_of(JUNK_PERSON_ID)
    is_person_N = (person_N >= 0) & ~is_junk_N
    is_training_N = split.is_one_of(*TRAINING_SPLITS)
    is_query_N, is_gallery_N = (is_person_N & split.is_one_of(name) for name in (QUERY, GALLERY))
    tuned = np.unique(person_N[is_person_N & split.is_one_of("train", "val")])
    tested = np.unique(person_N[is_query_N | is_gallery_N])
    has_both = {QUERY, GALLERY} <= set(split.names)
    return LabelCounts(
        images=len(rows),
        junk_images=int(is_junk_N.sum()),
        unlabelled_images=int((person_N < 0).sum()),
        images_without_camera=int((camera_N < 0).sum()),
        splits=_count_splits(split),
        people=_count_people(person_N[is_person_N], camera_N[is_person_N], images_per_identity),
        training=_count_people(
            person_N[is_person_N & is_training_N], camera_N[is_person_N & is_training_N], images_per_identity
        ),
        training_images=int((is_training_N & ~is_junk_N).sum()),
        cameras=_count_cameras(camera, person_N, is_person_N),
        people_in_training_and_test=len(np.intersect1d(tuned, tested)),
        queries=int(is_query_N.sum()),
        queries_without_match=_num_unmatched(person_N, camera_N, is_query_N, is_gallery_N) if has_both else None,
    )


def _coded(rows: Rows, name: str) -> _Coded:
    column = rows.table[name].dictionary_encode().combine_chunks()
    return _Coded(column.indices.fill_null(-1).to_numpy().astype(np.int64), column.dictionary.to_pylist())


def _count_splits(split: _Coded) -> dict[str, int]:
    counts: Counter[str] = Counter()
    images = np.bincount(split.codes_N + 1, minlength=len(split.names) + 1).tolist()
    for name, own_images in zip([None, *split.names], images, strict=True):
        counts[name or NO_SPLIT] += own_images
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def _count_people(person_N: NDArray[np.int64], camera_N: NDArray[np.int64], images_per_identity: int) -> PeopleCounts:
    images = np.bincount(person_N)
    is_there = images > 0
    images_I = images[is_there]
    if not len(images_I):
        return PeopleCounts(0, 0, 0.0, 0, 0, 0, None, None)
    cameras_I = None
    if (camera_N >= 0).all():
        cameras_I = _num_partners(person_N, camera_N, len(images))[is_there]
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
    camera: _Coded, person_N: NDArray[np.int64], is_person_N: NDArray[np.bool_]
) -> dict[str, CameraCounts]:
    is_known_N = camera.codes_N >= 0
    size = len(camera.names)
    images = np.bincount(camera.codes_N[is_known_N], minlength=size).tolist()
    is_counted_N = is_known_N & is_person_N
    people = _num_partners(camera.codes_N[is_counted_N], person_N[is_counted_N], size).tolist()
    order = sorted(range(size), key=lambda code: (-images[code], camera.names[code]))
    return {camera.names[code]: CameraCounts(images[code], people[code]) for code in order}


def _num_partners(left_N: NDArray[np.int64], right_N: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """``(size,)``: with how many different values of ``right_N`` each of 0, 1, ... occurs in ``left_N``."""
    num_right = int(right_N.max(initial=0)) + 1
    return np.bincount(np.unique(left_N * num_right + right_N) // num_right, minlength=size)


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
