import pickle
import shutil
import tarfile
import zipfile
from pathlib import Path

import lmdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from passreid_ray.config import Section, build
from passreid_ray.data import Rows, Source, open_rows
from passreid_ray.data.decode import BadImage
from passreid_ray.data.folder import FolderSource
from passreid_ray.data.labels_csv import LabelsCsvSource
from passreid_ray.data.lmdb_source import LmdbSource
from passreid_ray.data.packed import check_shards, read_manifest
from passreid_ray.data.parquet import ParquetSource
from passreid_ray.data.storage import absolute, address_of, below, explained, locate, parent_and_name, reason, shown
from passreid_ray.data.tar_source import TarSource
from passreid_ray.data.zip_source import ZipSource
from passreid_ray.errors import UserError
from tests.data.pictures import write_images
from tests.data.s3 import KEY, SECRET, Bucket, bucket, s3_host, s3_keys
from tests.data.test_packed import write_packed

__all__ = ["bucket", "s3_host", "s3_keys"]  # fixtures

_PATHS = ["b/2.png", "a.png", "b/10.jpg", "c d/größe.png", "b/a+b&c.png"]


def _packed(root: Path) -> tuple[Path, list[bytes]]:
    """The same images in a folder and in all other kinds below ``root``, and their bytes in the order of image_id."""
    write_images(root / "folder", _PATHS)
    contents = {path: (root / "folder" / path).read_bytes() for path in _PATHS}
    (root / "folder" / ".hidden.png").write_bytes(b"x")
    shutil.copytree(root / "folder", root / "csv")
    (root / "csv/labels.csv").write_text("image\n" + "\n".join(_PATHS) + "\n")
    paths = sorted(_PATHS)  # Parquet files keep their order
    table = pa.table({"image_id": paths, "image": [contents[path] for path in paths]})
    pq.write_table(table, root / "images.parquet", row_group_size=2)
    with tarfile.open(root / "images.tar", "w") as tar, zipfile.ZipFile(root / "images.zip", "w") as archive:
        for path in _PATHS:
            tar.add(root / "folder" / path, path)
            archive.write(root / "folder" / path, path)
    with lmdb.open(str(root / "lmdb")) as environment, environment.begin(write=True) as transaction:
        for path in _PATHS:
            transaction.put(path.encode(), contents[path])
    return root, [contents[path] for path in sorted(_PATHS)]


def _check(rows: Rows, expected: list[bytes | BadImage]) -> None:
    rows = pickle.loads(pickle.dumps(rows))
    assert rows.image_ids.tolist() == sorted(_PATHS)
    assert [rows.image_bytes(index) for index in range(len(rows))] == expected
    locators = rows.table["locator"].to_pylist()
    assert rows.stores[0].read_many(locators[::-1]) == expected[::-1]


def test_all_kinds_give_the_same_bytes_in_the_same_order_from_a_disk_and_from_a_bucket(
    tmp_path: Path, bucket: Bucket
) -> None:
    root, expected = _packed(tmp_path)
    bucket.put_folder(root)
    for place in (lambda name: root / name, bucket.address):
        _check(open_rows(FolderSource(root=place("folder"))), [*expected])
        _check(open_rows(LabelsCsvSource(root=place("csv"))), [*expected])
        _check(open_rows(ParquetSource(path=place("images.parquet"))), [*expected])
        _check(open_rows(TarSource(path=place("images.tar"))), [*expected])
        _check(open_rows(ZipSource(path=place("images.zip"))), [*expected])
    _check(open_rows(LmdbSource(path=root / "lmdb")), [*expected])


