"""Pictures of a data set before training: crops spread over it, and images that are there twice."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from passreid_ray.data import JUNK_PERSON_ID, BadImage, Rows
from passreid_ray.engines.image_counts import Alike
from passreid_ray.viz.contact_sheet import contact_sheet

MAX_COLUMNS = 10
MAX_GROUP_COLUMNS = 4
UNKNOWN = "?"


def write_contact_sheet(rows: Rows, numbers_N: NDArray[np.int64], num_pictures: int, path: Path) -> bool:
    """Crops spread over the rows ``numbers_N``, which can be decoded; whether there was one to show.

    With labels a row is a person and a column a camera, or without cameras one image after the other.
    """
    if not len(numbers_N):
        return False
    persons_N, cameras_N = rows.person_ids[numbers_N], rows.camera_ids[numbers_N]
    is_person_N = np.array([person not in (None, JUNK_PERSON_ID) for person in persons_N], bool)
    if not is_person_N.any():
        shown = numbers_N[_spread_over(len(numbers_N), num_pictures)].tolist()
        columns = min(MAX_COLUMNS, len(shown))
        places = [shown[start : start + columns] for start in range(0, len(shown), columns)]
        contact_sheet(_crops(rows, places), path)
        return True
    numbers_N, persons_N, cameras_N = numbers_N[is_person_N], persons_N[is_person_N], cameras_N[is_person_N]
    cameras = _most_frequent(cameras_N) if all(camera is not None for camera in cameras_N) else []
    people = sorted(set(persons_N))
    wanted = _spread_over(len(people), max(1, num_pictures // (len(cameras) or MAX_COLUMNS)))
    people = [people[place] for place in wanted]
    places: list[list[int | None]] = []
    for person in people:
        is_own = persons_N == person
        own, own_cameras = numbers_N[is_own].tolist(), cameras_N[is_own].tolist()
        first = dict(zip(reversed(own_cameras), reversed(own), strict=True))
        places.append([first.get(camera) for camera in cameras] if cameras else own[:MAX_COLUMNS])
    contact_sheet(
        _crops(rows, places),
        path,
        row_names=[f"person {person}" for person in people],
        column_names=[f"camera {camera}" for camera in cameras],
    )
    return True


def write_duplicates(rows: Rows, numbers_N: NDArray[np.int64], examples: Sequence[Alike], path: Path) -> bool:
    """A row for each of ``examples``, whose positions are those of ``numbers_N``; whether there was one to show."""
    places: list[list[int | None]] = []
    names: list[str] = []
    for alike in examples:
        shown = numbers_N[list(alike.positions[:MAX_GROUP_COLUMNS])]
        title = "same bytes" if alike.bits is None else f"{alike.bits} of 64 bits differ"
        places.append(shown.tolist())
        names.append("\n".join([title, *(describe_row(rows, int(number)) for number in shown)]))
    if places:
        contact_sheet(_crops(rows, places), path, row_names=names)
    return bool(places)


def describe_row(rows: Rows, number: int) -> str:
    """A row's split and labels where it has some, else its image_id."""
    values = (rows.splits[number], rows.person_ids[number], rows.camera_ids[number])
    if all(value is None for value in values):
        return str(rows.image_ids[number])
    split, person, camera = (UNKNOWN if value is None else value for value in values)
    return f"{split}, {person}, camera {camera}"


def _spread_over(total: int, count: int) -> NDArray[np.int64]:
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(np.int64))


def _most_frequent(cameras_N: NDArray[np.object_]) -> list[str]:
    """The cameras with most images, in the order of their names."""
    counts = Counter(cameras_N)
    kept = sorted(counts, key=lambda name: (-counts[name], name))[:MAX_COLUMNS]
    return sorted(kept, key=lambda name: (len(name), name))


def _crops(rows: Rows, places: Sequence[Sequence[int | None]]) -> list[list[np.ndarray | None]]:
    return [[None if number is None else _crop(rows, number) for number in line] for line in places]


def _crop(rows: Rows, number: int) -> np.ndarray | None:
    try:
        return rows.image(number)
    except BadImage:  # gone since it was looked at
        return None
