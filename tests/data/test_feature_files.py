"""Feature files are whole or absent, come back in the order they promise, and wrong ones are told."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from passreid_ray.data.feature_files import MIN_SHARDS, SHARD_ROWS, FeatureFiles, read_features
from passreid_ray.errors import UserError


def filled(files: FeatureFiles, rows: slice) -> None:
    ids = [f"i{number:05d}" for number in range(rows.start, rows.stop)]
    features = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] + np.array([0.0, 0.5], np.float32)
    files.write(rows, ids, features, [None] * len(ids))


def test_written_shards_are_not_missing_and_read_gives_all_rows_in_order(tmp_path: Path) -> None:
    files = FeatureFiles(str(tmp_path / "features"), 50)
    shards = files.shards()
    assert len(shards) >= MIN_SHARDS - 3
    for rows in reversed(shards[1:]):
        filled(files, rows)
    assert files.missing() == [shards[0]]
    filled(files, shards[0])
    assert files.missing() == []
    found = files.read()
    assert list(found.image_ids) == [f"i{number:05d}" for number in range(50)]
    assert np.array_equal(found.features_ND, np.arange(50, dtype=np.float32)[:, None] + np.array([0.0, 0.5]))
    assert found.usable_N.all()


def test_shards_of_rows_that_are_not_in_the_order_of_image_id_are_read_in_that_of_the_rows(tmp_path: Path) -> None:
    files = FeatureFiles(str(tmp_path), 20)
    ids = [f"i{number}" for number in np.random.default_rng(0).permutation(20)]
    for rows in files.shards():
        values = np.array([[int(name[1:])] for name in ids[rows]], np.float32)
        files.write(rows, ids[rows], values, [None] * len(values))
    found = files.read()
    assert found.image_ids.tolist() == ids
    assert found.features_ND[:, 0].tolist() == [int(name[1:]) for name in ids]


def test_large_data_has_shards_of_a_fixed_size() -> None:
    assert {rows.stop - rows.start for rows in FeatureFiles("x", 20 * SHARD_ROWS).shards()} == {SHARD_ROWS}


def test_an_unusable_image_is_nan_with_its_reason(tmp_path: Path) -> None:
    files = FeatureFiles(str(tmp_path), 3)
    for rows in files.shards():
        ids = [f"i{number}" for number in range(rows.start, rows.stop)]
        bad = ["cut short" if name == "i1" else None for name in ids]
        files.write(rows, ids, np.ones((len(ids), 4), np.float32), bad)
    found = files.read()
    assert list(found.usable_N) == [True, False, True]
    assert found.reasons == {"i1": "cut short"}
    assert np.isnan(found.features_ND[1]).all()


def test_a_feature_that_is_not_finite_is_kept_as_it_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image_id": ["a", "b"], "feature": [[1.0], [float("nan")]]}), tmp_path / "mine.parquet")
    found = read_features(str(tmp_path))
    assert found.usable_N.all()
    assert np.isnan(found.features_ND[1, 0])


def test_a_half_written_shard_does_not_count(tmp_path: Path) -> None:
    files = FeatureFiles(str(tmp_path), 4)
    rows = files.shards()[0]
    filled(files, rows)
    whole = next(tmp_path.glob("*.parquet"))
    whole.rename(f"{whole}.part")
    assert files.missing() == files.shards()


@pytest.mark.parametrize("kind", [pa.list_(pa.float64()), pa.list_(pa.float32(), 2), pa.large_list(pa.float16())])
def test_any_list_of_numbers_from_elsewhere_is_read_and_sorted(tmp_path: Path, kind: pa.DataType) -> None:
    values = pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]).cast(kind)
    table = pa.table({"image_id": [7, 3, 5], "feature": values, "camera_id": [1, 2, 1], "other": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "mine.parquet")
    found = read_features(str(tmp_path / "mine.parquet"))
    assert list(found.image_ids) == ["3", "5", "7"]
    assert found.features_ND.tolist() == [[3, 4], [5, 6], [1, 2]]
    assert found.camera_ids is not None
    assert list(found.camera_ids) == ["2", "1", "1"]
    assert found.person_ids is None


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image_id": ["a", "a"], "feature": [[1.0], [2.0]]}, "not unique, such as 'a'"),
        ({"image_id": ["a", "b"], "feature": [[1.0], [2.0, 3.0]]}, "1, 2 wide"),
        ({"image_id": ["a", "b"], "feature": [1.0, 2.0]}, "expected a list"),
        ({"image_id": ["a", "b"]}, "no column 'feature'"),
        ({"feature": [[1.0], [2.0]]}, "no column 'image_id'"),
    ],
)
def test_a_wrong_file_is_told(tmp_path: Path, columns: dict[str, list[object]], message: str) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table(columns), path)
    with pytest.raises(UserError, match=message):
        read_features(str(path))


@pytest.mark.parametrize("repeated", ["image_id", "feature", "reason", "camera_id"])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, repeated: str) -> None:
    table = pa.table({"image_id": ["a"], "feature": [[1.0]], "reason": ["x"], "camera_id": ["c"]})
    pq.write_table(table.append_column(repeated, table[repeated]), tmp_path / "mine.parquet")
    with pytest.raises(UserError, match=rf"mine\.parquet: 2 columns are called '{repeated}'; give each"):
        read_features(str(tmp_path / "mine.parquet"))


def test_no_file_and_no_parquet_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such feature file"):
        read_features(str(tmp_path / "absent"))
    with pytest.raises(UserError, match=r"no \*.parquet"):
        read_features(str(tmp_path))
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_features(str(tmp_path))
