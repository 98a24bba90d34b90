"""What one packing task does: a range of rows becomes one shard, or the hashes of its images. Plain Python."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
from numpy.typing import NDArray
from PIL import Image

from passreid_ray.data import BadImage, Rows, decode_image
from passreid_ray.data.decode import MIN_SIDE_PX
from passreid_ray.data.image_hash import difference_hash, prefix_of
from passreid_ray.data.manifest import BadRow, Sidecar
from passreid_ray.data.packed import LABELS, SCHEMA, shard_name, sidecar_name, write_shard, write_whole
from passreid_ray.engines.image_pieces import read_in_pieces

GROUP_BYTES = 32_000_000
"""A row group ends once its images reach this size: whoever writes or reads it holds a few times as much."""


@dataclass(frozen=True)
class ImageRule:
    """What is done to each image."""

    longest_side_px: int | None
    """Larger images are shrunk to this; none: all images keep their bytes."""
    jpeg_quality: int
    """Of images that are shrunk."""


@dataclass(frozen=True)
class PackedImage:
    """An image as it is stored."""

    data: bytes
    width_px: int
    height_px: int
    """Of the upright image."""
    dhash: int
    """Of the source's pixels, so that it does not depend on ``ImageRule``."""


@dataclass(frozen=True)
class ShardTask:
    """One shard to write."""

    number: int
    rows: slice
    """Rows of the source, in their order."""
    left_out: NDArray[np.int64]
    """Numbers of the rows among them that are not packed: duplicates."""
    rows_per_group: int
    rule: ImageRule
    settings: str
    """Digest that the sidecar keeps."""
    bytes_per_group: int = GROUP_BYTES


def pack_image(data: bytes, rule: ImageRule) -> PackedImage:
    """The image as it is stored: its own bytes, or shrunk by Lanczos, upright, as JPEG without colour subsampling.

    Raises ``BadImage`` when it cannot be decoded, or would be too narrow once shrunk.
    """
    pixels_HWC = decode_image(data)
    height_px, width_px = pixels_HWC.shape[:2]
    dhash = difference_hash(pixels_HWC)
    longest_px = max(width_px, height_px)
    if rule.longest_side_px is None or longest_px <= rule.longest_side_px:
        return PackedImage(data, width_px, height_px, dhash)
    scale = rule.longest_side_px / longest_px
    new_width_px, new_height_px = round(width_px * scale), round(height_px * scale)
    if min(new_width_px, new_height_px) < MIN_SIDE_PX:
        raise BadImage(
            f"{width_px}x{height_px} pixels would shrink to {new_width_px}x{new_height_px}; the shorter side needs at "
            f"least {MIN_SIDE_PX}"
        )
    shrunk = Image.fromarray(pixels_HWC).resize((new_width_px, new_height_px), Image.Resampling.LANCZOS)
    file = BytesIO()
    shrunk.save(file, "JPEG", quality=rule.jpeg_quality, subsampling="4:4:4")
    return PackedImage(file.getvalue(), new_width_px, new_height_px, dhash)


def pack_shard(rows: Rows, task: ShardTask, filesystem: pafs.FileSystem, root: str) -> Sidecar:
    """Write a shard and then its sidecar below ``root``; what the sidecar says.

    Images that cannot be used are left out and listed in it. Raises ``OSError`` when something cannot be written, then
    the beginning of the shard is removed.
    """
    bad: list[BadRow] = []
    shard = write_shard(filesystem, root, shard_name(task.number), _row_groups(rows, task, bad))
    sidecar = Sidecar(settings=task.settings, shard=shard, bad=bad)
    write_whole(filesystem, f"{root}/{sidecar_name(task.number)}", sidecar.model_dump_json(indent=1).encode())
    return sidecar


def hash_rows(rows: Rows, own: slice) -> NDArray[np.uint64]:
    """First 16 bytes of the SHA-256 of every image's bytes, ``(R, 2)``; zeros where they cannot be read."""
    prefixes_R2 = np.zeros((own.stop - own.start, 2), np.uint64)
    for position, data in enumerate(read_in_pieces(rows, np.arange(own.start, own.stop))):
        if not isinstance(data, BadImage):
            prefixes_R2[position] = prefix_of(data)
    return prefixes_R2


def _row_groups(rows: Rows, task: ShardTask, bad: list[BadRow]) -> Iterator[pa.Table]:
    """Tables of ``rows_per_group`` rows, of fewer where ``bytes_per_group`` is reached and at the end.

    Images that cannot be used are added to ``bad``.
    """
    numbers = np.setdiff1d(np.arange(task.rows.start, task.rows.stop), task.left_out)
    kept: list[int] = []
    images: list[PackedImage] = []
    num_bytes = 0
    for number, data in zip(numbers.tolist(), read_in_pieces(rows, numbers), strict=True):
        try:
            if isinstance(data, BadImage):
                raise data
            image = pack_image(data, task.rule)
        except BadImage as error:
            image_id = rows.table["image_id"][number].as_py()
            bad.append(BadRow(row=number, image_id=image_id, reason=error.reason))
            continue
        kept.append(number)
        images.append(image)
        num_bytes += len(image.data)
        if len(kept) == task.rows_per_group or num_bytes >= task.bytes_per_group:
            table = _table(rows, kept, images)
            kept, images, num_bytes = [], [], 0  # before the table is written: it holds a copy
            yield table
    if kept:
        yield _table(rows, kept, images)


def _table(rows: Rows, numbers: list[int], images: list[PackedImage]) -> pa.Table:
    labels = rows.table.select(list(LABELS)).take(pa.array(numbers))
    columns = {
        **{name: labels[name] for name in LABELS},
        "image": [image.data for image in images],
        "width": [image.width_px for image in images],
        "height": [image.height_px for image in images],
        "sha256": [hashlib.sha256(image.data).digest() for image in images],
        "dhash": [image.dhash for image in images],
    }
    return pa.table(columns, schema=SCHEMA)
