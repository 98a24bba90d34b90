"""Batches that threads of this process read: the same as without threads, in the same order."""

import threading
from pathlib import Path

import numpy as np
import pytest

from passreid_ray.data.folder import FolderSource, read_folder
from passreid_ray.data.order import Order
from passreid_ray.data.read_ahead import read_ahead
from passreid_ray.data.rows import Rows
from passreid_ray.data.stream import read_batch
from passreid_ray.data.triplet_order import TripletOrder
from passreid_ray.errors import UserError
from tests.data.pictures import write_images

Batch = dict[str, np.ndarray]
NUM, PER_STEP, FIRST, LAST = 14, 2, 5, 12
TRIPLETS_T3 = np.random.default_rng(0).integers(0, NUM, ((LAST - FIRST) * PER_STEP, 3))
# A draw divided by the batch is its step.
ORDER = TripletOrder(TRIPLETS_T3, np.arange(NUM) % 4, PER_STEP, FIRST, first_draw=FIRST * 3 * PER_STEP)


def mark(image_HWC: np.ndarray, draw: int, image_id: str) -> Batch:
    """What was asked for, as numbers: which image, which draw of its views."""
    return {"red": image_HWC[0, 0, :1], "draw": np.array(draw), "name": np.array(int(image_id[:2]))}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """14 images that tell their number, one of them an empty file."""
    root = write_images(tmp_path_factory.mktemp("images"), [f"{number:02d}.png" for number in range(NUM)])
    (root / "03.png").write_bytes(b"")
    return read_folder(FolderSource(root=root))


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("threads", [1, 2, 3, 20])
@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_any_number_of_threads_gives_the_batches_in_order(rows: Rows, threads: int, rank: int, world_size: int) -> None:
    steps = range(FIRST, LAST)
    expected = [read_batch(rows, ORDER, step, mark, rank, world_size) for step in steps]
    order: Order = ORDER
    share = {"rank": rank, "world_size": world_size, "threads": threads}
    assert_equal(list(read_ahead(rows, order, FIRST, LAST, mark, **share)), expected)


def test_the_images_are_those_of_the_triplets_and_an_unreadable_one_is_replaced(rows: Rows) -> None:
    found = list(read_ahead(rows, ORDER, FIRST, LAST, mark, threads=2))
    names_T3 = np.concatenate([batch["name"].reshape(3, -1).T for batch in found])
    is_bad_T3 = TRIPLETS_T3 == 3
    assert is_bad_T3.any()
    assert np.array_equal(names_T3, np.where(is_bad_T3, 7, TRIPLETS_T3))  # row 7 is the next of row 3's person
    bad_T3 = np.concatenate([batch["bad"].reshape(3, -1).T for batch in found])
    assert np.array_equal(bad_T3 != "", is_bad_T3)


def test_later_steps_alone_are_the_end_of_all(rows: Rows) -> None:
    whole = list(read_ahead(rows, ORDER, FIRST, LAST, mark))
    assert_equal(list(read_ahead(rows, ORDER, FIRST + 4, LAST, mark, threads=2)), whole[4:])


def test_no_steps_give_no_batches(rows: Rows) -> None:
    assert list(read_ahead(rows, ORDER, FIRST, FIRST, mark, threads=2)) == []


def test_no_more_batches_wait_than_there_are_threads(rows: Rows) -> None:
    begun: set[int] = set()
    lock = threading.Lock()

    def noted(image_HWC: np.ndarray, draw: int, image_id: str) -> Batch:
        with lock:
            begun.add(draw // ORDER.batch_size)
        return mark(image_HWC, draw, image_id)

    batches = read_ahead(rows, ORDER, FIRST, LAST, noted, threads=2)
    for step in range(FIRST, LAST):
        next(batches)
        with lock:
            assert max(begun) <= step + 2
    assert begun == set(range(FIRST, LAST))


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_a_batch_is_raised_after_the_batches_before_it(rows: Rows, threads: int) -> None:
    def failing(image_HWC: np.ndarray, draw: int, image_id: str) -> Batch:
        if draw // ORDER.batch_size == FIRST + 3:
            raise ValueError("views of step 8")
        return mark(image_HWC, draw, image_id)

    batches = read_ahead(rows, ORDER, FIRST, LAST, failing, threads=threads)
    expected = [read_batch(rows, ORDER, step, mark) for step in range(FIRST, FIRST + 3)]
    assert_equal([next(batches) for _ in range(3)], expected)
    with pytest.raises(ValueError, match="views of step 8"):
        next(batches)


def test_data_that_cannot_be_read_at_all_is_the_users_error(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["a.png", "b.png"])
    rows = read_folder(FolderSource(root=root))
    for name in ("a.png", "b.png"):
        (root / name).write_bytes(b"")
    order = TripletOrder(np.array([[0, 0, 1]]), np.array([0, 1]), 1, 0)
    with pytest.raises(UserError, match=r"data: 2 images in a row cannot be used, the first: a\.png: empty"):
        next(read_ahead(rows, order, 0, 1, mark))
