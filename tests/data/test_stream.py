import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from passreid_ray.data import stream as stream_module
from passreid_ray.data.execution import DataShare
from passreid_ray.data.folder import FolderSource, read_folder
from passreid_ray.data.order import EpochOrder
from passreid_ray.data.parquet import ParquetSource, read_parquet
from passreid_ray.data.rows import Rows
from passreid_ray.data.stream import EncodedStream, Stream, read_batch
from passreid_ray.data.streamed_order import RowGroups, StreamedOrder
from passreid_ray.errors import UserError
from tests.data.pictures import write_images

Batch = dict[str, np.ndarray]
ORDER = EpochOrder(num_rows=14, batch_size=6, seed=3)
BAD = {"02.png": "empty", "05.png": "empty", "09.png": "empty"}


def mark(image_HWC: np.ndarray, draw: int, image_id: str) -> Batch:
    """What was asked for, as numbers: which image, which draw of its views."""
    return {"red": image_HWC[0, 0, :1], "draw": np.array(draw), "name": np.array(int(image_id[:2]))}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """14 images that tell their number, three of them empty files."""
    root = write_images(tmp_path_factory.mktemp("images"), [f"{number:02d}.png" for number in range(14)])
    for name in BAD:
        (root / name).write_bytes(b"")
    return read_folder(FolderSource(root=root))


