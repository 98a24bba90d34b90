"""Decoding a batch gives, image by image, the pixels or the reason that ``decode_image`` gives."""

import struct
from io import BytesIO

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from passreid_ray.data import decode_batch as module
from passreid_ray.data.decode import BadImage, decode_image
from passreid_ray.data.decode_batch import decode_arrays, decode_batch, is_plain_jpeg
from tests.data.pictures import encoded, gradient

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
CPU = torch.device("cpu")


def _noise(height: int = 67, width: int = 45) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


def _cmyk() -> bytes:
    file = BytesIO()
    Image.fromarray(_noise()).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


def _rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(_noise(), "JPEG", exif=exif)


def _with_size(data: bytes, height: int, width: int) -> bytes:
    """The JPEG with another size in its frame header."""
    frame = data.index(b"\xff\xc0")
    return data[: frame + 5] + struct.pack(">HH", height, width) + data[frame + 9 :]


PLAIN = {
    "4:2:0": encoded(_noise(), "JPEG", subsampling=2),
    "4:2:2": encoded(_noise(), "JPEG", subsampling=1),
    "4:4:4": encoded(_noise(), "JPEG", subsampling=0),
    "best": encoded(_noise(128, 64), "JPEG", quality=100),
    "worst": encoded(_noise(129, 63), "JPEG", quality=1),
    "progressive": encoded(_noise(), "JPEG", progressive=True),
    "restarts": encoded(_noise(), "JPEG", restart_marker_blocks=2),
    "comment": encoded(_noise(), "JPEG", comment=b"a comment"),
    "grey": encoded(_noise()[..., 0], "JPEG"),
    "smallest": encoded(_noise(8, 8), "JPEG"),
}
PLAIN["says it is larger"] = _with_size(PLAIN["4:2:0"], 200, 100)  # libjpeg fills up with grey
OTHER_IMAGES = {
    "EXIF": _rotated(),
    "CMYK": _cmyk(),
    "RGB": encoded(_noise(), "JPEG", keep_rgb=True),
    "PNG": encoded(_noise()),
    "WebP": encoded(_noise(), "WEBP"),
    "large": encoded(np.zeros((2001, 2000, 3), np.uint8), "JPEG"),
}
BAD = {
    "empty": b"",
    "text": b"no image",
    "start only": b"\xff\xd8\xff",
    "half": PLAIN["4:2:0"][: len(PLAIN["4:2:0"]) // 2],
    "header only": PLAIN["4:2:0"][:300],
    "half PNG": OTHER_IMAGES["PNG"][:1000],
    "half EXIF": OTHER_IMAGES["EXIF"][:2000],
    "tiny": encoded(_noise(7, 64), "JPEG"),
    "bomb": _with_size(PLAIN["4:2:0"], 60_000, 60_000),
    "no height": _with_size(PLAIN["4:2:0"], 0, 64),
}


def _decode_image(data: bytes) -> np.ndarray | BadImage:
    try:
        return decode_image(data)
    except BadImage as bad:
        return bad


def _assert_same(got: np.ndarray | BadImage, expected: np.ndarray | BadImage) -> None:
    if isinstance(expected, BadImage):
        assert isinstance(got, BadImage)
        assert got.reason == expected.reason
    else:
        assert isinstance(got, np.ndarray)
        assert got.dtype == np.uint8
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("data", PLAIN.values(), ids=PLAIN)
def test_plain_jpeg_gives_the_pixels_of_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _decode_image(data)
    monkeypatch.delattr(module, "decode_image")  # so it is torchvision that decodes
    _assert_same(decode_arrays([data])[0], expected)


@pytest.mark.parametrize("data", OTHER_IMAGES.values(), ids=OTHER_IMAGES)
def test_other_images_are_left_to_pillow(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _decode_image(data)
    assert isinstance(expected, np.ndarray)
    monkeypatch.delattr(module, "decode_jpeg")
    _assert_same(decode_arrays([data])[0], expected)


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
def test_a_bad_image_keeps_its_reason(data: bytes) -> None:
    expected = _decode_image(data)
    assert isinstance(expected, BadImage)
    _assert_same(decode_arrays([data])[0], expected)


@pytest.mark.parametrize("name", ["bomb", "tiny", "no height"])
def test_a_size_that_is_refused_is_never_decoded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module, "decode_jpeg")
    assert isinstance(decode_arrays([BAD[name]])[0], BadImage)


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(list(PLAIN)),
    changes=st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=6),
    length=st.integers(1, 20_000),
)
def test_damaged_files_give_what_pillow_gives(name: str, changes: list[tuple[int, int]], length: int) -> None:
    data = bytearray(PLAIN[name])
    for position, value in changes:
        data[position % len(data)] = value
    damaged = bytes(data[:length])
    _assert_same(decode_arrays([damaged])[0], _decode_image(damaged))


