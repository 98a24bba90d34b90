import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from passreid_ray.data.decode import BadImage
from passreid_ray.data.rows import Rows, join_rows, make_rows, ordered_rows
from passreid_ray.data.stores import FileStore
from passreid_ray.errors import UserError
from tests.data.pictures import write_images


def _rows(root: Path, paths: list[str] | None = None) -> Rows:
    paths = ["b.png", "c.png", "a.png"] if paths is None else paths
    write_images(root, paths)
    people: list[str | None] = ["2", None, "-1"]
    return make_rows(
        FileStore(str(root)),
        paths,
        where="test",
        person_ids=people,
        camera_ids=["1"] * 3,
        splits=["train", None, "query"],
    )


def test_rows_are_ordered_by_image_id_with_their_labels(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    assert len(rows) == 3
    assert rows.image_ids.tolist() == ["a.png", "b.png", "c.png"]
    assert rows.person_ids.tolist() == ["-1", "2", None]
    assert rows.splits.tolist() == ["query", "train", None]
    assert rows.camera_ids.tolist() == ["1", "1", "1"]


def test_a_row_leads_to_its_own_image(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    assert [int(rows.image(index)[0, 0, 0]) for index in range(3)] == [2, 0, 1]
    assert rows.image_bytes(0) == (tmp_path / "a.png").read_bytes()


def test_select_takes_positions_in_their_order_and_masks(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    assert rows.select([2, 0]).image_ids.tolist() == ["c.png", "a.png"]
    assert rows.select(np.array([False, True, True])).image_ids.tolist() == ["b.png", "c.png"]
    assert len(rows.select([])) == 0
    assert int(rows.select([2, 0]).image(1)[0, 0, 0]) == 2


def test_with_split_keeps_the_named_splits(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    assert rows.with_split("train").image_ids.tolist() == ["b.png"]
    assert rows.with_split("train", "query").image_ids.tolist() == ["a.png", "b.png"]


def test_an_unknown_split_names_the_splits_found(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'gallery'; splits found: query, train"):
        _rows(tmp_path).with_split("train", "gallery")


def test_rows_travel_by_pickle_and_leave_cached_columns_behind(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    size = len(pickle.dumps(rows))
    _ = rows.image_ids, rows.person_ids
    assert len(pickle.dumps(rows)) == size
    copy = pickle.loads(pickle.dumps(rows))
    assert copy == rows
    assert int(copy.image(0)[0, 0, 0]) == 2


def test_the_fingerprint_ignores_where_the_files_lie(tmp_path: Path) -> None:
    assert _rows(tmp_path / "here").fingerprint() == _rows(tmp_path / "there").fingerprint()


def test_the_fingerprint_tells_other_rows(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    renamed = _rows(tmp_path, ["b.png", "c.png", "d.png"])
    store = FileStore(str(tmp_path))
    fingerprints = {
        rows.fingerprint(),
        rows.select([0, 1]).fingerprint(),
        rows.select([1, 0, 2]).fingerprint(),
        renamed.fingerprint(),
        make_rows(store, ["ab", "c"], where="test").fingerprint(),
        make_rows(store, ["a", "bc"], where="test").fingerprint(),
        make_rows(store, ["a", "bc"], where="test", person_ids=["", None]).fingerprint(),
        make_rows(store, ["a", "bc"], where="test", person_ids=[None, ""]).fingerprint(),
    }
    assert len(fingerprints) == 8


def test_the_fingerprint_of_a_part_does_not_depend_on_how_it_was_cut(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    sliced = Rows(rows.table.slice(1, 2), rows.stores)
    assert sliced.fingerprint() == rows.select([1, 2]).fingerprint()


@pytest.mark.parametrize("ids", [["x", "y", "x"], ["x", "x", "y"], ["y", "x", "x", "x"], ["x", "x"]])
@pytest.mark.parametrize("keep_order", [False, True])
def test_repeated_image_ids_are_refused(tmp_path: Path, ids: list[str], keep_order: bool) -> None:
    store = FileStore(str(tmp_path))
    table = make_rows(store, [str(number) for number in range(len(ids))], where="here").table
    table = table.set_column(0, table.schema.field(0), pa.array(ids))
    with pytest.raises(UserError, match=r"there: 1 image ids are not unique, such as 'x'"):
        ordered_rows(table, (store,), where="there", keep_order=keep_order)


def test_a_source_may_keep_the_order_of_its_files(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    table = pa.concat_tables([rows.table.take([2, 0]), rows.table.slice(1, 1)])
    kept = ordered_rows(table, rows.stores, where="test", keep_order=True)
    assert kept == rows.select([2, 0, 1])
    assert [int(kept.image(index)[0, 0, 0]) for index in range(3)] == [1, 2, 0]
    assert ordered_rows(table, rows.stores, where="test") == rows


def test_columns_may_come_as_arrows_strings(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    ids, people, splits = (
        pa.chunked_array([c]) for c in (["b.png", "c.png", "a.png"], ["2", None, "-1"], ["train", None, "query"])
    )
    store = FileStore(str(tmp_path))
    cameras = ["1"] * 3
    assert make_rows(store, ids, where="test", person_ids=people, camera_ids=cameras, splits=splits) == rows


def test_a_name_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a valid Unicode name"):
        make_rows(FileStore(str(tmp_path)), ["\udcff.png"], where="there")


def test_a_file_that_went_away_is_a_bad_image(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    (tmp_path / "a.png").unlink()
    with pytest.raises(BadImage, match="cannot be read"):
        rows.image(0)
    with pytest.raises(BadImage, match="cannot be read"):
        rows.image_bytes(0)


def test_joined_sources_cannot_share_an_id(tmp_path: Path) -> None:
    joined = join_rows([_rows(tmp_path / "x"), _rows(tmp_path / "y")])
    assert joined.image_ids.tolist() == ["0:a.png", "0:b.png", "0:c.png", "1:a.png", "1:b.png", "1:c.png"]
    assert joined.person_ids.tolist() == ["-1", "0:2", None, "-1", "1:2", None]
    assert joined.camera_ids.tolist() == ["0:1"] * 3 + ["1:1"] * 3
    assert [int(joined.image(index)[0, 0, 0]) for index in range(6)] == [2, 0, 1, 2, 0, 1]


def test_joined_sources_follow_one_another_each_in_its_own_order(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    joined = join_rows([rows.select([2, 0, 1]), *[rows] * 10, join_rows([rows, rows.select([1])])])
    assert joined.image_ids[:3].tolist() == ["0:c.png", "0:a.png", "0:b.png"]
    assert joined.image_ids[27:].tolist() == [
        *("9:a.png", "9:b.png", "9:c.png", "10:a.png", "10:b.png", "10:c.png"),
        *("11:0:a.png", "11:0:b.png", "11:0:c.png", "11:1:b.png"),
    ]
    assert joined.table["store"].to_pylist() == [source for source in range(12) for _ in range(3)] + [12]
    assert joined.image_bytes(len(joined) - 1) == (tmp_path / "b.png").read_bytes()


def test_sizes_stay_with_their_rows_and_are_unknown_where_a_joined_source_has_none(tmp_path: Path) -> None:
    sized = make_rows(FileStore(str(tmp_path)), ["b", "a", "c"], where="test", sizes_bytes=[2, 1, 3])
    assert sized.select([2, 0]).table["size_bytes"].to_pylist() == [3, 1]
    joined = join_rows([_rows(tmp_path), sized])
    assert joined.table["size_bytes"].to_pylist() == [None, None, None, 1, 2, 3]
    resized = make_rows(FileStore(str(tmp_path)), ["b", "a", "c"], where="test", sizes_bytes=[2, 1, 4])
    assert joined.fingerprint() != join_rows([_rows(tmp_path), resized]).fingerprint()
    assert joined.fingerprint() != join_rows([sized, _rows(tmp_path)]).fingerprint()


def test_an_image_called_like_the_junk_label_is_told_apart_too(tmp_path: Path) -> None:
    rows = make_rows(FileStore(str(tmp_path)), ["-1"], where="test", camera_ids=["-1"], person_ids=["-1"])
    joined = join_rows([rows, rows])
    assert joined.image_ids.tolist() == ["0:-1", "1:-1"]
    assert joined.person_ids.tolist() == joined.camera_ids.tolist() == ["-1", "-1"]
    assert joined.splits.tolist() == [None, None]


def test_joined_rows_read_from_their_own_source(tmp_path: Path) -> None:
    first, second = _rows(tmp_path / "x"), _rows(tmp_path / "y")
    (tmp_path / "x" / "a.png").unlink()
    joined = join_rows([first, second])
    with pytest.raises(BadImage):
        joined.image(0)
    assert joined.image(3).shape == (16, 12, 3)


def test_a_single_source_keeps_its_ids(tmp_path: Path) -> None:
    rows = _rows(tmp_path)
    assert join_rows([rows]) == rows