def streamed(rows: Rows, start: int, end: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    stream = Stream(ray.put(rows), ORDER, mark, rank, world_size)
    return list(stream.batches(start, end, DataShare(cpus=2)))


def assert_equal(got: list[Batch], expected: list[Batch]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected, strict=True):
        assert one.keys() == other.keys()
        assert all(np.array_equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def alone(cluster: None, rows: Rows) -> list[Batch]:
    """The batches of steps 0 to 4 (two epochs and a half) for one worker."""
    return streamed(rows, 0, 5)


def test_without_a_cpu_for_tasks_the_worker_itself_makes_the_same_batches(rows: Rows, alone: list[Batch]) -> None:
    share = DataShare(cpus=1, has_cpu=False)
    assert_equal(list(Stream(ray.put(rows), ORDER, mark, 0, 1).batches(0, 5, share)), alone)
    encoded = EncodedStream(ray.put(rows), ORDER, 0, 1)
    here = [table.to_pydict() for table in encoded.batches(0, 5, share)]
    assert here == [table.to_pydict() for table in encoded.batches(0, 5, DataShare(cpus=2))]


def test_a_stream_yields_the_images_of_the_order_and_says_which_were_bad(rows: Rows, alone: list[Batch]) -> None:
    for step, batch in enumerate(alone):
        draws, numbers = ORDER.batch(step)
        assert np.array_equal(batch["draw"], draws)
        assert np.array_equal(batch["red"][:, 0], batch["name"])
        for number, name, bad in zip(numbers, batch["name"], batch["bad"], strict=True):
            failed = [image_id for image_id, _ in json.loads(bad or "[]")]
            assert failed[:1] == ([rows.image_ids[number]] if rows.image_ids[number] in BAD else [])
            assert f"{name:02d}.png" not in BAD
    named = {image_id for batch in alone for bad in batch["bad"] if bad for image_id, _ in json.loads(bad)}
    assert named == BAD.keys()


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_batches_of_several_workers_together_are_those_of_one(
    rows: Rows, alone: list[Batch], world_size: int
) -> None:
    shares = [streamed(rows, 0, 5, rank, world_size) for rank in range(world_size)]
    steps = zip(*shares, strict=True)
    together = [{name: np.concatenate([own[name] for own in step]) for name in step[0]} for step in steps]
    assert_equal(together, alone)


def test_a_stream_opened_at_a_step_goes_on_exactly(rows: Rows, alone: list[Batch]) -> None:
    assert_equal(streamed(rows, 3, 5), alone[3:])


def test_a_run_longer_than_one_execution_has_no_seam(
    rows: Rows, alone: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream_module, "TASKS_PER_EXECUTION", 2)
    assert_equal(streamed(rows, 0, 5), alone)


def test_a_stream_without_steps_is_empty(cluster: None, rows: Rows) -> None:
    assert streamed(rows, 5, 5) == []


def test_a_batch_made_in_this_process_is_the_streamed_one(rows: Rows, alone: list[Batch]) -> None:
    assert_equal([read_batch(rows, ORDER, step, mark) for step in range(5)], alone)


def test_a_substitute_is_the_next_good_row_of_the_epoch(rows: Rows) -> None:
    sequence = np.random.default_rng([3, 0]).permutation(14).tolist()  # the order, by its definition
    expected = []
    for position in range(6):
        while f"{sequence[position % 14]:02d}.png" in BAD:
            position += 1
        expected.append(sequence[position % 14])
    assert read_batch(rows, ORDER, 0, mark)["name"].tolist() == expected


def test_when_nothing_can_be_read_the_first_image_is_named(tmp_path: Path) -> None:
    root = write_images(tmp_path, ["a.png", "b.png"])
    rows = read_folder(FolderSource(root=root))
    for name in ("a.png", "b.png"):
        (root / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"data: 2 images in a row cannot be used, the first: [ab]\.png: empty"):
        read_batch(rows, EpochOrder(2, 1, 0), 0, mark)


@pytest.fixture(scope="module")
def packed(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The same images in row groups of four."""
    path = tmp_path_factory.mktemp("packed") / "images.parquet"
    columns = {"image_id": rows.image_ids, "image": [rows.image_bytes(index) for index in range(len(rows))]}
    pq.write_table(pa.table(columns), path, row_group_size=4)
    return read_parquet(ParquetSource(path=str(path)))


def encoded(rows: Rows, start: int, end: int, rank: int = 0, world_size: int = 1) -> list[pa.Table]:
    order = StreamedOrder(RowGroups(rows.group_starts, len(rows)), 6, 3, num_streams=3, window_rows=4)
    return list(EncodedStream(ray.put(rows), order, rank, world_size).batches(start, end, DataShare(cpus=2)))


def joined(shares: list[list[pa.Table]]) -> list[dict[str, Any]]:
    return [pa.concat_tables(step).to_pydict() for step in zip(*shares, strict=True)]


@pytest.mark.parametrize("kind", ["rows", "packed"])
def test_encoded_batches_are_those_of_the_order_for_any_number_of_workers_and_from_any_step_on(
    cluster: None, kind: str, request: pytest.FixtureRequest
) -> None:
    rows: Rows = request.getfixturevalue(kind)
    alone = encoded(rows, 0, 5)
    order = StreamedOrder(RowGroups(rows.group_starts, len(rows)), 6, 3, num_streams=3, window_rows=4)
    for step, batch in enumerate(alone):
        draws, numbers = order.batch(step)
        assert batch["row"].to_pylist() == numbers.tolist()
        assert batch["draw"].to_pylist() == draws.tolist()
        assert batch["image_id"].to_pylist() == rows.image_ids[numbers].tolist()
        assert batch["image"].to_pylist() == [rows.image_bytes(number) for number in numbers]
    assert joined([encoded(rows, 1, 5, rank, 3) for rank in range(3)]) == joined([alone[1:]])


def test_an_image_that_cannot_be_read_comes_with_its_reason(cluster: None, tmp_path: Path) -> None:
    rows = read_folder(FolderSource(root=write_images(tmp_path, ["a.png", "b.png"])))
    (tmp_path / "b.png").unlink()
    (batch,) = EncodedStream(ray.put(rows), EpochOrder(2, 2, 0), 0, 1).batches(0, 1, DataShare(cpus=1))
    images = dict(zip(batch["image_id"].to_pylist(), batch.select(["image", "reason"]).to_pylist(), strict=True))
    assert images["a.png"] == {"image": (tmp_path / "a.png").read_bytes(), "reason": None}
    assert images["b.png"]["image"] is None
    assert "No such file" in images["b.png"]["reason"]
