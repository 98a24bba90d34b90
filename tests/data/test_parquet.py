import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from passreid_ray.data.decode import BadImage
from passreid_ray.data.parquet import ParquetSource, read_parquet
from passreid_ray.errors import UserError
from tests.data.pictures import encoded
from tests.data.test_packed import write_packed


def _image(number: int) -> bytes:
    return encoded(np.full((16, 12, 3), number, np.uint8))


def _table(numbers: list[int]) -> pa.Table:
    return pa.table(
        {
            "image": [_image(number) for number in numbers],
            "image_id": [f"{number:03d}" for number in numbers],
            "person_id": [number // 2 for number in numbers],
            "camera_id": [f"c{number % 2}" for number in numbers],
            "split": ["train" if number < 6 else "query" for number in numbers],
        }
    )


def test_every_row_of_every_row_group_and_file_leads_to_its_image(tmp_path: Path) -> None:
    numbers = list(np.random.default_rng(0).permutation(23))
    (tmp_path / "deep").mkdir()
    pq.write_table(_table([int(n) for n in numbers[:13]]), tmp_path / "a.parquet", row_group_size=4)
    pq.write_table(_table([int(n) for n in numbers[13:]]), tmp_path / "deep" / "b.parquet", row_group_size=3)
    rows = pickle.loads(pickle.dumps(read_parquet(ParquetSource(path=tmp_path))))
    assert rows.image_ids.tolist() == [f"{number:03d}" for number in numbers]
    assert [int(rows.image(index)[0, 0, 0]) for index in range(23)] == numbers
    assert rows.image_bytes(5) == _image(int(numbers[5]))
    assert rows.person_ids.tolist() == [str(number // 2) for number in numbers]
    assert rows.camera_ids.tolist() == [f"c{number % 2}" for number in numbers]


def test_row_groups_stay_together_whatever_the_order_of_their_ids(tmp_path: Path) -> None:
    numbers = [int(number) for number in np.random.default_rng(0).permutation(23)]
    pq.write_table(_table(numbers[:13]), tmp_path / "a.parquet", row_group_size=4)
    pq.write_table(_table(numbers[13:]), tmp_path / "b.parquet", row_group_size=5)
    rows = read_parquet(ParquetSource(path=tmp_path))
    assert rows.group_starts.tolist() == [0, 4, 8, 12, 13, 18]


def test_one_file_and_a_split_filter(tmp_path: Path) -> None:
    pq.write_table(_table(list(range(8))), tmp_path / "a.parquet")
    rows = read_parquet(ParquetSource(path=tmp_path / "a.parquet", splits=["query"]))
    assert rows.image_ids.tolist() == ["006", "007"]
    assert int(rows.image(1)[0, 0, 0]) == 7


def test_columns_can_be_named_and_labels_be_absent(tmp_path: Path) -> None:
    table = pa.table({"jpg": [_image(1), _image(0)], "key": [11, 10], "who": ["x", None]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = ParquetSource(path=tmp_path, image_column="jpg", image_id_column="key", person_id_column="who")
    rows = read_parquet(source)
    assert rows.image_ids.tolist() == ["11", "10"]
    assert rows.person_ids.tolist() == ["x", None]
    assert rows.camera_ids.tolist() == rows.splits.tolist() == [None, None]
    assert int(rows.image(0)[0, 0, 0]) == 1


def test_images_may_be_structs_with_bytes(tmp_path: Path) -> None:
    images = [{"bytes": _image(3), "path": "a.png"}, {"bytes": None, "path": "b.png"}]
    pq.write_table(pa.table({"image": images, "image_id": ["a", "b"]}), tmp_path / "a.parquet")
    rows = read_parquet(ParquetSource(path=tmp_path))
    assert int(rows.image(0)[0, 0, 0]) == 3
    with pytest.raises(BadImage, match="empty"):
        rows.image(1)


def test_read_many_reads_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in (0, 1):
        pq.write_table(_table(list(range(10 * file, 10 * file + 10))), tmp_path / f"{file}.parquet", row_group_size=2)
    rows = read_parquet(ParquetSource(path=tmp_path))
    locators = rows.table["locator"].to_pylist()
    groups_read: list[int] = []
    read_row_group = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, i: int, **options: object) -> pa.Table:
        groups_read.append(i)
        return read_row_group(self, i, **options)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    order = [int(number) for number in np.random.default_rng(0).permutation(20)] + [3, 3]
    expected: list[bytes | BadImage] = [_image(number) for number in order]
    assert rows.stores[0].read_many([locators[index] for index in order]) == expected
    assert groups_read == [0, 1, 2, 3, 4] * 2


def test_a_file_that_went_away_is_an_entry_for_each_of_its_rows(tmp_path: Path) -> None:
    for file in (0, 1):
        pq.write_table(_table([2 * file, 2 * file + 1]), tmp_path / f"{file}.parquet")
    rows = read_parquet(ParquetSource(path=tmp_path))
    (tmp_path / "0.parquet").unlink()
    images = rows.stores[0].read_many(rows.table["locator"].to_pylist())
    assert [isinstance(image, BadImage) for image in images] == [True, True, False, False]
    assert images[2:] == [_image(2), _image(3)]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"picture": [b"x"], "image_id": ["a"]}, "no column 'image'; columns found: picture, image_id"),
        ({"image": [b"x"]}, "no column 'image_id'; columns found: image"),
        ({"image": ["a.jpg"], "image_id": ["a"]}, "column 'image' is string; expected encoded images as binary"),
        ({"image": [{"path": "a.jpg"}], "image_id": ["a"]}, "column 'image' is struct<path: string>; expected"),
        ({"image": [{"bytes": {"bytes": b"x"}}], "image_id": ["a"]}, "'image' is struct<bytes: struct<.*; expected"),
        (
            {"image": pa.StructArray.from_arrays([pa.array([1]), pa.array([b"x"])], ["bytes"] * 2), "image_id": ["a"]},
            "'image' is struct<bytes: int64, bytes: binary>; expected",
        ),
        ({"image": [b"x"], "image_id": pa.array([None], pa.string())}, "'image_id' holds nulls"),
        ({"image": [b"x", b"y"], "image_id": ["a", "a"]}, "1 image ids are not unique, such as 'a'"),
        ({"image": pa.array([], pa.binary()), "image_id": pa.array([], pa.string())}, "no row in 1 Parquet files"),
    ],
)
def test_a_wrong_schema_is_explained(tmp_path: Path, columns: dict[str, object], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=message):
        read_parquet(ParquetSource(path=tmp_path))


