"""Is this the data set it is taken for? Figures of a source beside those of the well-known public splits."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from passreid_ray.data.rows import JUNK_PERSON_ID, Rows

DISTRACTOR_PERSON_ID = "0000"
"""Boxes of the gallery that show nobody in particular (Market-1501's convention; a person like others elsewhere)."""

_BOTH = "train with val"
_SPLIT_ORDER = ("train", "val", "query", "gallery")
_CLOSE = 0.01  # a figure off by more than this fraction speaks for another data set
_FEWEST_UNLABELLED = 2000  # 1,400 images without labels are no sign of a data set with 1,400 queries


@dataclass(frozen=True, slots=True)
class SplitFigures:
    """What one split holds. A figure is 0 where the source does not know it."""

    images: int
    """Images without junk."""
    people: int
    """Different person_ids without junk and distractors."""
    cameras: int
    """Different camera_ids of the images."""
    junk_images: int
    """Images of person -1, which count nowhere."""
    distractor_images: int
    """Images of person 0000; they are among ``images``."""


@dataclass(frozen=True, slots=True)
class _KnownSplit:
    """Published figures; None: not published, so never compared."""

    images: int | None
    people: int | None
    cameras: int | None
    junk_images: int = 0
    """Images of person -1 that may be there, all or none of them."""


@dataclass(frozen=True, slots=True)
class _KnownSet:
    name: str
    kind: str | None
    """``kind`` of the source that is named after the set."""
    people: int
    splits: dict[str, _KnownSplit]
    has_distractors: bool = False

    def whole(self) -> _KnownSplit:
        """All splits together, as a source without splits sees them."""
        images = sum(split.images or 0 for split in self.splits.values())
        cameras = max(split.cameras or 0 for split in self.splits.values())
        return _KnownSplit(images, self.people, cameras, sum(split.junk_images for split in self.splits.values()))


# Market-1501: readme.txt of the data set (19,732 gallery files; 15,913 without the 3,819 of person -1) and Zheng et
# al., ICCV 2015. MSMT17: Wei et al., CVPR 2018; 32,621 training images are the lists train and val together, and
# version 2 masks faces but keeps every image. CUHK03, new protocol: Zhong et al., CVPR 2017, and its page CUHK03-NP.
# PersonX: Sun and Zheng, CVPR 2019, the harder subset that SpCL (arXiv:2006.02713) and OpenUnReID use.
_MSMT17_TEST = {"query": _KnownSplit(11_659, 3_060, 15), "gallery": _KnownSplit(82_161, 3_060, 15)}
_KNOWN_SETS = (
    _KnownSet(
        "Market-1501",
        "market1501",
        1_501,
        {
            "train": _KnownSplit(12_936, 751, 6),
            "query": _KnownSplit(3_368, 750, 6),
            "gallery": _KnownSplit(15_913, 750, 6, junk_images=3_819),
        },
        has_distractors=True,
    ),
    _KnownSet(
        "MSMT17",
        "msmt17",
        4_101,
        {
            "train": _KnownSplit(30_248, None, None),
            "val": _KnownSplit(2_373, None, None),
            _BOTH: _KnownSplit(None, 1_041, 15),
            **_MSMT17_TEST,
        },
    ),
    # The same with both lists in one split, as in copies that were turned into Market-1501's layout.
    _KnownSet("MSMT17", "msmt17", 4_101, {"train": _KnownSplit(32_621, 1_041, 15), **_MSMT17_TEST}),
    _KnownSet(
        "CUHK03 (767/700, labelled)",
        None,
        1_467,
        {
            "train": _KnownSplit(7_368, 767, 2),
            "query": _KnownSplit(1_400, 700, 2),
            "gallery": _KnownSplit(5_328, 700, 2),
        },
    ),
    _KnownSet(
        "CUHK03 (767/700, detected)",
        None,
        1_467,
        {
            "train": _KnownSplit(7_365, 767, 2),
            "query": _KnownSplit(1_400, 700, 2),
            "gallery": _KnownSplit(5_332, 700, 2),
        },
    ),
    _KnownSet(
        "PersonX",
        None,
        1_266,
        {
            "train": _KnownSplit(9_840, 410, 6),
            "query": _KnownSplit(5_136, 856, 6),
            "gallery": _KnownSplit(30_816, 856, 6),
        },
    ),
)


def describe_splits(rows: Rows) -> dict[str | None, SplitFigures]:
    """Figures of every split: train, val, query, gallery, then others by name; None holds the rows without one."""
    return _describe(rows.table, rows.table["split"])


def check_known_set(rows: Rows, kind: str | None = None) -> list[str]:
    """Lines for people: which public data set this is, or which of its figures differ; empty when it is like none.

    ``kind`` is that of the source the rows come from, None when it says nothing. A set is recognised by one split
    whose images and people are both within 1 % (only one of them for the set that ``kind`` is named after), and the
    one that most figures agree with is named. Splits that were not read are not missed. Rows without any split are
    compared with each split and with the whole set. Joined sources are best checked one by one.

    >>> check_known_set(open_rows(Market1501Source(root=root)), "market1501")
    ['gallery has 15,912 images, Market-1501 has 15,913']
    """
    figures = describe_splits(rows)
    if "train" in figures and "val" in figures:
        training = rows.table.filter(pc.field("split").isin(["train", "val"]))
        figures[_BOTH] = _describe(training, pa.chunked_array([pa.repeat(_BOTH, len(training))]))[_BOTH]
    comparisons = list(chain.from_iterable(_comparisons(known, figures) for known in _KNOWN_SETS))
    recognised = [each for each in comparisons if each.is_recognised(kind)]
    if not recognised:
        return []
    best = max(each.rank(kind) for each in recognised)
    first, *others = [each for each in recognised if each.rank(kind) == best]
    # Two sets can share all that was read, such as CUHK03's queries, and MSMT17 is listed twice.
    same = [each for each in others if each.lines("") == first.lines("")]
    return first.lines(" or ".join(dict.fromkeys(each.name for each in (first, *same))))


@dataclass(frozen=True, slots=True)
class _Pair:
    """A split of the rows beside one of a known set."""

    label: str
    found: SplitFigures
    known: _KnownSplit
    people: int

    def figures(self) -> Iterator[tuple[str, int, int]]:
        """What can be compared: unit, found, known."""
        unit = "images without junk" if self.found.junk_images else "images"
        if self.known.images is not None:
            yield unit, self.found.images, self.known.images
        if self.known.people is not None and self.people:
            yield "people", self.people, self.known.people
        if self.known.cameras is not None and self.found.cameras:
            yield "cameras", self.found.cameras, self.known.cameras
        if self.found.junk_images:
            yield "junk images", self.found.junk_images, self.known.junk_images

    def is_recognised(self, *, by_one: bool) -> bool:
        images, people = self.found.images, self.people
        if self.known.images is None:
            return False
        if self.known.people is None or not people:  # nothing but the images: they have to be equal
            return images == self.known.images and images >= _FEWEST_UNLABELLED
        close = (_is_close(images, self.known.images), _is_close(people, self.known.people))
        return any(close) if by_one else all(close)


@dataclass(frozen=True, slots=True)
class _Comparison:
    """All that the rows and a known set have in common."""

    name: str
    kind: str | None
    pairs: tuple[_Pair, ...]
    parts: str
    """Which splits were compared, in brackets; empty for all of them."""

    def is_recognised(self, kind: str | None) -> bool:
        by_one = kind is not None and kind == self.kind
        return any(pair.is_recognised(by_one=by_one) for pair in self.pairs)

    def rank(self, kind: str | None) -> tuple[bool, int, bool]:
        equal = [found == known for pair in self.pairs for _, found, known in pair.figures()]
        return all(equal), sum(equal), kind is not None and kind == self.kind

    def lines(self, name: str) -> list[str]:
        """The differences under ``name``, or that there are none."""
        differences = [
            f"{pair.label or 'the data'} has {found:,} {unit.removesuffix('s') if found == 1 else unit}, "
            f"{name}{'' if pair.label else self.parts} has {known:,}"
            for pair in self.pairs
            for unit, found, known in pair.figures()
            if found != known
        ]
        return differences or [f"matches {name}{self.parts}"]


def _comparisons(known: _KnownSet, figures: dict[str | None, SplitFigures]) -> Iterator[_Comparison]:
    def pair(label: str, found: SplitFigures, split: _KnownSplit) -> _Pair:
        is_person = found.distractor_images > 0 and not known.has_distractors
        return _Pair(label, found, split, found.people + is_person)

    if figures.keys() == {None}:
        found = figures[None]
        for name, split in known.splits.items():
            yield _Comparison(known.name, known.kind, (pair("", found, split),), f" ({name})")
        yield _Comparison(known.name, known.kind, (pair("", found, known.whole()),), "")
        return
    common = [name for name in known.splits if name in figures]
    read = [name for name in common if name != _BOTH]
    all_read = set(common) == known.splits.keys()
    pairs = tuple(pair(name, figures[name], known.splits[name]) for name in common)
    yield _Comparison(known.name, known.kind, pairs, "" if all_read else f" ({', '.join(read)})")


def _is_close(found: int, known: int) -> bool:
    return abs(found - known) <= _CLOSE * known


def _describe(table: pa.Table, split: pa.ChunkedArray) -> dict[str | None, SplitFigures]:
    split_N, names = _codes(split)
    person_N, people = _codes(table["person_id"])
    camera_N, cameras = _codes(table["camera_id"])
    is_junk_N = _is_value(person_N, people, JUNK_PERSON_ID)
    is_distractor_N = _is_value(person_N, people, DISTRACTOR_PERSON_ID)
    num_splits = len(names) + 1  # the last holds the rows without a split

    def images(mask_N: np.ndarray) -> list[int]:
        return np.bincount(split_N[mask_N], minlength=num_splits).tolist()

    def different(codes_N: np.ndarray, values: int, mask_N: np.ndarray) -> list[int]:
        keep_N = mask_N & (codes_N < values)
        pairs = np.unique(split_N[keep_N] * (values + 1) + codes_N[keep_N])
        return np.bincount(pairs // (values + 1), minlength=num_splits).tolist()

    columns = (
        images(~is_junk_N),
        different(person_N, len(people), ~is_junk_N & ~is_distractor_N),
        different(camera_N, len(cameras), ~is_junk_N),
        images(is_junk_N),
        images(is_distractor_N),
    )
    figures = {
        name: SplitFigures(*values) for name, values in zip((*names, None), zip(*columns, strict=True), strict=True)
    }
    if not split.null_count:
        del figures[None]
    return {name: figures[name] for name in sorted(figures, key=_order)}


def _codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """``(N,)`` int64 positions in the list of values; what is null has the position after the last."""
    encoded = column.combine_chunks().dictionary_encode()
    values = encoded.dictionary.to_pylist()
    return encoded.indices.fill_null(len(values)).to_numpy(zero_copy_only=False).astype(np.int64), values


def _is_value(codes_N: np.ndarray, values: list[str], value: str) -> np.ndarray:
    return codes_N == values.index(value) if value in values else np.zeros(len(codes_N), bool)


def _order(name: str | None) -> tuple[int, str]:
    if name is None:
        return len(_SPLIT_ORDER) + 1, ""
    return (_SPLIT_ORDER.index(name), name) if name in _SPLIT_ORDER else (len(_SPLIT_ORDER), name)
