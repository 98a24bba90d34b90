"""What one packing task does, without Ray."""

import errno
import hashlib
import tracemalloc
from io import BytesIO
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from PIL import Image

from passreid_ray.data import BadImage, Rows, decode_image
from passreid_ray.data.folder import FolderSource, read_folder
from passreid_ray.data.image_hash import difference_hash
from passreid_ray.data.manifest import Sidecar
from passreid_ray.engines import pack_shard as pack_shard_module
from passreid_ray.engines.pack_shard import (
    GROUP_BYTES,
    ImageRule,
    PackedImage,
    ShardTask,
    hash_rows,
    pack_image,
    pack_shard,
)
from tests.data.pictures import encoded, gradient, write_images

DISK = pafs.LocalFileSystem()
AS_IS = ImageRule(longest_side_px=None, jpeg_quality=95)
EXIF_ROTATED = Image.Exif()
EXIF_ROTATED[0x0112] = 6  # the camera was held upright


def _rows(root: Path, num_images: int, bad: tuple[int, ...] = ()) -> Rows:
    write_images(root, [f"{number:03d}.png" for number in range(num_images)])
    for number in bad:
        (root / f"{number:03d}.png").write_bytes(b"<html>404</html>")
    return read_folder(FolderSource(root=root))


def _task(source: Rows, **changed: Any) -> ShardTask:
    settings: dict[str, Any] = {
        "number": 0,
        "rows": slice(0, len(source)),
        "left_out": np.empty(0, np.int64),
        "rows_per_group": 4,
        "rule": AS_IS,
        "settings": "s",
    }
    return ShardTask(**settings | changed)


def _out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir(exist_ok=True)
    return tmp_path / "out"


class FullDisk:
    """A local disk on which ``free_bytes`` more can be written."""

    def __init__(self, free_bytes: int) -> None:
        self.free_bytes = free_bytes

    def __getattr__(self, name: str) -> Any:
        return getattr(DISK, name)

    def open_output_stream(self, path: str) -> "_FullStream":
        return _FullStream(self, DISK.open_output_stream(path))


class _FullStream:
    def __init__(self, disk: FullDisk, stream: Any) -> None:
        self._disk, self._stream = disk, stream

    def __enter__(self) -> "_FullStream":
        return self

    def __exit__(self, *exc: object) -> None:
        self._stream.close()

    def flush(self) -> None:
        self._stream.flush()

    def write(self, data: bytes) -> None:
        self._disk.free_bytes -= len(data)
        if self._disk.free_bytes < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._stream.write(data)


def test_the_packed_images_are_the_bytes_of_the_source_in_the_order_of_ids(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "in", 10)
    sidecar = pack_shard(rows, _task(rows, number=7, rows=slice(3, 9)), DISK, str(_out(tmp_path)))
    table = pq.read_table(tmp_path / "out" / "shard-00007.parquet")
    assert table["image_id"].to_pylist() == [f"{number:03d}.png" for number in range(3, 9)]
    assert table["image"].to_pylist() == [rows.image_bytes(number) for number in range(3, 9)]
    assert table["sha256"].to_pylist() == [hashlib.sha256(image).digest() for image in table["image"].to_pylist()]
    assert set(table["width"].to_pylist()) == {12}
    assert set(table["height"].to_pylist()) == {16}
    assert table["person_id"].null_count == 6
    assert sidecar.shard.row_groups == [4, 2]
    assert Sidecar.model_validate_json((tmp_path / "out" / "shard-00007.json").read_bytes()) == sidecar


def test_labels_are_kept(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "in", 5)
    table = rows.table
    for name, values in (
        ("person_id", ["a", None, "-1", "b", "a"]),
        ("camera_id", list("12312")),
        ("split", ["x"] * 5),
    ):
        table = table.set_column(table.schema.get_field_index(name), table.schema.field(name), [values])
    pack_shard(Rows(table, rows.stores), _task(rows), DISK, str(_out(tmp_path)))
    packed = pq.read_table(tmp_path / "out" / "shard-00000.parquet")
    for name in ("image_id", "person_id", "camera_id", "split"):
        assert packed[name].to_pylist() == table[name].to_pylist()


