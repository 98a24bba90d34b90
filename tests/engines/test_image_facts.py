"""What is found out about one image."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from passreid_ray.data import BadImage, open_rows
from passreid_ray.data.folder import FolderSource
from passreid_ray.data.image_hash import difference_hash
from passreid_ray.engines.image_facts import FACTS, FORMATS, look_at, look_at_rows
from tests.data.pictures import encoded, gradient, write_images


@pytest.mark.parametrize("name", FORMATS[1:])
def test_size_and_format_are_those_of_the_file(name: str) -> None:
    data = encoded(gradient(40, 20), name)
    facts = look_at(data)
    assert (facts["height_px"], facts["width_px"], facts["bytes"]) == (40, 20, len(data))
    assert FORMATS[int(facts["format"])] == name


def test_hashes_are_of_the_bytes_and_of_the_pixels() -> None:
    data = encoded(gradient())
    facts = look_at(data)
    assert facts["prefix"].tobytes() == hashlib.sha256(data).digest()[:16]
    assert int(facts["dhash"]) == difference_hash(gradient())


def test_brightness_and_contrast_are_of_the_grey_image() -> None:
    half = np.zeros((20, 40, 3), np.uint8)
    half[:, :20] = 200
    facts = look_at(encoded(half))
    assert facts["brightness"] == pytest.approx(100, abs=0.01)
    assert facts["contrast"] == pytest.approx(100, abs=0.01)


def test_grey_is_told_from_colour_in_spite_of_jpeg() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 32, 1), np.uint8)
    grey = np.repeat(noise, 3, axis=2)
    assert look_at(encoded(grey, "JPEG", quality=60))["is_grey"]
    assert look_at(encoded(grey[:, :, 0]))["is_grey"]
    assert not look_at(encoded(gradient(64, 32), "JPEG"))["is_grey"]


def test_large_images_are_measured_like_small_ones() -> None:
    small = look_at(encoded(gradient(30, 15)))
    large = look_at(encoded(np.repeat(np.repeat(gradient(30, 15), 40, axis=0), 40, axis=1)))
    for name in ("brightness", "contrast"):
        assert large[name] == pytest.approx(float(small[name]), rel=0.05)


def test_what_is_no_image_is_bad() -> None:
    with pytest.raises(BadImage, match="not a JPEG"):
        look_at(b"hello")


def test_rows_are_looked_at_in_their_order_and_bad_ones_are_named(tmp_path: Path) -> None:
    write_images(tmp_path, [f"{number:03d}.png" for number in range(69)])
    (tmp_path / "066.png").write_bytes(b"hello")
    rows = open_rows(FolderSource(root=tmp_path))
    numbers = np.arange(len(rows))[::-1]
    facts_N, bad = look_at_rows(slice(1, 68), rows, numbers)
    assert [(number, reason[:10]) for number, reason in bad] == [(66, "not a JPEG")]
    assert facts_N.dtype == FACTS
    assert facts_N["brightness"].tolist() == pytest.approx([67, 0, *range(65, 0, -1)], abs=1e-3)
    assert np.flatnonzero(facts_N["format"] == 0).tolist() == [1]
    assert facts_N["bytes"][1] == 5


@pytest.mark.parametrize("channel", [0, 1, 2])
def test_colour_in_one_channel_is_enough(channel: int) -> None:
    pixels = np.full((20, 10, 3), 100, np.uint8)
    pixels[:, :, channel] = 104
    assert not look_at(encoded(pixels))["is_grey"]
    pixels[:, :, channel] = 96
    assert not look_at(encoded(pixels))["is_grey"]
    pixels[:, :, channel] = 102
    assert look_at(encoded(pixels))["is_grey"]
