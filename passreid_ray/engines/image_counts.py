"""Counts of images that were looked at: how large they are, how they look, which are there twice."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from passreid_ray.data import JUNK_PERSON_ID
from passreid_ray.data.image_hash import repeats
from passreid_ray.engines.image_facts import FORMATS
from passreid_ray.engines.near_duplicates import near_duplicates

NARROW_PX = 32
"""Below this width a person is a few dozen pixels, and clothes are all that can be told."""
DARK_BRIGHTNESS = 30.0
"""Mean grey value below which little of a person is visible."""
BLANK_CONTRAST = 4.0
"""Standard deviation of grey values below which an image shows nothing. Its hash is noise, so it is near to none."""
PERCENTILES = (1, 5, 50, 95, 99)
MAX_EXAMPLES = 20


@dataclass(frozen=True)
class Spread:
    """How a quantity is spread over the images; all 0 without images."""

    smallest: float
    percentiles: Mapping[str, float]
    """By ``PERCENTILES``: p1, p5, p50 and so on."""
    largest: float

    @property
    def median(self) -> float:
        """Half of the images have less."""
        return self.percentiles["p50"]


@dataclass(frozen=True)
class ImageCounts:
    """What the images are like. Everything but the first four is of those that can be used."""

    looked_at: int
    bad: int
    bad_reasons: Mapping[str, int]
    """Most frequent first."""
    total_bytes: int
    formats: Mapping[str, int]
    grey: int
    dark: int
    blank: int
    narrow: int
    """Less than ``NARROW_PX`` wide."""
    lying: int
    """Wider than high."""
    width_px: Spread
    height_px: Spread
    aspect: Spread
    """Height over width."""
    area_px: Spread
    file_bytes: Spread

    @property
    def usable(self) -> int:
        """Images that can be used."""
        return self.looked_at - self.bad


Group = tuple[int, ...]
"""Positions of images that are alike among those looked at."""


@dataclass(frozen=True)
class Alike:
    """Two or more images that are alike."""

    positions: Group
    bits: int | None
    """How many bits of the hash differ; None: the same bytes."""


@dataclass(frozen=True)
class DuplicateCounts:
    """Images that are there more than once. Junk crosses nothing, it counts nowhere."""

    same_groups: int
    """Groups of images with the same bytes."""
    same_copies: int
    """Images of these groups but one of each."""
    same_across_splits: Mapping[str, int]
    """Groups by the splits they are in, such as ``query + train``."""
    same_across_people: int
    """Groups with more than one person_id."""
    near_images: int
    """Of the images with different bytes, those that are near to another one."""
    near_groups: int
    near_pairs_across_splits: Mapping[str, int]
    near_pairs_across_people: int
    skipped_comparisons: int
    examples: Sequence[Alike]
    """Those that cross splits or people first."""
    same: Sequence[Group]
    """All groups of images with the same bytes."""
    near: Sequence[Group]
    """All groups of near duplicates; of images with the same bytes only the first is in one."""

    @property
    def num_surplus(self) -> int:
        """How many images fewer there would be with one image of every group."""
        return self.same_copies + self.near_images - self.near_groups


def count_images(facts_N: NDArray[np.void], reasons: Sequence[str]) -> ImageCounts:
    """Counts of ``(N,)`` ``FACTS``; ``reasons`` are those of the bad ones."""
    good_N = facts_N[facts_N["format"] > 0]
    width_N, height_N = (good_N[name].astype(np.float64) for name in ("width_px", "height_px"))
    kinds, counts = np.unique(good_N["format"], return_counts=True)
    return ImageCounts(
        looked_at=len(facts_N),
        bad=len(facts_N) - len(good_N),
        bad_reasons=dict(Counter(reasons).most_common(MAX_EXAMPLES)),
        total_bytes=int(facts_N["bytes"].sum(dtype=np.int64)),
        formats={FORMATS[kind]: int(count) for kind, count in zip(kinds, counts, strict=True)},
        grey=int(good_N["is_grey"].sum()),
        dark=int((good_N["brightness"] < DARK_BRIGHTNESS).sum()),
        blank=int((good_N["contrast"] < BLANK_CONTRAST).sum()),
        narrow=int((width_N < NARROW_PX).sum()),
        lying=int((width_N > height_N).sum()),
        width_px=_spread(width_N),
        height_px=_spread(height_N),
        aspect=_spread(height_N / width_N),
        area_px=_spread(height_N * width_N),
        file_bytes=_spread(good_N["bytes"].astype(np.float64)),
    )


def count_duplicates(
    facts_N: NDArray[np.void], persons_N: NDArray[np.object_], splits_N: NDArray[np.object_]
) -> DuplicateCounts:
    """Counts of ``(N,)`` ``FACTS`` and the labels of the same images, None where unknown."""
    copies_M2 = repeats(facts_N["prefix"])  # bad images are zeros there and repeat nothing
    groups: dict[int, list[int]] = {}
    for copy, first in copies_M2.tolist():
        groups.setdefault(first, [first]).append(copy)
    same = [tuple(members) for members in groups.values()]

    is_compared_N = (facts_N["format"] > 0) & (facts_N["contrast"] >= BLANK_CONTRAST)
    is_compared_N[copies_M2[:, 0]] = False
    distinct = np.flatnonzero(is_compared_N)
    near = near_duplicates(facts_N["dhash"][distinct])
    left_P, right_P = distinct[near.pairs_P2].T
    splits_crossed = _crossed(splits_N, persons_N, left_P, right_P)
    people_crossed = _crossed(persons_N, persons_N, left_P, right_P)
    names = [_joined(splits_N[left], splits_N[right]) for left, right in _pairs(left_P, right_P, splits_crossed)]

    same_splits = [_values(group, splits_N, persons_N) for group in same]
    same_people = [_values(group, persons_N, persons_N) for group in same]
    is_crossing = [len(splits) > 1 or len(people) > 1 for splits, people in zip(same_splits, same_people, strict=True)]
    shown = list(compress(same, is_crossing)) or same
    # Pairs across splits first, then across people, then the others from far to near: those of 0 bits tell least.
    order = np.lexsort((-near.bits_P, ~people_crossed, ~splits_crossed))[:MAX_EXAMPLES]
    pairs = [Alike((int(left_P[n]), int(right_P[n])), int(near.bits_P[n])) for n in order]
    return DuplicateCounts(
        same_groups=len(same),
        same_copies=len(copies_M2),
        same_across_splits=dict(Counter(_joined(*splits) for splits in same_splits if len(splits) > 1)),
        same_across_people=sum(len(people) > 1 for people in same_people),
        near_images=int((near.groups_N >= 0).sum()),
        near_groups=int(near.groups_N.max(initial=-1)) + 1,
        near_pairs_across_splits=dict(Counter(names)),
        near_pairs_across_people=int(people_crossed.sum()),
        skipped_comparisons=near.num_skipped,
        examples=[*(Alike(group, None) for group in shown[: MAX_EXAMPLES // 2]), *pairs][:MAX_EXAMPLES],
        same=same,
        near=_members(near.groups_N, distinct),
    )


def _spread(values_N: NDArray[np.float64]) -> Spread:
    values_N = values_N if len(values_N) else np.zeros(1)
    percentiles = np.percentile(values_N, PERCENTILES).tolist()
    names = [f"p{percent}" for percent in PERCENTILES]
    return Spread(
        float(values_N.min()),
        {name: round(value, 3) for name, value in zip(names, percentiles, strict=True)},
        float(values_N.max()),
    )


def _crossed(
    values_N: NDArray[np.object_], persons_N: NDArray[np.object_], left_P: NDArray[np.int64], right_P: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Pairs whose two values are known and differ, neither image being junk."""
    counts_N = np.array([value is not None for value in values_N], bool) & (persons_N != JUNK_PERSON_ID)
    return counts_N[left_P] & counts_N[right_P] & (values_N[left_P] != values_N[right_P]).astype(bool)


def _pairs(left_P: NDArray[np.int64], right_P: NDArray[np.int64], kept_P: NDArray[np.bool_]) -> list[tuple[int, int]]:
    return list(zip(left_P[kept_P].tolist(), right_P[kept_P].tolist(), strict=True))


def _values(group: Group, values_N: NDArray[np.object_], persons_N: NDArray[np.object_]) -> set[str]:
    members = [n for n in group if persons_N[n] != JUNK_PERSON_ID]
    return {str(values_N[n]) for n in members if values_N[n] is not None}


def _members(groups_N: NDArray[np.int64], positions_N: NDArray[np.int64]) -> list[Group]:
    """Positions of every group."""
    by_group = np.argsort(groups_N, kind="stable")
    ends = np.searchsorted(groups_N[by_group], np.arange(int(groups_N.max(initial=-1)) + 1))
    return [tuple(part.tolist()) for part in np.split(positions_N[by_group], ends)[1:]]


def _joined(*splits: str) -> str:
    return " + ".join(sorted(splits))
