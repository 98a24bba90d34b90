"""Every kind of image a data set may hold becomes upright 8-bit RGB, or ``BadImage``."""

import pickle
import struct
import warnings
import zlib
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from passreid_ray.data.decode import BadImage, decode_image
from tests.data.pictures import encoded, gradient


def test_jpeg_gives_back_what_was_encoded() -> None:
    pixels = decode_image(encoded(gradient(), "JPEG", quality=100, subsampling=0))
    assert pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels.astype(int), gradient().astype(int), atol=3)


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "WEBP"])
def test_lossless_formats_keep_every_pixel(file_format: str) -> None:
    options = {"lossless": True} if file_format == "WEBP" else {}
    np.testing.assert_array_equal(decode_image(encoded(gradient(), file_format, **options)), gradient())


def test_pixels_can_be_written_to() -> None:
    decode_image(encoded(gradient()))[0, 0] = 7


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_grey_becomes_three_equal_channels(file_format: str) -> None:
    grey_HW = gradient()[..., 0]
    pixels = decode_image(encoded(grey_HW, file_format))
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 1])
    np.testing.assert_array_equal(pixels[..., 0], pixels[..., 2])
    np.testing.assert_allclose(pixels[..., 0].astype(int), grey_HW.astype(int), atol=3)


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(file_format: str) -> None:
    levels = np.array([0, 128, 129, 257, 32896, 65406, 65407, 65535], np.uint16)
    pixels = decode_image(encoded(np.tile(levels, (8, 1)), file_format))
    np.testing.assert_array_equal(pixels[0, :, 0], [0, 0, 1, 1, 128, 254, 255, 255])


def test_floating_point_pixels_are_refused() -> None:
    with pytest.raises(BadImage, match="floating point"):
        decode_image(encoded(np.ones((16, 16), np.float32), "TIFF"))


def test_transparent_pixels_show_white() -> None:
    rgba_HWC = np.zeros((16, 16, 4), np.uint8)
    rgba_HWC[:8] = (200, 100, 0, 255)
    rgba_HWC[8:12] = (0, 0, 0, 0)
    rgba_HWC[12:] = (0, 0, 0, 128)
    pixels = decode_image(encoded(rgba_HWC))
    assert pixels[0, 0].tolist() == [200, 100, 0]
    assert pixels[9, 0].tolist() == [255, 255, 255]
    assert pixels[14, 0].tolist() == [127, 127, 127]


def test_a_palette_with_a_transparent_entry_shows_white_there() -> None:
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.paste(0, (0, 0, 8, 16))
    file = BytesIO()
    image.save(file, "PNG", transparency=0)
    pixels = decode_image(file.getvalue())
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 12].tolist() == [10, 20, 30]


def test_cmyk_white_stays_white() -> None:
    file = BytesIO()
    Image.new("CMYK", (16, 16), (0, 0, 0, 0)).save(file, "JPEG", quality=100)
    assert decode_image(file.getvalue()).min() >= 253


# The transform that a viewer applies for each EXIF orientation, written out on arrays.
_UPRIGHT = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: a.transpose(1, 0, 2)[:, ::-1],
    7: lambda a: a.transpose(1, 0, 2)[::-1, ::-1],
    8: lambda a: a.transpose(1, 0, 2)[::-1],
}


@pytest.mark.parametrize("orientation", list(_UPRIGHT))
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode_image(encoded(gradient(), "PNG", exif=exif))
    np.testing.assert_array_equal(pixels, _UPRIGHT[orientation](gradient()))


@pytest.mark.parametrize(
    ("file_format", "options"),
    [("GIF", {}), ("WEBP", {"lossless": True}), ("PNG", {}), ("TIFF", {})],
)
def test_of_several_frames_the_first_is_taken(file_format: str, options: dict[str, object]) -> None:
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ((250, 10, 20), (0, 0, 255)))
    file = BytesIO()
    first.save(file, file_format, save_all=True, append_images=[second], **options)
    np.testing.assert_allclose(decode_image(file.getvalue())[3, 3].astype(int), (250, 10, 20), atol=2)


@pytest.mark.parametrize("data", [b"", b"no image", b"\xff\xd8\xff", b"\x89PNG", b"%!PS-Adobe-3.0 EPSF-3.0"])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        decode_image(data)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.95])
def test_a_truncated_file_is_refused(file_format: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), np.uint8)
    data = encoded(noise, file_format)
    with pytest.raises(BadImage):
        decode_image(data[: int(len(data) * share)])


@settings(max_examples=150, deadline=None)
@given(
    file_format=st.sampled_from(["JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF"]),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_bytes_give_pixels_or_bad_image(file_format: str, changes: list[tuple[int, int]]) -> None:
    data = bytearray(encoded(gradient(), file_format))
    for position, value in changes:
        data[position % len(data)] = value
    try:
        pixels = decode_image(bytes(data), max_pixels=100_000)
    except BadImage:
        return
    assert pixels.dtype == np.uint8
    assert pixels.ndim == 3
    assert pixels.shape[2] == 3


def _png(width: int, height: int, bit_depth: int, lines: bytes) -> bytes:
    """An RGB PNG written by hand, which may lie about its size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_sixteen_bit_colour_is_scaled_too() -> None:
    line = b"\0" + np.tile(np.array([0, 32896, 65535], ">u2"), 8).tobytes()
    assert decode_image(_png(8, 8, 16, line * 8))[4, 4].tolist() == [0, 128, 255]


@pytest.mark.parametrize("side", [8000, 10_000, 60_000])
def test_a_bomb_is_refused_by_its_header_without_a_warning(side: int) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(BadImage, match=f"{side}x{side} pixels; at most 50000000"):
            decode_image(_png(side, side, 8, b""))
    assert limit == Image.MAX_IMAGE_PIXELS


def test_the_pixel_limit_can_be_set() -> None:
    assert decode_image(encoded(gradient(10, 10)), max_pixels=100).shape == (10, 10, 3)
    with pytest.raises(BadImage, match="at most 99"):
        decode_image(encoded(gradient(10, 10)), max_pixels=99)


@pytest.mark.parametrize(("height", "width"), [(7, 64), (64, 7), (1, 1)])
def test_an_image_too_small_for_a_person_is_refused(height: int, width: int) -> None:
    with pytest.raises(BadImage, match="at least 8"):
        decode_image(encoded(gradient(height, width)))


def test_bad_image_keeps_its_reason_on_the_way_between_processes() -> None:
    assert pickle.loads(pickle.dumps(BadImage("empty"))).reason == "empty"