@pytest.mark.parametrize("repeated", ["image", "image_id", "person_id", "split"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, repeated: str) -> None:
    table = _table([0, 1])
    pq.write_table(table.append_column(repeated, table[repeated]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=rf"a\.parquet: 2 columns are called '{repeated}'; give each a name of its own"):
        read_parquet(ParquetSource(path=tmp_path))


def test_an_image_column_that_was_repeated_since_it_was_listed_is_refused(tmp_path: Path) -> None:
    pq.write_table(_table([0, 1]), tmp_path / "a.parquet")
    rows = read_parquet(ParquetSource(path=tmp_path))
    pq.write_table(_table([0, 1]).append_column("image", _table([2, 3])["image"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match="2 columns are called 'image'"):
        rows.image_bytes(0)


def test_no_files_and_broken_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.parquet file"):
        read_parquet(ParquetSource(path=tmp_path))
    with pytest.raises(UserError, match="no such Parquet file or folder"):
        read_parquet(ParquetSource(path=tmp_path / "nowhere"))
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(UserError, match=r"a\.parquet: not a readable Parquet file"):
        read_parquet(ParquetSource(path=tmp_path))


def test_a_file_that_breaks_later_is_a_bad_image(tmp_path: Path) -> None:
    pq.write_table(_table(list(range(8))), tmp_path / "a.parquet", row_group_size=2)
    rows = read_parquet(ParquetSource(path=tmp_path))
    assert rows.image(0).shape == (16, 12, 3)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(BadImage, match="cannot be read"):
        rows.image(7)


def test_an_edited_label_of_a_packed_shard_is_told_as_an_edited_image_is(tmp_path: Path) -> None:
    manifest = write_packed(tmp_path)
    path = tmp_path / manifest.shards[1].file
    content = path.read_bytes()
    assert read_parquet(ParquetSource(path=tmp_path)).image_ids[6] == "0010"
    path.write_bytes(content.replace(b"0012", b"0099", 1))
    said = r"00001\.parquet: .* was edited or damaged since it was packed .*; delete this shard and pack again"
    with pytest.raises(UserError, match=said):
        read_parquet(ParquetSource(path=tmp_path))
    path.write_bytes(content)
    rows = read_parquet(ParquetSource(path=tmp_path))
    path.write_bytes(content.replace(b"image 10", b"image 99", 1))
    with pytest.raises(UserError, match=said):
        rows.image_bytes(6)
