"""Counts of images that were looked at."""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from passreid_ray.engines.image_counts import DuplicateCounts, count_duplicates, count_images
from passreid_ray.engines.image_facts import FACTS


def facts(num: int, **columns: Any) -> NDArray[np.void]:
    """``FACTS`` of usable, unlike images, with ``columns`` replaced."""
    rng = np.random.default_rng(0)
    facts_N = np.zeros(num, FACTS)
    usual: dict[str, Any] = {
        "width_px": 64,
        "height_px": 128,
        "bytes": 3000,
        "format": 1,
        "brightness": 120,
        "contrast": 50,
    }
    usual["dhash"] = rng.integers(2**64, size=num, dtype=np.uint64)
    for name, value in (usual | columns).items():
        facts_N[name] = value
    if "prefix" not in columns:
        facts_N["prefix"] = prefixes(range(num))
    return facts_N


def prefixes(contents: Sequence[int]) -> NDArray[np.uint64]:
    digests = [hashlib.sha256(str(content).encode()).digest()[:16] for content in contents]
    return np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)


def duplicates(
    facts_N: NDArray[np.void], persons: Sequence[str | None] | None = None, splits: Sequence[str | None] | None = None
) -> DuplicateCounts:
    unknown = [None] * len(facts_N)
    return count_duplicates(facts_N, np.array(persons or unknown, object), np.array(splits or unknown, object))


def test_images_are_counted_by_what_they_are() -> None:
    counts = count_images(
        facts(
            5,
            format=[1, 1, 2, 0, 1],
            is_grey=[0, 1, 1, 0, 0],
            brightness=[29, 31, 120, 0, 120],
            contrast=[50, 3.9, 4.1, 0, 50],
            width_px=[31, 32, 64, 0, 200],
            bytes=[10, 20, 30, 40, 50],
        ),
        ["empty"],
    )
    assert (counts.looked_at, counts.bad, counts.usable, counts.total_bytes) == (5, 1, 4, 150)
    assert (counts.formats, counts.bad_reasons) == ({"JPEG": 3, "PNG": 1}, {"empty": 1})
    assert (counts.grey, counts.dark, counts.blank, counts.narrow, counts.lying) == (2, 1, 1, 1, 1)


def test_spreads_are_of_usable_images() -> None:
    counts = count_images(facts(102, format=[0, *[1] * 101], height_px=[7, *range(100, 201)]), ["empty"])
    assert (counts.height_px.smallest, counts.height_px.median, counts.height_px.largest) == (100, 150, 200)
    assert counts.height_px.percentiles == {"p1": 101, "p5": 105, "p50": 150, "p95": 195, "p99": 199}
    assert counts.aspect.median == round(150 / 64, 3)
    assert counts.area_px.largest == 200 * 64


def test_without_usable_images_there_is_nothing_to_spread() -> None:
    counts = count_images(facts(2, format=0), ["empty", "empty"])
    assert (counts.usable, counts.formats, counts.width_px.largest) == (0, {}, 0)
    found = duplicates(facts(2, format=0, prefix=0, dhash=0))
    assert (found.same_groups, found.near_images) == (0, 0)


def test_the_same_bytes_are_grouped_with_the_splits_and_people_they_join() -> None:
    contents = [0, 1, 0, 2, 0, 1, 3, 4, 4]
    persons = ["a", "b", "a", "c", "a", "d", "e", "-1", "a"]
    splits = ["train", "query", "query", "train", "train", "query", "train", "gallery", "train"]
    found = duplicates(facts(9, prefix=prefixes(contents)), persons, splits)
    assert (found.same_groups, found.same_copies, found.near_images) == (3, 4, 0)
    assert found.same == [(0, 2, 4), (1, 5), (7, 8)]
    assert found.same_across_splits == {"query + train": 1}  # junk leaks nothing
    assert found.same_across_people == 1
    assert [alike.positions for alike in found.examples] == [(0, 2, 4), (1, 5)]


def test_unlabelled_copies_cross_nothing() -> None:
    found = duplicates(facts(2, prefix=prefixes([0, 0])))
    assert (found.same_copies, found.same_across_splits, found.same_across_people) == (1, {}, 0)


def test_near_images_are_grouped_with_the_splits_and_people_they_join() -> None:
    hashes = np.array([0xFFFF_0000_1234, 0xFFFF_0000_1235, 1 << 60, 0xFFFF_0000_1237, 0x1234_5678_9ABC], np.uint64)
    persons, splits = ["a", "b", "a", "b", "c"], ["train", "gallery", "query", "gallery", None]
    found = duplicates(facts(5, dhash=hashes), persons, splits)
    assert (found.near_images, found.near_groups, found.near) == (3, 1, [(0, 1, 3)])
    assert found.near_pairs_across_splits == {"gallery + train": 2}
    assert found.near_pairs_across_people == 2
    assert [(alike.positions, alike.bits) for alike in found.examples] == [((0, 3), 2), ((0, 1), 1), ((1, 3), 1)]
    assert found.num_surplus == 2


def test_copies_blank_images_and_bad_ones_are_near_to_nothing() -> None:
    same_hash = facts(
        5, dhash=9, prefix=np.concatenate([prefixes([0, 0, 1]), prefixes([2]), np.zeros((1, 2), np.uint64)])
    )
    same_hash["contrast"][2], same_hash["format"][4] = 1, 0
    found = duplicates(same_hash)
    assert (found.same, found.near) == ([(0, 1)], [(0, 3)])
