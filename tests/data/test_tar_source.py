import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from passreid_ray.data.decode import BadImage
from passreid_ray.data.tar_source import TarSource, TarStore, read_tar
from passreid_ray.errors import UserError
from tests.data.pictures import encoded


def _image(number: int) -> bytes:
    return encoded(np.full((16, 12, 3), number, np.uint8))


def _write(path: Path, members: dict[str, bytes], file_format: int = tarfile.PAX_FORMAT, mode: str = "w") -> Path:
    with tarfile.open(path, mode, format=file_format) as tar:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, data in members.items():
            _add(tar, tarfile.TarInfo(name), data)
    return path


def _add(tar: tarfile.TarFile, member: tarfile.TarInfo, data: bytes = b"") -> None:
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("file_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_member_leads_to_its_image(tmp_path: Path, file_format: int) -> None:
    names = ["b/1.jpg", "a.PNG", f"{'deep/' * 15}{'long' * 20}.png"]
    members = {"notes.txt": b"x" * 1300, **{name: _image(number) for number, name in enumerate(names)}}
    path = _write(tmp_path / "a.tar", {**members, ".hidden.png": b"", "b/._1.jpg": b""}, file_format)
    rows = pickle.loads(pickle.dumps(read_tar(TarSource(path=path))))
    assert rows.image_ids.tolist() == sorted(names)
    assert [rows.image_bytes(index) for index in range(3)] == [members[name] for name in sorted(names)]
    assert set(rows.person_ids) == set(rows.camera_ids) == set(rows.splits) == {None}


def test_what_the_tar_command_packs_of_a_folder_has_the_folders_names(tmp_path: Path) -> None:
    (tmp_path / "in/sub").mkdir(parents=True)
    (tmp_path / "in/sub/a.png").write_bytes(_image(0))
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(tmp_path / "in", arcname=".")
        assert tar.getnames() == [".", "./sub", "./sub/a.png"]
    assert read_tar(TarSource(path=tmp_path / "a.tar")).image_ids.tolist() == ["sub/a.png"]


def test_parts_of_a_name_that_are_dots_are_left_out(tmp_path: Path) -> None:
    members = {"./a/./b.jpg": _image(0), "././c.jpg": _image(1), "a/./b.json": b'{"person_id": 7}', "./.d.jpg": b"x"}
    rows = read_tar(TarSource(path=_write(tmp_path / "a.tar", members)))
    assert rows.image_ids.tolist() == ["a/b.jpg", "c.jpg"]
    assert rows.person_ids.tolist() == ["7", None]


def test_members_of_several_shards_are_told_apart_by_the_shards_names(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    _write(tmp_path / "000000.tar", {"a.jpg": _image(0), "b.jpg": _image(1)})
    _write(tmp_path / "deep/000001.tar", {"a.jpg": _image(2)})
    rows = read_tar(TarSource(path=tmp_path))
    assert rows.image_ids.tolist() == ["000000/a.jpg", "000000/b.jpg", "deep/000001/a.jpg"]
    assert [int(rows.image(index)[0, 0, 0]) for index in range(3)] == [0, 1, 2]


def test_sidecars_before_and_behind_their_images_give_labels(tmp_path: Path) -> None:
    labels = {"person_id": 7, "camera_id": "c2", "split": "query", "caption": ["x"]}
    members = {
        "p/1.json": json.dumps(labels).encode(),
        "p/1.jpg": _image(0),
        "p/1.cls": b"3",
        "q/1.front.jpg": _image(1),
        "q/1.json": b'{"person_id": null, "split": "train"}',
        "r.jpg": _image(2),
        "r.txt": b"someone",
    }
    rows = read_tar(TarSource(path=_write(tmp_path / "a.tar", members)))
    assert rows.image_ids.tolist() == ["p/1.jpg", "q/1.front.jpg", "r.jpg"]
    assert rows.person_ids.tolist() == ["7", None, None]
    assert rows.camera_ids.tolist() == ["c2", None, None]
    assert rows.splits.tolist() == ["query", "train", None]
    assert read_tar(TarSource(path=tmp_path, splits=["train"])).image_ids.tolist() == ["q/1.front.jpg"]


@pytest.mark.parametrize(
    ("sidecar", "message"),
    [
        (b"{", r"a\.tar: 1\.json: not valid JSON"),
        (b"\xff\xfe\x00", r"a\.tar: 1\.json: not valid JSON"),
        (b'{"person_id": "' + b"x" * 1_000_000 + b'"}', r"1\.json has 1000017 bytes; an image's labels have at most"),
        (b'{"person_id": 1.5}', r"1\.json: person_id: expected text or a whole number, found 1\.5"),
        (b'{"camera_id": true}', r"1\.json: camera_id: expected text or a whole number, found True"),
    ],
)
def test_a_wrong_sidecar_is_explained(tmp_path: Path, sidecar: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_tar(TarSource(path=_write(tmp_path / "a.tar", {"1.jpg": _image(0), "1.json": sidecar})))


def test_json_that_is_none_of_ours_is_passed_over(tmp_path: Path) -> None:
    members = {
        "1.jpg": _image(0),
        "1.json": b"[1]",
        "2.json": b'"a caption"',
        "2.jpg": _image(1),
        "3.jpg": _image(2),
        "3.json": b'{"person_id": 3}',
        "annotations.json": b" " * 1_000_001,
        "broken.json": b"{",
    }
    rows = read_tar(TarSource(path=_write(tmp_path / "a.tar", members)))
    assert rows.person_ids.tolist() == [None, None, "3"]


@pytest.mark.parametrize("mode", ["w:gz", "w:bz2", "w:xz"])
@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz"])
def test_compressed_archives_are_refused_whatever_their_name(tmp_path: Path, mode: str, name: str) -> None:
    _write(tmp_path / name, {"a.jpg": _image(0)}, mode=mode)
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(UserError, match=rf"{name}: compressed, .*; decompress it to a \.tar file"):
            read_tar(TarSource(path=path))


@pytest.mark.parametrize(
    ("type_", "kind"),
    [
        (tarfile.SYMTYPE, "a link"),
        (tarfile.LNKTYPE, "a link"),
        (tarfile.CHRTYPE, "a device"),
        (tarfile.FIFOTYPE, "a device"),
    ],
)
def test_links_and_devices_are_refused_by_name(tmp_path: Path, type_: bytes, kind: str) -> None:
    member = tarfile.TarInfo("odd.jpg")
    member.type, member.linkname = type_, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        _add(tar, tarfile.TarInfo("a.jpg"), _image(0))
        _add(tar, member)
    with pytest.raises(UserError, match=rf"a\.tar: member 'odd\.jpg' is {kind}; pack the images as ordinary files"):
        read_tar(TarSource(path=tmp_path / "a.tar"))


def test_sparse_members_are_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("holes.jpg")
    member.pax_headers = {"GNU.sparse.map": "0,1", "GNU.sparse.size": "4096"}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        _add(tar, member, b"x")
    with pytest.raises(UserError, match=r"member 'holes\.jpg' is sparse"):
        read_tar(TarSource(path=tmp_path))


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg", "..\\a.jpg"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"a\.tar: member '.*a\.jpg' points outside of the archive"):
        read_tar(TarSource(path=_write(tmp_path / "a.tar", {name: _image(0)})))


def test_an_archive_that_was_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tar", {"a.jpg": _image(0), "b.jpg": _image(1)}, tarfile.USTAR_FORMAT)
    whole = path.read_bytes()
    end = 2 * 512 + 2 * 512  # two headers, two images below 512 bytes
    assert not any(whole[end:])
    assert len(_image(0)) < 512
    for length in (300, 512, 600, 1024, 1100, 1536, 1600, 2048, 2300):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.tar: not a whole tar archive: .*; copy or pack it again"):
            read_tar(TarSource(path=path))
    path.write_bytes(whole[: end + 512])
    assert len(read_tar(TarSource(path=path))) == 2


def test_a_broken_header_in_the_middle_is_no_end(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.tar", {"a.jpg": _image(0), "b.jpg": _image(1)}, tarfile.USTAR_FORMAT)
    data = bytearray(path.read_bytes())
    data[1024:1030] = b"broken"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"a\.tar: not a whole tar archive: no header at byte 1024"):
        read_tar(TarSource(path=path))


def test_what_is_no_archive_is_explained(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such \.tar file or folder"):
        read_tar(TarSource(path=tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no \*\.tar file at any depth"):
        read_tar(TarSource(path=tmp_path))
    (tmp_path / "a.tar").write_bytes(b"text" * 1000)
    with pytest.raises(UserError, match=r"a\.tar: not a whole tar archive"):
        read_tar(TarSource(path=tmp_path))
    _write(tmp_path / "a.tar", {"notes.txt": b"x"})
    with pytest.raises(UserError, match="no image in 1 tar archives"):
        read_tar(TarSource(path=tmp_path))


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in (0, 1):
            _add(tar, tarfile.TarInfo("a.jpg"), _image(number))
    with pytest.raises(UserError, match=r"1 image ids are not unique, such as 'a\.jpg'"):
        read_tar(TarSource(path=tmp_path))


def test_read_many_answers_in_the_order_asked_for(tmp_path: Path) -> None:
    for shard in (0, 1):
        _write(tmp_path / f"{shard}.tar", {f"{number}.png": _image(10 * shard + number) for number in range(4)})
    rows = read_tar(TarSource(path=tmp_path))
    locators = rows.table["locator"].to_pylist()
    order = [5, 0, 7, 2, 5]
    expected: list[bytes | BadImage] = [_image(number) for number in (11, 0, 13, 2, 11)]
    assert rows.stores[0].read_many([locators[index] for index in order]) == expected


def test_an_archive_that_went_away_is_an_entry_for_each_of_its_images(tmp_path: Path) -> None:
    _write(tmp_path / "a.tar", {"a.png": _image(0)}, tarfile.USTAR_FORMAT)
    good, gone = TarStore(str(tmp_path), ("a.tar", "gone.tar")).read_many(["0:512:4", "1:512:4"])
    assert good == b"\x89PNG"
    assert isinstance(gone, BadImage)


def test_a_size_below_zero_does_not_lead_round_in_a_circle(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.size = -1024
    header = member.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + bytes(4096))
    with pytest.raises(UserError, match=r"a\.tar: not a whole tar archive"):
        read_tar(TarSource(path=tmp_path))


def test_a_locator_behind_the_end_is_a_bad_image(tmp_path: Path) -> None:
    rows = read_tar(TarSource(path=_write(tmp_path / "a.tar", {"a.png": _image(0)})))
    with pytest.raises(BadImage, match=r"a\.tar ends at byte"):
        rows.stores[0].read(f"0:512:{1 << 20}")


def test_the_fingerprint_ignores_where_the_archives_lie(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        _write(tmp_path / name / "a.tar", {"a.png": _image(0)})
    here, there = (read_tar(TarSource(path=tmp_path / name)) for name in ("x", "y"))
    assert here.fingerprint() == there.fingerprint()
    _write(tmp_path / "y/a.tar", {"a.png": _image(0) + b"more"})
    assert read_tar(TarSource(path=tmp_path / "y")).fingerprint() != here.fingerprint()


def test_a_member_larger_than_an_image_is_a_bad_image_and_the_others_are_read(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.jpg")
    member.size = 100_000_001
    _write(tmp_path / "b.tar", {"b.jpg": _image(1)})
    with (tmp_path / "a.tar").open("wb") as file:
        file.write(member.tobuf())
        file.seek(member.size + -member.size % tarfile.BLOCKSIZE, io.SEEK_CUR)  # takes no room on the disk
        file.write((tmp_path / "b.tar").read_bytes())
    rows = read_tar(TarSource(path=tmp_path / "a.tar"))
    huge, image = rows.read_many([0, 1])
    assert isinstance(huge, BadImage)
    assert huge.reason == "has 100000001 bytes; an image has at most 100000000"
    assert image == _image(1)
