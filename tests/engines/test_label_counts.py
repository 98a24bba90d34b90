"""Counts of labels, against counting by hand."""

import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import product

import numpy as np
import pytest

from passreid_ray.data import Rows, SyntheticSource, open_rows
from passreid_ray.data.rows import make_rows
from passreid_ray.data.stores import FileStore
from passreid_ray.engines.label_counts import CameraCounts, count_labels

Label = tuple[str | None, str | None, str | None]


def labelled(labels: Sequence[Label]) -> Rows:
    """Rows of (person, camera, split)."""
    persons, cameras, splits = zip(*labels, strict=True)
    names = [f"{number:04d}.png" for number in range(len(labels))]
    return make_rows(FileStore("nowhere"), names, where="test", person_ids=persons, camera_ids=cameras, splits=splits)


def test_identities_and_cameras_are_counted_without_junk() -> None:
    counts = count_labels(
        labelled(
            [
                ("a", "1", "train"),
                ("a", "2", "train"),
                ("a", "1", "train"),
                ("b", "1", "train"),
                ("b", "1", "train"),
                ("c", "2", "gallery"),
                ("-1", "2", "gallery"),
                ("-1", "3", "gallery"),
                (None, "2", "train"),
            ]
        ),
        images_per_identity=3,
    )
    people = counts.people
    assert (people.people, people.images_min, people.images_median, people.images_max) == (3, 1, 2, 3)
    assert (people.single_image, people.too_few_images, people.single_camera, people.cameras_median) == (1, 2, 2, 1)
    assert (counts.training.people, counts.training.too_few_images, counts.training.single_camera) == (2, 1, 1)
    assert (counts.junk_images, counts.unlabelled_images, counts.images_without_camera) == (2, 1, 0)
    assert (counts.training_images, dict(counts.splits)) == (6, {"train": 6, "gallery": 3})
    assert counts.cameras == {"1": CameraCounts(4, 2), "2": CameraCounts(4, 2), "3": CameraCounts(1, 0)}


def test_data_without_labels_has_no_people() -> None:
    counts = count_labels(labelled([(None, None, None)] * 3), 4)
    assert (counts.people.people, counts.people.images_max, counts.people.single_camera) == (0, 0, None)
    assert (counts.unlabelled_images, counts.images_without_camera, counts.training_images) == (3, 3, 3)
    assert (dict(counts.splits), dict(counts.cameras)) == ({"none": 3}, {})
    assert counts.queries_without_match is None


def test_cameras_per_identity_are_unknown_when_one_camera_is() -> None:
    assert count_labels(labelled([("a", "1", None), ("a", None, None)]), 4).people.single_camera is None


def test_people_on_both_sides_are_counted_once() -> None:
    sides = [("a", "train"), ("a", "query"), ("a", "gallery"), ("b", "val"), ("b", "gallery"), ("c", "train")]
    junk = [("-1", "train"), ("-1", "gallery")]
    counts = count_labels(labelled([(person, "1", split) for person, split in sides + junk]), 4)
    assert counts.people_in_training_and_test == 2


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("has_cameras", [True, False])
def test_queries_without_match_are_those_of_a_literal_protocol(seed: int, has_cameras: bool) -> None:
    rng = np.random.default_rng(seed)
    labels: list[Label] = [
        (str(rng.choice(["a", "b", "c", "d", "e", "-1"])), str(rng.integers(3)), str(rng.choice(["query", "gallery"])))
        for _ in range(16)
    ]
    if not has_cameras:
        labels[0] = ("a", None, "gallery")
    queries = [label for label in labels if label[2] == "query" and label[0] != "-1"]
    gallery = [label for label in labels if label[2] == "gallery"]
    matched = {
        position
        for (position, query), other in product(enumerate(queries), gallery)
        if query[0] == other[0] and (not has_cameras or query[1] != other[1])
    }
    counts = count_labels(labelled(labels), 4)
    assert counts.queries == len(queries)
    assert counts.queries_without_match == len(queries) - len(matched)


def test_synthetic_people_are_counted_as_they_were_ordered() -> None:
    counts = count_labels(open_rows(SyntheticSource(num_people=6, num_cameras=3, images_per_person=6)), 4)
    assert (counts.people.people, counts.people.images_median, len(counts.cameras)) == (6, 6, 3)
    assert (counts.training.people, counts.people_in_training_and_test, counts.queries_without_match) == (3, 0, 0)


def test_one_long_label_takes_no_memory_for_the_other_rows() -> None:
    labels: list[Label] = [(f"p{number % 7}", "1", "train") for number in range(20_000)]
    labels[3] = ("x" * 20_000, "1", "train")
    rows = labelled(labels)
    tracemalloc.start()
    counts = count_labels(rows, 4)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (counts.people.people, counts.people.single_image) == (8, 1)
    assert peak_bytes < 10_000_000  # rows times the longest label: 400 MB


@pytest.mark.parametrize("seed", range(5))
def test_counts_are_those_of_a_loop_over_the_rows(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values: list[Label] = []
    for _ in range(200):
        person, camera, split = rng.integers(0, (12, 5, 4)).tolist()
        values.append((["-1", None, *map(str, range(10))][person], str(camera), ["train", "val", None, "query"][split]))
    counts = count_labels(labelled(values), 20)
    cameras_of: defaultdict[str, set[str | None]] = defaultdict(set)
    images_of: Counter[str] = Counter()
    for person, camera, split in values:
        if person not in (None, "-1") and split in ("train", "val", None):
            cameras_of[person].add(camera)
            images_of[person] += 1
    assert (counts.training.people, counts.training.images_max) == (len(images_of), max(images_of.values()))
    assert counts.training.cameras_median == np.median([len(cameras) for cameras in cameras_of.values()])
    assert counts.training.too_few_images == sum(images < 20 for images in images_of.values())
    for name, found in counts.cameras.items():
        own = [person for person, camera, _ in values if camera == name]
        assert found == CameraCounts(len(own), len(set(own) - {None, "-1"}))
    splits = Counter(split or "none" for _, _, split in values)
    assert list(counts.splits.items()) == sorted(splits.items())
    by_size = [(-found.images, name) for name, found in counts.cameras.items()]
    assert by_size == sorted(by_size)