def test_the_fingerprint_is_the_same_on_a_disk_and_in_a_bucket(tmp_path: Path, bucket: Bucket) -> None:
    root, _ = _packed(tmp_path)
    bucket.put_folder(root, "deep/er")
    for source, name in ((FolderSource, "folder"), (LabelsCsvSource, "csv")):
        rows = [open_rows(source(root=place)) for place in (root / name, bucket.address(f"deep/er/{name}"))]
        assert rows[0].fingerprint() == rows[1].fingerprint()
    for source, suffix in ((ParquetSource, "parquet"), (TarSource, "tar"), (ZipSource, "zip")):
        places = (root / f"images.{suffix}", bucket.address(f"deep/er/images.{suffix}"))
        rows = [open_rows(source(path=place)) for place in places]
        assert rows[0].fingerprint() == rows[1].fingerprint()


def test_archives_at_any_depth_of_a_bucket_are_one_data_set(tmp_path: Path, bucket: Bucket) -> None:
    root, _ = _packed(tmp_path)
    for suffix in ("tar", "zip"):
        for name in ("shards/0", "shards/deep/1", "shards/.hidden/2"):
            bucket.put(f"{name}.{suffix}", (root / f"images.{suffix}").read_bytes())
    for source in (TarSource, ZipSource):
        rows = open_rows(source(path=bucket.address("shards/")))
        assert rows.image_ids.tolist() == sorted(f"{shard}/{path}" for shard in ("0", "deep/1") for path in _PATHS)


def test_the_root_of_a_bucket_is_a_folder(tmp_path: Path, bucket: Bucket) -> None:
    bucket.put_folder(write_images(tmp_path, ["a.png", "x/b.png", ".thumbs/c.png"]))
    assert open_rows(FolderSource(root=bucket.address())).image_ids.tolist() == ["a.png", "x/b.png"]


def test_an_image_that_went_away_is_an_entry_and_the_others_are_read(tmp_path: Path, bucket: Bucket) -> None:
    bucket.put_folder(write_images(tmp_path, [f"{number:02d}.png" for number in range(40)]))
    rows = open_rows(FolderSource(root=bucket.address()))
    bucket.filesystem.delete_file(f"{bucket.name}/07.png")
    images = rows.stores[0].read_many(rows.image_ids.tolist())
    assert [index for index, image in enumerate(images) if isinstance(image, BadImage)] == [7]
    assert images[39] == (tmp_path / "39.png").read_bytes()
    with pytest.raises(BadImage, match="cannot be read"):
        rows.image_bytes(7)


def test_images_of_a_table_that_are_not_in_the_bucket_are_told(tmp_path: Path, bucket: Bucket) -> None:
    write_images(tmp_path, ["im/1.png"])
    (tmp_path / "labels.csv").write_text("image\nim/1.png\nim/2.png\n")
    bucket.put_folder(tmp_path)
    address = f"s3://{bucket.name}"
    message = rf"{address}/labels.csv: 1 of 2 images are not below {address}: im/2\.png"
    with pytest.raises(UserError, match=message):
        open_rows(LabelsCsvSource(root=bucket.address()))
    with pytest.raises(UserError, match=rf"{address}/other\.csv: no such table"):
        open_rows(LabelsCsvSource(root=bucket.address(), file="other.csv"))


def test_what_is_not_in_a_bucket_is_explained(bucket: Bucket) -> None:
    bucket.put("notes.txt", b"x")
    bucket.put("broken.tar", b"x" * 2000)
    bucket.put("broken.zip", b"x" * 2000)
    bucket.put("broken.parquet", b"x" * 2000)
    nowhere = bucket.address("x", name="no-such-bucket")
    cases = [
        (FolderSource(root=bucket.address()), rf"^s3://{bucket.name}: no image at any depth"),
        (FolderSource(root=bucket.address("notes.txt")), r"/notes\.txt: expected a folder with images, found a file"),
        (FolderSource(root=nowhere), "^s3://no-such-bucket/x: expected a folder with images, found nothing there"),
        (LabelsCsvSource(root=nowhere), "^s3://no-such-bucket/x: expected a folder with labels.csv and images"),
        (ParquetSource(path=nowhere), "^s3://no-such-bucket/x: no such Parquet file or folder"),
        (TarSource(path=nowhere), r"^s3://no-such-bucket/x: no such \.tar file or folder"),
        (TarSource(path=bucket.address("broken.tar")), r"/broken\.tar: not a whole tar archive"),
        (ZipSource(path=bucket.address("broken.zip")), r"/broken\.zip: not a whole zip archive"),
        (ParquetSource(path=bucket.address("broken.parquet")), r"/broken\.parquet: not a readable Parquet file"),
        (LmdbSource(path=bucket.address()), "cannot be read from a bucket; copy it to a disk, or pack"),
    ]
    for source, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            open_rows(source)
        assert "\n" not in str(caught.value)


