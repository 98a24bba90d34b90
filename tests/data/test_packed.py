"""Shards, their manifest, and the folder that they are packed into."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from passreid_ray.data.manifest import CLAIM_FILE, MANIFEST_FILE, Manifest, Shard, Sidecar, fingerprint_of
from passreid_ray.data.pack_folder import claim
from passreid_ray.data.packed import (
    SCHEMA,
    check_shards,
    read_manifest,
    shard_name,
    sidecar_name,
    write_shard,
    write_whole,
)
from passreid_ray.errors import UserError

DISK = pafs.LocalFileSystem()


def _group(first: int, num_rows: int, **changed: Any) -> pa.Table:
    images = [f"image {number}".encode() * 9 for number in range(first, first + num_rows)]
    columns = {
        "image_id": [f"{number:04d}" for number in range(first, first + num_rows)],
        "person_id": [None if number % 3 else "p" for number in range(first, first + num_rows)],
        "camera_id": ["c1"] * num_rows,
        "split": ["train"] * num_rows,
        "image": images,
        "width": [16] * num_rows,
        "height": [24] * num_rows,
        "sha256": [hashlib.sha256(image).digest() for image in images],
        "dhash": [2**64 - 1] * num_rows,
        **changed,
    }
    return pa.table(columns, schema=SCHEMA)


def write_packed(root: Path, num_shards: int = 3) -> Manifest:
    """Packed data of six rows a shard."""
    shards = [
        write_shard(DISK, str(root), shard_name(number), [_group(10 * number, 4), _group(10 * number + 4, 2)])
        for number in range(num_shards)
    ]
    manifest = Manifest(
        rows=sum(shard.rows for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        num_identities=1,
        num_cameras=1,
        rows_per_group=4,
        shards=shards,
        fingerprint=fingerprint_of(shards),
        num_bad=0,
        num_duplicates=0,
        settings={},
    )
    write_whole(DISK, f"{root}/{MANIFEST_FILE}", manifest.model_dump_json().encode())
    return manifest


def _names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def test_a_shard_holds_the_groups_as_they_came(tmp_path: Path) -> None:
    groups = [_group(0, 4), _group(4, 4), _group(8, 1)]
    shard = write_shard(DISK, str(tmp_path), "shard-00000.parquet", groups)
    path = tmp_path / "shard-00000.parquet"
    assert _names(tmp_path) == [path.name]
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        assert file.schema_arrow.equals(SCHEMA)
        assert [file.metadata.row_group(group).num_rows for group in range(3)] == [4, 4, 1] == shard.row_groups
        assert file.read().equals(pa.concat_tables(groups))
        image = file.metadata.row_group(0).column(SCHEMA.get_field_index("image"))
    assert image.compression == "UNCOMPRESSED"
    assert "RLE_DICTIONARY" not in image.encodings
    assert not image.is_stats_set
    assert shard.bytes == path.stat().st_size
    assert shard.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_flipped_bit_of_an_image_is_noticed_by_the_page_checksum(tmp_path: Path) -> None:
    write_shard(DISK, str(tmp_path), "shard-00000.parquet", [_group(0, 4)])
    path = tmp_path / "shard-00000.parquet"
    content = bytearray(path.read_bytes())
    content[content.index(b"image 2") + 3] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


def test_the_content_digest_is_of_ids_labels_and_images_and_not_of_row_groups(tmp_path: Path) -> None:
    def content(*groups: pa.Table) -> str:
        return write_shard(DISK, str(tmp_path), "shard-00000.parquet", groups).content

    own = content(_group(0, 6))
    assert own == content(_group(0, 2), _group(2, 4))
    assert own == content(_group(0, 6, dhash=[0] * 6, width=[1] * 6))
    others = [
        content(_group(1, 6)),
        content(_group(0, 5)),
        content(_group(0, 6, person_id=["q"] * 6)),
        content(_group(0, 6, camera_id=[None] * 6)),
        content(_group(0, 6, split=["query"] * 6)),
        content(_group(0, 6, sha256=[bytes(32)] * 6)),
    ]
    assert len({own, *others}) == 7


def test_when_the_rows_break_off_nothing_is_left_and_the_shard_before_stays(tmp_path: Path) -> None:
    def groups() -> Iterator[pa.Table]:
        yield _group(0, 4)
        raise RuntimeError("killed")

    for before in ([], ["shard-00000.parquet"]):
        with pytest.raises(RuntimeError, match="killed"):
            write_shard(DISK, str(tmp_path), "shard-00000.parquet", groups())
        assert _names(tmp_path) == before
        write_shard(DISK, str(tmp_path), "shard-00000.parquet", [_group(5, 3)])
    assert pq.read_table(tmp_path / "shard-00000.parquet").equals(_group(5, 3))


def test_a_shard_without_rows_is_a_parquet_file(tmp_path: Path) -> None:
    shard = write_shard(DISK, str(tmp_path), "shard-00000.parquet", [])
    assert (shard.rows, shard.row_groups) == (0, [])
    assert pq.read_table(tmp_path / "shard-00000.parquet").schema.equals(SCHEMA)


def test_a_manifest_is_read_as_it_was_written_and_its_shards_are_there(tmp_path: Path) -> None:
    manifest = write_packed(tmp_path)
    assert read_manifest(DISK, str(tmp_path)) == manifest
    check_shards(manifest, DISK, str(tmp_path))
    check_shards(manifest, DISK, str(tmp_path), verify=True)


def test_other_folders_have_no_manifest_and_an_unfinished_one_is_refused(tmp_path: Path) -> None:
    assert read_manifest(DISK, str(tmp_path)) is None
    assert read_manifest(DISK, str(tmp_path / "nowhere")) is None
    pq.write_table(_group(0, 2), tmp_path / "a.parquet")
    assert read_manifest(DISK, str(tmp_path / "a.parquet")) is None
    (tmp_path / CLAIM_FILE).touch()
    with pytest.raises(UserError, match="is not packed to its end; run the packing job again"):
        read_manifest(DISK, str(tmp_path))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", 2, "format: Input should be 1"),
        ("rows", 17, "shards sum up to 18 rows, not 17"),
        ("bytes", 1, "bytes, not 1"),
        ("fingerprint", "0" * 64, "the fingerprint is not that of the shards"),
        ("shards", [], "shards sum up to 0 rows"),
        ("num_bad", -1, "num_bad: "),
        ("extra", 1, "extra: "),
    ],
)
def test_a_damaged_manifest_says_what_is_wrong(tmp_path: Path, key: str, value: object, message: str) -> None:
    content = json.loads(write_packed(tmp_path).model_dump_json())
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({**content, key: value}))
    with pytest.raises(UserError, match=rf"manifest\.json: damaged: .*{message}"):
        read_manifest(DISK, str(tmp_path))


@pytest.mark.parametrize("name", ["../shard-00000.parquet", "/etc/passwd", "shard-00000.parquet\n", "a.parquet"])
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, name: str) -> None:
    content = json.loads(write_packed(tmp_path).model_dump_json())
    content["shards"][1]["file"] = name
    (tmp_path / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"damaged: shards\.1\.file"):
        read_manifest(DISK, str(tmp_path))


def test_a_manifest_that_was_cut_short_is_damaged(tmp_path: Path) -> None:
    write_packed(tmp_path)
    content = (tmp_path / MANIFEST_FILE).read_bytes()
    for end in (0, 1, len(content) // 2, len(content) - 1):
        (tmp_path / MANIFEST_FILE).write_bytes(content[:end])
        with pytest.raises(UserError, match="damaged: Invalid JSON"):
            read_manifest(DISK, str(tmp_path))


def test_shards_that_are_missing_cut_short_or_longer_are_named(tmp_path: Path) -> None:
    manifest = write_packed(tmp_path, 4)
    paths = [tmp_path / shard.file for shard in manifest.shards]
    paths[0].unlink()
    paths[1].write_bytes(paths[1].read_bytes()[:100])
    paths[3].write_bytes(paths[3].read_bytes() + b"!")
    size, last_size = manifest.shards[1].bytes, manifest.shards[3].bytes
    with pytest.raises(UserError) as error:
        check_shards(manifest, DISK, str(tmp_path))
    said = str(error.value)
    assert "3 of 4 shards" in said
    assert f"shard-00000.parquet is missing, shard-00001.parquet is cut short (100 of {size} bytes)" in said
    assert f"shard-00003.parquet was edited ({last_size + 1} bytes, packed with {last_size})" in said


def test_an_edit_that_keeps_the_size_is_found_by_verify_only(tmp_path: Path) -> None:
    manifest = write_packed(tmp_path)
    path = tmp_path / manifest.shards[1].file
    content = bytearray(path.read_bytes())
    content[50] ^= 1
    path.write_bytes(content)
    check_shards(manifest, DISK, str(tmp_path))
    with pytest.raises(UserError, match=r"1 of 3 shards .*: shard-00001\.parquet was edited or damaged"):
        check_shards(manifest, DISK, str(tmp_path), verify=True)


def test_a_long_list_of_faults_is_shortened(tmp_path: Path) -> None:
    manifest = write_packed(tmp_path, 6)
    for shard in manifest.shards:
        (tmp_path / shard.file).unlink()
    with pytest.raises(UserError, match=r"6 of 6 .*shard-00002\.parquet is missing, \.\.\.;"):
        check_shards(manifest, DISK, str(tmp_path))


def _sidecar(root: Path, number: int, settings: str) -> Shard:
    shard = write_shard(DISK, str(root), shard_name(number), [_group(10 * number, 4)])
    sidecar = Sidecar(settings=settings, shard=shard, bad=[])
    (root / sidecar_name(number)).write_text(sidecar.model_dump_json())
    return shard


def test_a_shard_is_finished_when_sidecar_settings_and_size_are_right(tmp_path: Path) -> None:
    folder = claim(tmp_path / "out", "f", {})
    for number in range(6):
        _sidecar(tmp_path / "out", number, "other" if number == 1 else folder.settings)
    (tmp_path / "out" / sidecar_name(2)).unlink()
    (tmp_path / "out" / sidecar_name(3)).write_text('{"settings": ')
    (tmp_path / "out" / shard_name(4)).write_bytes(b"short")
    (tmp_path / "out" / MANIFEST_FILE).touch()
    assert sorted(folder.finished(6)) == [0, 5]
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()


def test_a_sidecar_of_another_shard_does_not_count(tmp_path: Path) -> None:
    folder = claim(tmp_path / "out", "f", {})
    _sidecar(tmp_path / "out", 1, folder.settings)
    (tmp_path / "out" / sidecar_name(0)).write_bytes((tmp_path / "out" / sidecar_name(1)).read_bytes())
    assert sorted(folder.finished(2)) == [1]


def test_an_address_works_as_a_folder_does(tmp_path: Path) -> None:
    address = f"file://{tmp_path}/out"
    folder = claim(address, "f", {})
    assert folder.address == address
    shard = write_shard(folder.filesystem, folder.root, shard_name(0), [_group(0, 4)])
    sidecar = Sidecar(settings=folder.settings, shard=shard, bad=[])
    write_whole(folder.filesystem, folder.path(sidecar_name(0)), sidecar.model_dump_json().encode())
    assert claim(address, "f", {}).finished(1) == {0: sidecar}
    assert folder.read("nothing.json") is None


def test_a_manifest_stays_when_all_shards_are_finished(tmp_path: Path) -> None:
    folder = claim(tmp_path / "out", "f", {})
    shard = _sidecar(tmp_path / "out", 0, folder.settings)
    (tmp_path / "out" / MANIFEST_FILE).touch()
    assert {number: found.shard for number, found in folder.finished(1).items()} == {0: shard}
    assert (tmp_path / "out" / MANIFEST_FILE).exists()


def test_a_folder_is_claimed_once_and_again_for_the_same_and_cleared_of_drafts(tmp_path: Path) -> None:
    folder = claim(tmp_path / "out", "f", {"a": 1})
    (tmp_path / "out" / "shard-00000.parquet.0123abcd.part").touch()
    assert claim(tmp_path / "out", "f", {"a": 1}).settings == folder.settings
    assert _names(tmp_path / "out") == [CLAIM_FILE]
    with pytest.raises(UserError, match="packed with a = 1, now it is 2; give another output"):
        claim(tmp_path / "out", "f", {"a": 2})
    with pytest.raises(UserError, match=r"from other data \(fingerprint f, now g\)"):
        claim(tmp_path / "out", "g", {"a": 1})


@pytest.mark.parametrize(
    "content", ["", "[]", "[" * 100_000, '{"settings": 3}', '{"settings": {}}'], ids=lambda content: content[:20]
)
def test_a_damaged_claim_and_a_folder_of_other_things_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "film.mp4.part").touch()
    with pytest.raises(UserError, match="is not empty and holds no"):
        claim(tmp_path, "f", {})
    assert _names(tmp_path) == ["film.mp4.part"]
    (tmp_path / CLAIM_FILE).write_text(content)
    with pytest.raises(UserError, match="is damaged"):
        claim(tmp_path, "f", {})
