"""Files that say they are huge, or unpack to much more than they are: refused within little memory."""

import struct
import subprocess
import sys
import zlib
from io import BytesIO
from pathlib import Path

import lmdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from passreid_ray.data.decode import MAX_IMAGE_BYTES, BadImage, decode_image
from passreid_ray.data.decode_batch import decode_batch
from passreid_ray.data.folder import FolderSource
from passreid_ray.data.lmdb_source import LmdbSource
from passreid_ray.data.parquet import ParquetSource
from passreid_ray.data.sources import open_rows
from tests.data.pictures import encoded, gradient
from tests.data.s3 import Bucket, bucket, s3_host, s3_keys

__all__ = ["bucket", "s3_host", "s3_keys"]  # fixtures

SIDE = 60_000
MAX_GROWTH_MB = 64
"""The smallest of the images would take 4 GB if it were decoded as it says."""


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, lines: bytes, *more: bytes) -> bytes:
    header = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + _chunk(b"IDAT", lines) + _chunk(b"IEND", b"")


def _patched(data: bytes, position: int, content: bytes) -> bytes:
    return data[:position] + content + data[position + len(content) :]


def _jpeg(**options: object) -> bytes:
    data = encoded(gradient(), "JPEG", **options)
    return _patched(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", SIDE, SIDE))


def _exif() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _gif_with_a_huge_frame() -> bytes:
    data = encoded(gradient(), "GIF")
    return _patched(data, data.index(b",\0\0\0\0") + 5, struct.pack("<HH", SIDE, SIDE))


def _animated_webp() -> bytes:
    file = BytesIO()
    Image.new("RGB", (64, 48), "red").save(file, "WEBP", save_all=True, append_images=[Image.new("RGB", (64, 48))])
    side = struct.pack("<I", SIDE - 1)[:3]
    return _patched(file.getvalue(), 24, side + side)


def _tiff() -> bytes:
    data = encoded(gradient(), "TIFF")
    (first,) = struct.unpack_from("<I", data, 4)
    (num_tags,) = struct.unpack_from("<H", data, first)
    for position in range(first + 2, first + 2 + 12 * num_tags, 12):
        (tag,) = struct.unpack_from("<H", data, position)
        if tag in (256, 257):  # width and height, as 32 bits
            data = _patched(data, position, struct.pack("<HHII", tag, 4, 1, SIDE))
    return data


ZEROS = zlib.compress(bytes(2**30), 9)
"""1 GB in 1 MB."""
BOMBS = {
    "PNG": _png(SIDE, SIDE, zlib.compress(bytes(100_000))),
    "JPEG": _jpeg(),
    "JPEG, large by torchvision's limit": _jpeg(subsampling=0),
    "JPEG with EXIF": _jpeg(exif=_exif()),
    "BMP": _patched(encoded(gradient(), "BMP"), 18, struct.pack("<ii", SIDE, SIDE)),
    "GIF": _patched(encoded(gradient(), "GIF"), 6, struct.pack("<HH", SIDE, SIDE)),
    "GIF with a huge frame": _gif_with_a_huge_frame(),
    "WebP": _animated_webp(),
    "TIFF": _tiff(),
    "PNG with a text of 1 GB": _png(64, 64, b"", _chunk(b"zTXt", b"a\0\0" + ZEROS)),
}
TOO_LONG = f"has {MAX_IMAGE_BYTES + 1} bytes; an image has at most {MAX_IMAGE_BYTES}"
FITTING = {"PNG with 1 GB of lines too many": _png(64, 64, ZEROS)}

DECODE = """
import resource, sys, warnings
from pathlib import Path
import torch
from passreid_ray.data.decode import BadImage
from passreid_ray.data.decode_batch import decode_batch
warnings.simplefilter("ignore")
good, *paths = [Path(name).read_bytes() for name in sys.argv[1:]]
decode_batch([good], device=torch.device("cpu"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for pixels in decode_batch(paths, device=torch.device("cpu")):
    print("refused" if isinstance(pixels, BadImage) else tuple(pixels.shape))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_bombs_of_every_format_are_refused_within_little_memory(tmp_path: Path) -> None:
    files = {"good": encoded(gradient(), "JPEG"), **BOMBS, **FITTING}
    paths = [tmp_path / f"{number}.jpg" for number in range(len(files))]
    for path, data in zip(paths, files.values(), strict=True):
        path.write_bytes(data)
    # A process of its own: memory that the tests before have touched would hide what is taken here.
    command = [sys.executable, "-c", DECODE, *map(str, paths)]
    *found, growth_mb = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert dict(zip([*BOMBS, *FITTING], found, strict=True)) == {
        **dict.fromkeys(BOMBS, "refused"),
        **dict.fromkeys(FITTING, "(3, 64, 64)"),
    }
    assert int(growth_mb) < MAX_GROWTH_MB


def test_a_file_of_more_bytes_than_an_image_has_is_not_read(tmp_path: Path) -> None:
    for name, size in (("a.jpg", MAX_IMAGE_BYTES + 1), ("b.jpg", 100)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)  # takes no room on the disk
    rows = open_rows(FolderSource(root=tmp_path))
    with pytest.raises(BadImage, match=TOO_LONG):
        rows.image_bytes(0)
    assert len(rows.image_bytes(1)) == 100


def test_a_good_image_with_more_bytes_than_an_image_has_is_not_decoded() -> None:
    long = encoded(gradient(), "JPEG").ljust(MAX_IMAGE_BYTES + 1, b"\0")
    with pytest.raises(BadImage, match=TOO_LONG):
        decode_image(long)
    (found,) = decode_batch([long], device=torch.device("cpu"))
    assert isinstance(found, BadImage)
    assert found.reason == TOO_LONG
    assert decode_image(long[:-1]).shape == gradient().shape


def test_a_cell_of_more_bytes_than_an_image_has_is_a_bad_image_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("passreid_ray.data.decode.MAX_IMAGE_BYTES", 1000)
    pq.write_table(pa.table({"image": [bytes(1001), bytes(1000)], "image_id": ["a", "b"]}), tmp_path / "a.parquet")
    huge, image = open_rows(ParquetSource(path=tmp_path)).read_many([0, 1])
    assert isinstance(huge, BadImage)
    assert huge.reason == "has 1001 bytes; an image has at most 1000"
    assert image == bytes(1000)


def test_a_value_of_more_bytes_than_an_image_has_is_a_bad_image_and_the_others_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("passreid_ray.data.decode.MAX_IMAGE_BYTES", 1000)
    with lmdb.open(str(tmp_path / "x")) as environment, environment.begin(write=True) as transaction:
        for key, num_bytes in ((b"a", 1001), (b"b", 1000)):
            transaction.put(key, b"BM".ljust(num_bytes, b"\0"))
    huge, image = open_rows(LmdbSource(path=tmp_path / "x")).read_many([0, 1])
    assert isinstance(huge, BadImage)
    assert huge.reason == "has 1001 bytes; an image has at most 1000"
    assert image == b"BM".ljust(1000, b"\0")


def test_an_object_of_more_bytes_than_an_image_has_is_a_bad_image_and_the_others_are_read(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("passreid_ray.data.decode.MAX_IMAGE_BYTES", 1000)
    bucket.put("a.jpg", bytes(1001))
    bucket.put("b.jpg", bytes(1000))
    huge, image = open_rows(FolderSource(root=bucket.address())).read_many([0, 1])
    assert isinstance(huge, BadImage)
    assert huge.reason == "has 1001 bytes; an image has at most 1000"
    assert image == bytes(1000)