_EVERY_KIND = {
    "folder": lambda address: FolderSource(root=address),
    "labels_csv": lambda address: LabelsCsvSource(root=address),
    "parquet": lambda address: ParquetSource(path=address),
    "tar": lambda address: TarSource(path=address),
    "zip": lambda address: ZipSource(path=address),
}


@pytest.mark.parametrize("kind", _EVERY_KIND)
def test_a_bucket_that_may_not_be_read_is_told_by_every_kind_in_one_line(kind: str, bucket: Bucket) -> None:
    bucket.put("x/a.png", b"x")
    message = rf"^s3://{bucket.name}/x: cannot be (listed|read): .*ACCESS_DENIED.*; check the address, the credentials"
    with bucket.closed_to_strangers(), pytest.raises(UserError, match=message) as caught:
        open_rows(_EVERY_KIND[kind](bucket.address("x")))
    assert "\n" not in str(caught.value)


def test_an_image_in_a_bucket_that_may_not_be_read_any_more_is_a_bad_image(bucket: Bucket) -> None:
    bucket.put("a.png", b"x")
    rows = open_rows(FolderSource(root=bucket.address()))
    with bucket.closed_to_strangers(), pytest.raises(BadImage, match=r"cannot be read: .*ACCESS_DENIED"):
        rows.image_bytes(0)
    assert rows.image_bytes(0) == b"x"


def test_packed_shards_that_may_not_be_read_are_told_by_their_address(tmp_path: Path, bucket: Bucket) -> None:
    manifest = write_packed(tmp_path)
    bucket.put_folder(tmp_path, "packed")
    filesystem, path = locate(bucket.address("packed"))
    assert read_manifest(filesystem, path) == manifest
    check_shards(manifest, filesystem, path, verify=True)
    bucket.filesystem.delete_file(f"{path}/{manifest.shards[1].file}")
    with pytest.raises(UserError, match=rf"^s3://{bucket.name}/packed: 1 of 3 shards .*00001\.parquet is missing"):
        check_shards(manifest, filesystem, path)
    message = rf"^s3://{bucket.name}/packed: cannot be read: .*AWS Error.*; check the address, the credentials"
    with bucket.closed_to_strangers():
        with pytest.raises(UserError, match=message):
            read_manifest(filesystem, path)
        with pytest.raises(UserError, match=message):
            check_shards(manifest, filesystem, path)


def test_an_address_is_opened_once(bucket: Bucket) -> None:
    assert locate(bucket.address())[0] is locate(bucket.address())[0]


