import hashlib
import tracemalloc

import numpy as np
import pytest

from passreid_ray.data import decode_image
from passreid_ray.data.image_hash import difference_hash, differing_bits, prefix_of, repeats
from tests.data.pictures import encoded, gradient


def _blocks(values_HW: np.ndarray, block_px: int) -> np.ndarray:
    grey_HW = np.kron(values_HW, np.ones((block_px, block_px))).astype(np.uint8)
    return np.stack([grey_HW] * 3, axis=-1)


def _photo(seed: int) -> np.ndarray:
    coarse_HWC = np.random.default_rng(seed).integers(0, 256, (8, 6, 3)).astype(np.uint8)
    return np.kron(coarse_HWC, np.ones((16, 11, 1))).astype(np.uint8)


@pytest.mark.parametrize("block_px", [1, 3, 10])
def test_a_bit_says_whether_a_block_is_brighter_than_its_left_neighbour(block_px: int) -> None:
    values_HW = np.random.default_rng(block_px).permutation(72).reshape(8, 9) * 3
    bits = "".join(str(int(row[x + 1] > row[x])) for row in values_HW for x in range(8))
    assert difference_hash(_blocks(values_HW, block_px)) == int(bits, 2)


def test_the_hash_takes_64_bits_and_a_flat_image_has_none_set() -> None:
    rising_HW = np.tile(np.arange(9) * 20, (8, 1))
    assert difference_hash(_blocks(rising_HW, 4)) == 2**64 - 1
    assert difference_hash(_blocks(rising_HW[:, ::-1], 4)) == 0
    assert difference_hash(np.full((24, 16, 3), 90, np.uint8)) == 0


def test_a_recompressed_and_a_resized_copy_differ_in_few_bits_and_other_images_in_many() -> None:
    photo_HWC = _photo(0)
    copies = [decode_image(encoded(photo_HWC, "JPEG", quality=60)), photo_HWC.repeat(2, axis=0).repeat(2, axis=1)]
    own = difference_hash(photo_HWC)
    assert max(differing_bits(own, difference_hash(copy)) for copy in copies) <= 6
    assert min(differing_bits(own, difference_hash(_photo(seed))) for seed in range(1, 20)) >= 15


def test_differing_bits_are_counted() -> None:
    assert differing_bits(0b1011, 0b0010) == 2
    assert differing_bits(0, 2**64 - 1) == 64


def test_a_prefix_is_the_beginning_of_the_sha256() -> None:
    data = encoded(gradient())
    assert prefix_of(data).tobytes() == hashlib.sha256(data).digest()[:16]


def _literal_repeats(prefixes: list[bytes]) -> list[tuple[int, int]]:
    first: dict[bytes, int] = {}
    pairs = []
    for row, prefix in enumerate(prefixes):
        if prefix != bytes(16) and first.setdefault(prefix, row) != row:
            pairs.append((row, first[prefix]))
    return pairs


@pytest.mark.parametrize("seed", range(20))
def test_repeats_are_those_of_a_dictionary(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Few values in each half, so that rows which agree in one half only are common, and some rows are zeros.
    prefixes_N2 = rng.integers(0, 4, (int(rng.integers(1, 60)), 2)).astype(np.uint64)
    expected = _literal_repeats([row.tobytes() for row in prefixes_N2])
    assert [tuple(pair) for pair in repeats(prefixes_N2).tolist()] == expected


def test_rows_that_could_not_be_read_and_no_rows_repeat_nothing() -> None:
    assert repeats(np.zeros((5, 2), np.uint64)).shape == (0, 2)
    assert repeats(np.empty((0, 2), np.uint64)).shape == (0, 2)


def test_looking_for_repeats_takes_about_forty_bytes_a_row() -> None:
    num_rows = 200_000
    prefixes_N2 = np.random.default_rng(0).integers(0, 2**63, (num_rows, 2)).astype(np.uint64)
    tracemalloc.start()
    repeats(prefixes_N2)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (peak_bytes + prefixes_N2.nbytes) / num_rows < 48