def test_bad_images_and_left_out_rows_leave_no_gap_in_the_row_groups(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "in", 12, bad=(1, 6))
    task = _task(rows, left_out=np.array([2, 9]))
    sidecar = pack_shard(rows, task, DISK, str(_out(tmp_path)))
    table = pq.read_table(tmp_path / "out" / "shard-00000.parquet")
    assert [int(image_id[:3]) for image_id in table["image_id"].to_pylist()] == [0, 3, 4, 5, 7, 8, 10, 11]
    assert sidecar.shard.row_groups == [4, 4]
    assert [(row.row, row.image_id) for row in sidecar.bad] == [(1, "001.png"), (6, "006.png")]
    assert all("not a JPEG" in row.reason for row in sidecar.bad)


def test_a_file_that_went_away_is_bad(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "in", 3)
    (tmp_path / "in" / "001.png").unlink()
    sidecar = pack_shard(rows, _task(rows), DISK, str(_out(tmp_path)))
    assert [row.image_id for row in sidecar.bad] == ["001.png"]
    assert sidecar.shard.rows == 2


def test_more_rows_than_are_read_at_a_time_fill_groups_of_one_size(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "in", 150)
    sidecar = pack_shard(rows, _task(rows, rows_per_group=40), DISK, str(_out(tmp_path)))
    assert sidecar.shard.row_groups == [40, 40, 40, 30]
    table = pq.read_table(tmp_path / "out" / "shard-00000.parquet")
    assert table["image_id"].to_pylist() == rows.image_ids.tolist()


def test_large_images_end_a_row_group_before_its_rows_do(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "in", 12, bad=(1,))
    large = encoded(np.random.default_rng(0).integers(0, 256, (40, 40, 3)).astype(np.uint8))
    for number in (2, 3, 5):
        (tmp_path / "in" / f"{number:03d}.png").write_bytes(large)
    assert len(rows.image_bytes(0)) * 4 < len(large)
    sidecar = pack_shard(rows, _task(rows, bytes_per_group=len(large)), DISK, str(_out(tmp_path)))
    assert sidecar.shard.row_groups == [2, 1, 2, 4, 2]  # 0 and 2; 3; 4 and 5; 6 to 9; 10 and 11
    table = pq.read_table(tmp_path / "out" / "shard-00000.parquet")
    assert table["image"].to_pylist() == [rows.image_bytes(number) for number in range(12) if number != 1]


def test_memory_of_a_task_does_not_grow_with_the_size_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = _rows(tmp_path / "in", 4)
    photo = bytes(2_000_000)
    monkeypatch.setattr(Rows, "read_many", lambda _, numbers: [bytes(bytearray(photo)) for _ in numbers])
    monkeypatch.setattr(pack_shard_module, "pack_image", lambda data, _: PackedImage(data, 1, 1, 0))
    many = Rows(rows.table.take(np.arange(128) % 4), rows.stores)
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    peaks = []
    tables = pack_shard_module._row_groups(many, _task(many, rows_per_group=128), [])
    for table in tables:
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes() - before)
        assert table["image"].nbytes <= GROUP_BYTES + len(photo) + 4 * (len(table) + 1)
    tracemalloc.stop()
    assert len(peaks) == 8
    assert max(peaks) < 4 * GROUP_BYTES  # all images take 8 times GROUP_BYTES


@pytest.mark.parametrize("rule", [AS_IS, ImageRule(24, 95), ImageRule(500, 95)])
def test_an_image_that_is_not_too_large_keeps_its_bytes(rule: ImageRule) -> None:
    data = encoded(gradient(16, 24), "JPEG", exif=EXIF_ROTATED)
    packed = pack_image(data, rule)
    assert packed.data == data
    assert (packed.width_px, packed.height_px) == (16, 24)  # upright, as decode_image gives it
    assert packed.dhash == difference_hash(decode_image(data))