def test_a_server_that_does_not_answer_is_told_with_the_reason(s3_keys: None) -> None:
    # The connection is refused at once; pyarrow tries again for some seconds.
    address = "s3://bucket/x?endpoint_override=127.0.0.1%3A1&scheme=http&region=us-east-1"
    with pytest.raises(UserError, match=r"^s3://bucket/x: cannot be read: .*Could not connect to server"):
        open_rows(ParquetSource(path=address))


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("s3://bucket/x?speed=9", "^s3://bucket/x: no address .*'speed'"),
        ("s3://bucket/x y", "^s3://bucket/x y: no address that can be opened: Cannot parse URI"),
        ("ftp://bucket/x", "^ftp://bucket/x: no address that can be opened: Unrecognized"),
        ("s3://?region=us-east-1", "^s3://: "),
    ],
)
def test_an_address_that_cannot_be_opened_is_explained(address: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_rows(FolderSource(root=address))


class _Job(Section):
    data: Source = FolderSource(root="s3://bucket")


@pytest.mark.parametrize(
    "address",
    [
        f"s3://{KEY}:{SECRET}@bucket/crops",
        f"s3://{KEY}:{SECRET}@bucket/crops?region=x",
        f"s3://{KEY}:slash/{SECRET}@bucket/crops",
        f"s3://{KEY}:{'long' * 40}{SECRET}@bucket/crops",
    ],
)
def test_an_address_with_credentials_is_refused_and_does_not_show_them(address: str) -> None:
    with pytest.raises(UserError, match=r"^data\.root: holds credentials, .*AWS_ACCESS_KEY_ID.*s3://bucket/") as caught:
        build(_Job, {"data": {"kind": "folder", "root": address}})
    with pytest.raises(ValidationError, match="holds credentials") as raw:
        FolderSource(root=address)
    for said in (str(caught.value), str(raw.value)):
        assert KEY not in said
        assert SECRET not in said
        assert "long" not in said


def test_an_address_in_the_wrong_place_does_not_show_credentials() -> None:
    with pytest.raises(UserError, match=r"^data: expected a section") as caught:
        build(_Job, {"data": f"s3://{KEY}:{SECRET}@bucket"})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("address", ["s3://bucket/a@b/c", "gs://anonymous@bucket/a", "a:b@c/what.png"])
def test_an_at_sign_alone_is_no_sign_of_credentials(address: str) -> None:
    assert str(FolderSource(root=address).root) == address


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("s3://bucket/a@b/c", "s3://bucket/a@b/c"),
        ("s3://bucket/a/", "s3://bucket/a"),
        ("s3://bucket/a/?region=x", "s3://bucket/a"),
        ("a:b@c/what?.png", "a:b@c/what?.png"),
    ],
)
def test_addresses_are_shown_without_options(address: str, expected: str) -> None:
    assert shown(address) == expected
    assert shown(address, "d.tar") == f"{expected}/d.tar"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("runs", "runs/a"),
        ("s3://bucket/runs", "s3://bucket/runs/a"),
        ("s3://bucket/runs/?region=eu&scheme=http", "s3://bucket/runs/a?region=eu&scheme=http"),
        ("s3://bucket?region=eu", "s3://bucket/a?region=eu"),
    ],
)
def test_a_name_is_joined_before_the_options(address: str, expected: str) -> None:
    assert below(address, "a") == expected


def test_the_address_of_what_was_located_is_the_one_it_was_located_by(tmp_path: Path) -> None:
    for address in (str(tmp_path.resolve()), "s3://bucket/a?region=eu-west-1", "gs://anonymous@bucket/a"):
        assert address_of(*locate(address)) == shown(address).replace("anonymous@", "")


def test_what_a_disk_refuses_is_told_with_its_place_and_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}: cannot be read: first$"), explained(tmp_path):
        raise OSError("first\nsecond")
    with pytest.raises(KeyError), explained(tmp_path):
        raise KeyError("bug")


def test_a_reason_is_one_line() -> None:
    assert reason(OSError("at 's3://bucket/x'\nmore")) == "at 's3://bucket/x'"
    assert reason(OSError()) == "OSError"


def test_google_addresses_are_opened_by_their_own_file_system() -> None:
    filesystem, path = locate("gs://anonymous@bucket/folder/")
    assert (filesystem.type_name, path) == ("gcs", "bucket/folder")


def test_a_folder_is_made_absolute_and_an_address_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert absolute("x") == absolute(Path("~/x")) == str(tmp_path.resolve() / "x")
    assert absolute("s3://bucket/x") == "s3://bucket/x"
    assert parent_and_name("x/a.tar") == (str(tmp_path.resolve() / "x"), "a.tar")
    assert parent_and_name("s3://b/x/a%20b.tar?region=c") == ("s3://b/x?region=c", "a b.tar")
    assert parent_and_name("s3://b/a.tar?region=c") == ("s3://b?region=c", "a.tar")