@given(st.binary(max_size=60), st.integers(0, 400))
def test_any_bytes_after_any_header_are_plain_or_not(tail: bytes, kept: int) -> None:
    assert is_plain_jpeg(PLAIN["4:2:0"][:kept] + tail) in (True, False)


def test_a_file_cut_within_its_header_is_not_plain() -> None:
    data = PLAIN["progressive"]
    header = data.index(b"\xff\xda") + 4
    assert not any(is_plain_jpeg(data[:length]) for length in range(header))
    assert is_plain_jpeg(data)


def test_a_batch_keeps_its_order_and_shows_each_image_upright() -> None:
    files = [*PLAIN.values(), *BAD.values(), *OTHER_IMAGES.values()][::-1]
    got = decode_batch(files, device=CPU)
    for pixels, data in zip(got, files, strict=True):
        as_array = pixels if isinstance(pixels, BadImage) else pixels.permute(1, 2, 0).numpy()
        _assert_same(as_array, _decode_image(data))


def test_no_images_give_no_pixels() -> None:
    assert decode_batch([], device=CPU) == []
    assert decode_arrays([]) == []


def test_pixels_can_be_written_to() -> None:
    for pixels in decode_arrays([PLAIN["4:2:0"], OTHER_IMAGES["PNG"]]):
        assert isinstance(pixels, np.ndarray)
        pixels[0, 0] = 7


def test_a_call_that_fails_on_the_device_is_made_again_image_by_image() -> None:
    # Run on the CPU, where the decoder takes a list too. The second file has a header that seems plain.
    broken = PLAIN["4:2:0"].replace(b"\xff\xc4", b"\xff\xdb", 1)
    files = [PLAIN["4:4:4"], broken, PLAIN["grey"]]
    assert is_plain_jpeg(broken)
    assert isinstance(_decode_image(broken), BadImage)
    for pixels, data in zip(module._decode_on_cuda(files, CPU), files, strict=True):
        as_array = pixels if isinstance(pixels, BadImage) else pixels.permute(1, 2, 0).numpy()
        _assert_same(as_array, _decode_image(data))


@pytest.mark.gpu
@needs_cuda
def test_decoding_on_cuda_is_close_to_decoding_on_the_cpu() -> None:
    smooth = [encoded(gradient(64, 32), "JPEG", subsampling=subsampling) for subsampling in (0, 1, 2)]
    files = [*smooth, *BAD.values(), *OTHER_IMAGES.values()]
    for index, (pixels, expected) in enumerate(
        zip(decode_batch(files, device=torch.device("cuda")), decode_batch(files, device=CPU), strict=True)
    ):
        if isinstance(expected, BadImage):
            assert isinstance(pixels, BadImage)
            assert pixels.reason == expected.reason
        else:
            assert isinstance(pixels, torch.Tensor)
            assert pixels.device.type == "cuda"
            difference = (pixels.cpu().float() - expected.float()).abs()
            assert difference.mean() < (2 if index < len(smooth) else 1e-6)