def test_a_larger_image_becomes_an_upright_jpeg_without_colour_subsampling() -> None:
    data = encoded(gradient(32, 60)[:, ::-1].copy(), "PNG", exif=EXIF_ROTATED)
    packed = pack_image(data, ImageRule(30, 95))
    with Image.open(BytesIO(packed.data)) as image:
        assert (image.format, image.size) == ("JPEG", (16, 30))
        assert (packed.width_px, packed.height_px) == image.size
        assert not image.getexif()
        layers = cast(Any, image).layer
    assert [layer[1:3] for layer in layers] == [(1, 1)] * 3  # sampling factors of Y, Cb and Cr
    # Means of blocks of 2 x 2 pixels, which is what halving a smooth image gives with any filter.
    expected_HWC = decode_image(data).reshape(30, 2, 16, 2, 3).mean(axis=(1, 3))
    difference_HWC = np.abs(decode_image(packed.data)[2:-2, 2:-2] - expected_HWC[2:-2, 2:-2])
    assert difference_HWC.mean() < 6
    assert packed.dhash == difference_hash(decode_image(data))


def test_a_lower_quality_takes_fewer_bytes() -> None:
    noise = encoded(np.random.default_rng(0).integers(0, 256, (80, 60, 3)).astype(np.uint8))
    sizes = [len(pack_image(noise, ImageRule(40, quality)).data) for quality in (30, 60, 95)]
    assert sizes == sorted(set(sizes))


def test_an_image_too_narrow_once_shrunk_is_bad() -> None:
    data = encoded(np.zeros((400, 10, 3), np.uint8))
    assert pack_image(data, AS_IS).height_px == 400
    with pytest.raises(BadImage, match="10x400 pixels would shrink to 2x100"):
        pack_image(data, ImageRule(100, 95))


@pytest.mark.parametrize("free_bytes", [0, 3, 500, 2000])
def test_a_full_disk_leaves_the_shards_before_and_no_beginning_of_this_one(tmp_path: Path, free_bytes: int) -> None:
    rows = _rows(tmp_path / "in", 16)
    out = _out(tmp_path)
    first = pack_shard(rows, _task(rows, rows=slice(0, 8)), DISK, str(out))
    disk = cast(pafs.FileSystem, FullDisk(free_bytes))
    with pytest.raises(OSError, match="No space left") as error:
        pack_shard(rows, _task(rows, number=1, rows=slice(8, 16)), disk, str(out))
    assert error.value.errno == errno.ENOSPC
    assert sorted(path.name for path in out.iterdir()) == ["shard-00000.json", "shard-00000.parquet"]
    assert hashlib.sha256((out / "shard-00000.parquet").read_bytes()).hexdigest() == first.shard.sha256


def test_a_disk_that_is_full_before_the_sidecar_leaves_the_shard_unfinished(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "in", 8)
    size = pack_shard(rows, _task(rows), DISK, str(_out(tmp_path))).shard.bytes
    (tmp_path / "out" / "shard-00000.json").unlink()
    with pytest.raises(OSError, match="No space left"):
        pack_shard(rows, _task(rows), cast(pafs.FileSystem, FullDisk(size)), str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["shard-00000.parquet"]


def test_the_same_rows_make_the_same_file(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "in", 6)
    task = _task(rows, rule=ImageRule(12, 80))
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert pack_shard(rows, task, DISK, str(tmp_path / "a")) == pack_shard(rows, task, DISK, str(tmp_path / "b"))


def test_hashes_are_prefixes_of_the_sha256_and_zeros_for_what_cannot_be_read(tmp_path: Path) -> None:
    rows = _rows(tmp_path / "in", 140)
    (tmp_path / "in" / "131.png").unlink()
    prefixes_R2 = hash_rows(rows, slice(1, 140))
    expected = [
        bytes(16) if number == 131 else hashlib.sha256(rows.image_bytes(number)).digest()[:16]
        for number in range(1, 140)
    ]
    assert [row.tobytes() for row in prefixes_R2] == expected
