from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import numpy as np
import pyarrow as pa
import pytest

from passreid_ray.data.known_sets import SplitFigures, check_known_set, describe_splits
from passreid_ray.data.market1501 import Market1501Source, read_market1501
from passreid_ray.data.rows import SCHEMA, Rows
from passreid_ray.data.stores import FileStore
from tests.data.pictures import write_images

Label = tuple[str | None, str | None, str | None]
"""split, person_id, camera_id"""


def rows_of(labels: Sequence[Label]) -> Rows:
    split, person, camera = (list(column) for column in zip(*labels, strict=True))
    names = [f"{index:06d}.jpg" for index in range(len(labels))]
    columns = [names, person, camera, split, np.zeros(len(labels), np.int32), names]
    return Rows(pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA), (FileStore("nowhere"),))


def labels_of(split: str | None, images: int, people: int, cameras: int, *, first: int = 1) -> list[Label]:
    """That many images, going round the people and the cameras."""
    return [
        (split, f"{first + index % people:04d}", str((index + index // people) % cameras)) for index in range(images)
    ]


def market(*splits: str) -> list[Label]:
    """The figures of Market-1501, its gallery without junk: 13,115 images of people and 2,798 distractors."""
    labels = {
        "train": labels_of("train", 12_936, 751, 6),
        "query": labels_of("query", 3_368, 750, 6, first=1000),
        "gallery": labels_of("gallery", 13_115, 750, 6, first=1000) + [("gallery", "0000", "3")] * 2_798,
    }
    return [label for split in splits or labels for label in labels[split]]


JUNK: list[Label] = [("gallery", "-1", "3")] * 3_819


def msmt17() -> list[Label]:
    """Both halves count their people from 0000, as in a table that takes the numbers as they are."""
    return [
        *labels_of("train", 30_248, 1_041, 15, first=0),
        *labels_of("val", 2_373, 1_000, 14, first=0),
        *labels_of("query", 11_659, 3_060, 15, first=0),
        *labels_of("gallery", 82_161, 3_060, 15, first=0),
    ]


def cuhk03(train: int, gallery: int) -> list[Label]:
    return [
        *labels_of("train", train, 767, 2),
        *labels_of("query", 1_400, 700, 2, first=1000),
        *labels_of("gallery", gallery, 700, 2, first=1000),
    ]


def personx() -> list[Label]:
    return [
        *labels_of("train", 9_840, 410, 6),
        *labels_of("query", 5_136, 856, 6, first=500),
        *labels_of("gallery", 30_816, 856, 6, first=500),
    ]


def without(labels: list[Label], split: str, count: int = 1) -> list[Label]:
    """The labels less the first ``count`` of a split."""
    gone = set([index for index, label in enumerate(labels) if label[0] == split][:count])
    return [label for index, label in enumerate(labels) if index not in gone]


@pytest.mark.parametrize(
    ("labels", "name"),
    [
        (market(), "Market-1501"),
        (market() + JUNK, "Market-1501"),
        (msmt17(), "MSMT17"),
        (cuhk03(7_368, 5_328), "CUHK03 (767/700, labelled)"),
        (cuhk03(7_365, 5_332), "CUHK03 (767/700, detected)"),
        (personx(), "PersonX"),
    ],
)
def test_every_known_set_is_recognised_by_its_own_figures(labels: list[Label], name: str) -> None:
    assert check_known_set(rows_of(labels)) == [f"matches {name}"]


def test_junk_and_distractors_are_counted_apart_from_people() -> None:
    figures = describe_splits(rows_of(market() + JUNK))
    assert list(figures) == ["train", "query", "gallery"]
    assert figures["train"] == SplitFigures(12_936, 751, 6, 0, 0)
    assert figures["query"] == SplitFigures(3_368, 750, 6, 0, 0)
    assert figures["gallery"] == SplitFigures(15_913, 750, 6, 3_819, 2_798)


def test_the_figures_are_those_of_counting_row_by_row() -> None:
    rng = np.random.default_rng(0)

    def draw(*values: str | None) -> list[str | None]:
        return [values[index] for index in rng.integers(len(values), size=400)]

    splits = draw("train", "gallery", "night", None)
    people = draw("-1", "0000", "1", "2", "3", "4", None)
    labels = list(zip(splits, people, draw("a", "b", None), strict=True))
    figures = describe_splits(rows_of(labels))
    assert list(figures) == ["train", "gallery", "night", None]
    for split, found in figures.items():
        own = [label for label in labels if label[0] == split]
        counted = [label for label in own if label[1] != "-1"]
        assert found == SplitFigures(
            images=len(counted),
            people=len({person for _, person, _ in counted} - {None, "0000"}),
            cameras=len({camera for _, _, camera in counted} - {None}),
            junk_images=len(own) - len(counted),
            distractor_images=sum(person == "0000" for _, person, _ in own),
        )


def test_the_figure_that_differs_is_named() -> None:
    missing = without(market(), "gallery")
    assert check_known_set(rows_of(missing)) == ["gallery has 15,912 images, Market-1501 has 15,913"]
    assert check_known_set(rows_of(missing + JUNK[1:])) == [
        "gallery has 15,912 images without junk, Market-1501 has 15,913",
        "gallery has 3,818 junk images, Market-1501 has 3,819",
    ]
    one_person_less = [label for label in personx() if label[:2] != ("train", "0001")]
    assert check_known_set(rows_of(one_person_less)) == [
        "train has 9,816 images, PersonX has 9,840",
        "train has 409 people, PersonX has 410",
    ]
    one_camera = [(split, person, "0") for split, person, _ in market("train")]
    assert check_known_set(rows_of(one_camera)) == ["train has 1 camera, Market-1501 has 6"]
    half_a_gallery = without(market(), "gallery", 8_000)
    assert check_known_set(rows_of(half_a_gallery))[0] == "gallery has 7,913 images, Market-1501 has 15,913"


def test_splits_that_were_not_read_are_not_missed() -> None:
    assert check_known_set(rows_of(market("train", "query"))) == ["matches Market-1501 (train, query)"]
    assert check_known_set(rows_of([label for label in msmt17() if label[0] in ("train", "val")])) == [
        "matches MSMT17 (train, val)"
    ]
    train_list = [label for label in msmt17() if label[0] == "train"]
    assert check_known_set(rows_of(train_list), "msmt17") == ["matches MSMT17 (train)"]


def test_people_of_the_two_msmt17_training_lists_are_counted_together() -> None:
    extra: list[Label] = [("val", "1041", "0"), *without(msmt17(), "val")]
    assert check_known_set(rows_of(extra)) == ["train with val has 1,042 people, MSMT17 has 1,041"]


def test_msmt17_with_one_training_split_is_recognised() -> None:
    merged = [("train" if split == "val" else split, person, camera) for split, person, camera in msmt17()]
    assert check_known_set(rows_of(merged), "market1501") == ["matches MSMT17"]


def test_sets_that_share_all_that_was_read_are_both_named() -> None:
    queries = [label for label in cuhk03(7_368, 5_328) if label[0] == "query"]
    assert check_known_set(rows_of(queries)) == [
        "matches CUHK03 (767/700, labelled) or CUHK03 (767/700, detected) (query)"
    ]


def test_rows_without_splits_are_compared_with_a_split_and_with_the_whole() -> None:
    def unsplit(labels: Sequence[Label]) -> Rows:
        return rows_of([(None, person, camera) for _, person, camera in labels])

    assert check_known_set(unsplit(market("train"))) == ["matches Market-1501 (train)"]
    assert check_known_set(unsplit(market("train")[1:])) == [
        "the data has 12,935 images, Market-1501 (train) has 12,936"
    ]
    everyone = [(split, f"{split == 'train'}{person}", camera) for split, person, camera in personx()]
    assert check_known_set(unsplit(everyone)) == ["matches PersonX"]


def test_images_without_labels_are_recognised_by_their_exact_number_only() -> None:
    folder: list[Label] = [(None, None, None)] * 12_936
    assert check_known_set(rows_of(folder), "folder") == ["matches Market-1501 (train)"]
    assert check_known_set(rows_of(folder[1:]), "folder") == []
    assert check_known_set(rows_of(folder[:1_400]), "folder") == []  # a round number, not CUHK03's queries


@pytest.mark.parametrize(
    "labels",
    [
        labels_of("train", 500, 40, 6) + labels_of("query", 80, 20, 6) + labels_of("gallery", 300, 20, 6),
        labels_of("train", 12_000, 700, 6),
        labels_of("train", 20_000, 751, 6),  # people alone
        labels_of("train", 12_936, 300, 6),  # images alone
        labels_of("gallery", 13_115, 750, 6),  # Market-1501 in another split's place
        labels_of("test", 15_913, 750, 6),
        JUNK,
    ],
)
def test_other_data_gets_no_line(labels: list[Label]) -> None:
    assert check_known_set(rows_of(labels)) == []


def test_the_set_a_source_is_named_after_needs_one_figure_only() -> None:
    half = rows_of(labels_of("train", 6_000, 751, 6))
    assert check_known_set(half) == check_known_set(half, "msmt17") == []
    assert check_known_set(half, "market1501") == ["train has 6,000 images, Market-1501 has 12,936"]


def test_rows_read_from_market_folders_are_described(tmp_path: Path) -> None:
    names = {
        "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0002_c2s1_000451_03.jpg", "0007_c1s1_000451_03.jpg"],
        "query": ["0001_c1s1_001051_00.jpg"],
        "bounding_box_test": ["-1_c1s1_000401_03.jpg", "0000_c3s1_000401_03.jpg", "0001_c2s1_000401_03.jpg"],
    }
    write_images(tmp_path, [f"{folder}/{name}" for folder, folder_names in names.items() for name in folder_names])
    rows = read_market1501(Market1501Source(root=tmp_path))
    assert describe_splits(rows) == {
        "train": SplitFigures(3, 2, 2, 0, 0),
        "query": SplitFigures(1, 1, 1, 0, 0),
        "gallery": SplitFigures(2, 1, 2, 1, 1),
    }
    assert check_known_set(rows, "market1501") == []


def test_a_million_rows_take_less_than_some_seconds() -> None:
    number = np.arange(1_000_000)
    text = pa.array(number).cast(pa.string())
    columns = {
        "image_id": text,
        "person_id": pa.array(number % 50_000).cast(pa.string()),
        "camera_id": pa.array(number % 17).cast(pa.string()),
        "split": pa.array(np.array(["train", "val", "query", "gallery"])[number % 4]),
        "store": pa.array(np.zeros(len(number), np.int32)),
        "locator": text,
    }
    rows = Rows(pa.table(columns, schema=SCHEMA), (FileStore("nowhere"),))
    start = perf_counter()
    assert check_known_set(rows) == []
    assert perf_counter() - start < 10  # a loop over the rows takes longer; here it is well under a second
