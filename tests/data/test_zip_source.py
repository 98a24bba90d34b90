import pickle
import re
import struct
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest

from passreid_ray.data.decode import BadImage
from passreid_ray.data.zip_source import ZipSource, read_zip
from passreid_ray.errors import UserError
from tests.data.pictures import encoded


def _image(number: int) -> bytes:
    return encoded(np.full((16, 12, 3), number, np.uint8))


def _write(path: Path, entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


def _patch(path: Path, offset: int, value: bytes) -> Path:
    """Overwrite bytes of the first entry in the list of entries at the archive's end."""
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02") + offset
    data[start : start + len(value)] = value
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_every_entry_leads_to_its_image(tmp_path: Path, method: int) -> None:
    images = {"b/1.jpg": _image(0), "a:b.PNG": _image(1), "größe.png": _image(2)}
    others = {"notes.txt": b"x", "b/": b"", "__MACOSX/b/._1.jpg": b"x", ".hidden/a.jpg": b"x"}
    path = _write(tmp_path / "a.zip", {**others, **images}, method)
    rows = pickle.loads(pickle.dumps(read_zip(ZipSource(path=path))))
    assert rows.image_ids.tolist() == sorted(images)
    assert [rows.image_bytes(index) for index in range(3)] == [images[name] for name in sorted(images)]
    assert set(rows.person_ids) == set(rows.camera_ids) == set(rows.splits) == {None}


def test_entries_of_several_archives_are_told_apart_by_the_archives_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    _write(tmp_path / "x.zip", {"a.jpg": _image(0)})
    _write(tmp_path / "deep/y.zip", {"./a.jpg": _image(1), "././b/./.c.jpg": b"hidden", "./b/./c.jpg": _image(2)})
    rows = read_zip(ZipSource(path=tmp_path))
    assert rows.image_ids.tolist() == ["deep/y/a.jpg", "deep/y/b/c.jpg", "x/a.jpg"]
    assert [int(rows.image(index)[0, 0, 0]) for index in range(3)] == [1, 2, 0]


def test_read_many_answers_in_the_order_asked_for_and_a_broken_entry_is_one(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.zip", {f"{number}.png": _image(number) for number in range(5)})
    data = bytearray(path.read_bytes())
    data[data.index(_image(3)) + 20] ^= 255
    path.write_bytes(data)
    rows = read_zip(ZipSource(path=path))
    locators = rows.table["locator"].to_pylist()
    no_entry = locators[0].replace("0:0:", "0:1:")
    images = rows.stores[0].read_many([locators[4], locators[3], locators[0], no_entry, locators[4]])
    assert [images[0], images[2], images[4]] == [_image(4), _image(0), _image(4)]
    reasons = [image.reason for image in images if isinstance(image, BadImage)]
    assert re.search(r"a\.zip: the entry at byte \d+ is damaged or was replaced \(its size or CRC-32", reasons[0])
    assert "a.zip no longer has an entry at byte 1" in reasons[1]


@pytest.mark.parametrize("extra_bytes", [0, 28, 511, 512, 60_000])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_an_entry_is_read_whatever_its_header_holds_besides(tmp_path: Path, extra_bytes: int, method: int) -> None:
    entries = [zipfile.ZipInfo("ä" * 40 + f"{number}.png") for number in range(3)]
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, entry in enumerate(entries):
            entry.compress_type = method
            # Written to the entry's header; the list at the end then has another extra field.
            entry.extra = struct.pack("<HH", 0xCAFE, extra_bytes) + bytes(extra_bytes)
            archive.writestr(entry, _image(number))
            entry.extra = b""
    rows = read_zip(ZipSource(path=tmp_path))
    assert [rows.image_bytes(index) for index in range(3)] == [_image(number) for number in range(3)]


def test_streamed_entries_and_those_of_zip64_are_read(tmp_path: Path) -> None:
    with open(tmp_path / "a.zip", "wb") as file, zipfile.ZipFile(_NoSeek(file), "w") as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        with archive.open("0.png", "w", force_zip64=True) as entry:
            entry.write(_image(0))
        archive.writestr("1.png", _image(1), zipfile.ZIP_DEFLATED)
    (tmp_path / "a.zip").write_bytes(b"#!starter\n" + (tmp_path / "a.zip").read_bytes())
    rows = read_zip(ZipSource(path=tmp_path))
    assert [rows.image_bytes(index) for index in range(2)] == [_image(0), _image(1)]


class _NoSeek:
    """A pipe: sizes and CRC-32 then follow the content."""

    def __init__(self, file: BinaryIO) -> None:
        self.write, self.flush = file.write, file.flush


def test_an_archive_that_was_replaced_or_cut_off_gives_bad_images(tmp_path: Path) -> None:
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = _write(tmp_path / f"{method}.zip", {"a.png": _image(0)}, method)
        rows = read_zip(ZipSource(path=path))
        _write(tmp_path / f"{method}.zip", {"a.png": _image(1)}, method)
        with pytest.raises(BadImage, match="damaged or was replaced"):
            rows.image_bytes(0)
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(BadImage, match=r"damaged or was replaced|cannot be read"):
            pickle.loads(pickle.dumps(rows)).image_bytes(0)


def test_reading_opens_no_list_of_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = read_zip(ZipSource(path=_write(tmp_path / "a.zip", {"a.png": _image(0)})))

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("the list of entries was read")

    monkeypatch.setattr(zipfile, "ZipFile", refused)
    assert rows.image_bytes(0) == _image(0)
    assert rows.read_many([0]) == [_image(0)]


def test_the_fingerprint_tells_other_images_under_the_same_names(tmp_path: Path) -> None:
    fingerprints: set[str] = set()
    for number in (0, 1, 1):
        image = encoded(np.full((16, 12, 3), number, np.uint8), "BMP")  # all of one size
        fingerprints.add(read_zip(ZipSource(path=_write(tmp_path / "a.zip", {"a.bmp": image}))).fingerprint())
    assert len(fingerprints) == 2


def test_threads_may_share_an_archive(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.zip", {f"{n}.png": _image(n) for n in range(50)}, zipfile.ZIP_DEFLATED)
    rows = read_zip(ZipSource(path=path))
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(rows.image, list(range(50)) * 4))
    assert [f"{int(image[0, 0, 0])}.png" for image in images] == rows.image_ids.tolist() * 4


def test_encrypted_and_oddly_packed_entries_are_refused_by_name(tmp_path: Path) -> None:
    path = _patch(_write(tmp_path / "a.zip", {"a.jpg": _image(0)}), 8, b"\x01\x00")
    with pytest.raises(UserError, match=r"a\.zip: entry 'a\.jpg' is encrypted; pack the images without a password"):
        read_zip(ZipSource(path=path))
    path = _write(tmp_path / "b.zip", {"a.jpg": _image(0)}, zipfile.ZIP_LZMA)
    with pytest.raises(UserError, match=r"b\.zip: entry 'a\.jpg' is packed by method 14; pack"):
        read_zip(ZipSource(path=path))


@pytest.mark.parametrize("field", [20, 24], ids=["packed", "unpacked"])
def test_an_entry_that_says_it_is_huge_is_a_bad_image_and_the_others_are_read(tmp_path: Path, field: int) -> None:
    path = _write(tmp_path / "a.zip", {"a.jpg": _image(0), "b.jpg": _image(1)})
    rows = read_zip(ZipSource(path=_patch(path, field, struct.pack("<I", 100_000_001))))
    huge, image = rows.read_many([0, 1])
    assert isinstance(huge, BadImage)
    assert huge.reason == "has 100000001 bytes; an image has at most 100000000"
    assert image == _image(1)


def test_an_entry_that_unpacks_to_more_than_it_says_is_a_bad_image(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.zip", {"a.jpg": bytes(10_000_000)}, zipfile.ZIP_DEFLATED)
    rows = read_zip(ZipSource(path=_patch(path, 24, struct.pack("<I", 1000))))
    with pytest.raises(BadImage, match="its size or CRC-32 is another"):
        rows.image_bytes(0)


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg", "..\\a.jpg"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"a\.zip: member '.*a\.jpg' points outside of the archive"):
        read_zip(ZipSource(path=_write(tmp_path / "a.zip", {name: _image(0)})))


def test_links_are_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("a.jpg")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(UserError, match=r"'a\.jpg' is a link"):
        read_zip(ZipSource(path=tmp_path))


def test_what_is_no_whole_archive_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such \.zip file or folder"):
        read_zip(ZipSource(path=tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no \*\.zip file at any depth"):
        read_zip(ZipSource(path=tmp_path))
    path = _write(tmp_path / "a.zip", {"notes.txt": b"x"})
    with pytest.raises(UserError, match="no image in 1 zip archives"):
        read_zip(ZipSource(path=path))
    (tmp_path / "b.zip").write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"b\.zip: not a whole zip archive: .*; copy or pack it again"):
        read_zip(ZipSource(path=tmp_path / "b.zip"))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number in (0, 1):
            archive.writestr("a.jpg", _image(number))
    with pytest.raises(UserError, match=r"1 image ids are not unique, such as 'a\.jpg'"):
        read_zip(ZipSource(path=tmp_path))


def test_the_fingerprint_ignores_where_the_archives_lie(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name / "a.zip", {"a.png": _image(0)})
    here, there = (read_zip(ZipSource(path=tmp_path / name)) for name in ("x", "y"))
    assert here.fingerprint() == there.fingerprint()
