"""How many images are in memory at a time, by a store that counts them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from passreid_ray.data import BadImage, Rows
from passreid_ray.data.rows import make_rows
from passreid_ray.engines.image_pieces import FIRST_ROWS, PIECE_BYTES, PIECE_ROWS, next_piece_rows, read_in_pieces


@dataclass(frozen=True)
class CountedStore:
    """Images whose size is their locator."""

    pieces: list[int] = field(default_factory=list)

    def read(self, locator: str) -> bytes:
        return bytes(int(locator))

    def read_many(self, locators: Sequence[str]) -> list[bytes | BadImage]:
        self.pieces.append(sum(map(int, locators)))
        return [self.read(locator) for locator in locators]

    def identity(self) -> str:
        return "counted"


def _rows(sizes: Sequence[int]) -> tuple[Rows, list[int]]:
    store = CountedStore()
    ids = [f"{number:05d}" for number in range(len(sizes))]
    return make_rows(store, [str(size) for size in sizes], where="test", image_ids=ids), store.pieces


def test_images_come_in_the_order_asked_for_and_each_once() -> None:
    rows, _ = _rows(list(range(1, 301)))
    numbers_N = np.random.default_rng(0).permutation(300)
    assert list(read_in_pieces(rows, numbers_N)) == [bytes(number + 1) for number in numbers_N.tolist()]
    assert list(read_in_pieces(rows, numbers_N[:0])) == []


@pytest.mark.parametrize("size", [10, 500_000, 2_000_000, 40_000_000])
def test_a_piece_holds_no_more_than_its_bytes_once_the_size_is_known(size: int) -> None:
    rows, pieces = _rows([size] * (FIRST_ROWS + 3))
    for _ in read_in_pieces(rows, np.arange(len(rows))):
        pass
    assert pieces[0] == size * FIRST_ROWS
    assert sum(pieces) == size * len(rows)
    assert max(pieces[1:]) <= max(PIECE_BYTES, size)


def test_the_next_piece_follows_the_mean_size_of_what_could_be_read() -> None:
    missing = BadImage("gone")
    assert next_piece_rows([missing]) == PIECE_ROWS
    assert next_piece_rows([bytes(PIECE_BYTES // 4), missing]) == 4
    assert next_piece_rows([bytes(PIECE_BYTES // 4), b"", b"", b""]) == 16
    assert next_piece_rows([bytes(PIECE_BYTES * 2)]) == 1
