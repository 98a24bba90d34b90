import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import lmdb
import numpy as np
import pytest
from PIL import Image

from passreid_ray.data.decode import BadImage, decode_image
from passreid_ray.data.lmdb_source import LmdbSource, LmdbStore, begins_like_an_image, list_keys, read_lmdb
from passreid_ray.errors import UserError
from tests.data.pictures import encoded

# Keys of LUPerson: country, city, video, image.
_LUPERSON = {f"00_{city:02d}_0003_{number:08d}".encode(): city * 10 + number for city in (0, 1) for number in range(3)}


def _image(number: int) -> bytes:
    return encoded(np.full((16, 12, 3), number, np.uint8))


def _write(path: Path, values: dict[bytes, bytes], *, subdir: bool = True) -> Path:
    with (
        lmdb.open(str(path), subdir=subdir, map_size=1 << 22) as environment,
        environment.begin(write=True) as transaction,
    ):
        for key, value in values.items():
            transaction.put(key, value)
    return path


def test_every_key_leads_to_its_image_in_another_process_too(tmp_path: Path) -> None:
    _write(tmp_path / "lup_lmdb", {key: _image(number) for key, number in _LUPERSON.items()})
    rows = pickle.loads(pickle.dumps(read_lmdb(LmdbSource(path=tmp_path / "lup_lmdb"))))
    assert rows.image_ids.tolist() == sorted(key.decode() for key in _LUPERSON)
    assert [int(rows.image(index)[0, 0, 0]) for index in range(6)] == [0, 1, 2, 10, 11, 12]
    assert rows.image_bytes(4) == _image(11)
    assert set(rows.person_ids) == set(rows.camera_ids) == set(rows.splits) == {None}


def test_one_file_instead_of_a_folder_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "images.lmdb", {b"a": _image(3)}, subdir=False)
    _write(tmp_path / "folder", {b"b": _image(4)})
    assert read_lmdb(LmdbSource(path=tmp_path / "images.lmdb")).image_ids.tolist() == ["a"]
    assert read_lmdb(LmdbSource(path=tmp_path / "folder" / "data.mdb")).image_ids.tolist() == ["b"]


def test_counts_and_pickled_lists_are_skipped_and_counted(tmp_path: Path) -> None:
    others = {b"num-samples": b"2", b"__len__": pickle.dumps(2), b"__keys__": pickle.dumps([b"a", b"b"]), b"e": b""}
    keys = list_keys(str(_write(tmp_path / "x", {b"a": _image(0), b"b": _image(1), **others})))
    assert (keys.image_ids, keys.num_skipped) == (["a", "b"], 4)


def test_keys_that_are_not_text_are_named_in_hexadecimal_and_found_again(tmp_path: Path) -> None:
    keys = [b"\xff\x00", (7).to_bytes(4, "big"), b"hex:00", "größe".encode()]
    _write(tmp_path / "x", {key: _image(number) for number, key in enumerate(keys)})
    rows = read_lmdb(LmdbSource(path=tmp_path / "x"))
    numbers = {image_id: int(rows.image(index)[0, 0, 0]) for index, image_id in enumerate(rows.image_ids)}
    assert numbers == {"ff00": 0, "00000007": 1, "hex:00": 2, "größe": 3}


def test_read_many_answers_in_the_order_asked_for_and_a_missing_key_is_an_entry(tmp_path: Path) -> None:
    store = LmdbStore(str(_write(tmp_path / "x", {b"a": _image(0), b"b": _image(1)})))
    images = store.read_many(["b", "gone", "a", "b"])
    assert [images[0], images[2], images[3]] == [_image(1), _image(0), _image(1)]
    assert isinstance(images[1], BadImage)
    assert "no longer in the LMDB" in images[1].reason


def test_threads_that_come_first_at_the_same_time_share_one_environment(tmp_path: Path) -> None:
    store = LmdbStore(str(_write(tmp_path / "x", {b"a": _image(5)})))
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(store.read, ["a"] * 64)) == {_image(5)}


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF"])
def test_what_can_be_decoded_begins_like_an_image(file_format: str) -> None:
    file = BytesIO()
    Image.new("RGB", (12, 16)).save(file, file_format)
    assert decode_image(file.getvalue()).shape == (16, 12, 3)
    assert begins_like_an_image(file.getvalue()[:12])


def test_the_fingerprint_ignores_where_the_environment_lies(tmp_path: Path) -> None:
    here, there = (read_lmdb(LmdbSource(path=_write(tmp_path / name, {b"a": _image(0)}))) for name in ("x", "y"))
    assert here.fingerprint() == there.fingerprint()


def test_what_is_no_lmdb_is_explained(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_bytes(b"no pages here" * 1000)
    with pytest.raises(UserError, match=r"nowhere: no such LMDB folder or file"):
        read_lmdb(LmdbSource(path=tmp_path / "nowhere"))
    for name in ("empty", "text"):
        with pytest.raises(UserError, match=rf"{name}: not an LMDB: .*; expected a folder with data.mdb"):
            read_lmdb(LmdbSource(path=tmp_path / name))


def test_an_environment_without_keys_or_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x: no key in it"):
        read_lmdb(LmdbSource(path=_write(tmp_path / "x", {})))
    with pytest.raises(UserError, match="y: none of 2 values is an encoded image; expected"):
        read_lmdb(LmdbSource(path=_write(tmp_path / "y", {b"a": b"1", b"b": b"2"})))


def test_a_file_that_was_cut_off_is_refused_before_it_is_read(tmp_path: Path) -> None:
    _write(tmp_path / "x", {str(number).encode(): bytes(9000) for number in range(20)})
    data = tmp_path / "x" / "data.mdb"
    data.write_bytes(data.read_bytes()[: 1 << 16])
    with pytest.raises(UserError, match=r"data\.mdb: cut off: 65536 bytes of \d+; copy it again"):
        read_lmdb(LmdbSource(path=tmp_path / "x"))


def test_a_bucket_is_refused_and_the_library_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"s3://bucket/lup: an LMDB is mapped .*; copy it to a disk, or pack"):
        read_lmdb(LmdbSource(path="s3://bucket/lup"))
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(UserError, match=r"pip install lmdb"):
        read_lmdb(LmdbSource(path=tmp_path))


@pytest.mark.parametrize("fill", ["zeros", "noise"])
@pytest.mark.parametrize("subdir", [True, False])
def test_a_damaged_page_is_told_and_does_not_end_this_process(tmp_path: Path, fill: str, subdir: bool) -> None:
    path = _write(tmp_path / "x", {f"{n:06d}".encode(): _image(n % 250) for n in range(2000)}, subdir=subdir)
    data = path / "data.mdb" if subdir else path
    whole, page_bytes = data.read_bytes(), 4096
    rng = np.random.default_rng(0)
    damaged = bytearray(whole)
    for page in rng.choice(np.arange(2, len(whole) // page_bytes), 20, replace=False):
        content = bytes(page_bytes) if fill == "zeros" else rng.bytes(page_bytes)
        damaged[page * page_bytes : (page + 1) * page_bytes] = content
    data.write_bytes(damaged)
    with pytest.raises(UserError, match=r"x: damaged: .*; copy it again$"):
        read_lmdb(LmdbSource(path=path))
