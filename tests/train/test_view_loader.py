from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from passreid_ray.data.decode import BadImage
from passreid_ray.data.folder import FolderSource, read_folder
from passreid_ray.data.order import EpochOrder
from passreid_ray.data.rows import Rows
from passreid_ray.data.stream import read_encoded
from passreid_ray.train.view_loader import ViewBatch, ViewMaker
from passreid_ray.views import PartViews, ViewsConfig, view_rng
from tests.data.pictures import write_images

CONFIG = ViewsConfig(global_size_px=(32, 16), local_size_px=(16, 8), local_views_per_part=1)
NAMES = [f"{number:02d}.jpg" for number in range(10)]
CPU = torch.device("cpu")


@pytest.fixture
def rows(tmp_path: Path) -> Rows:
    return read_folder(FolderSource(root=write_images(tmp_path, NAMES)))


def maker(rows: Rows, order: EpochOrder) -> ViewMaker:
    return ViewMaker(rows, order, CONFIG, seed=5, device=CPU)


def one_by_one(rows: Rows, draws: list[int], numbers: list[int]) -> dict[str, np.ndarray]:
    """The views of each image as ``PartViews`` makes them."""
    views = [
        PartViews(CONFIG).pixels(rows.image(number), view_rng(5, draw, rows.image_ids[number]))
        for draw, number in zip(draws, numbers, strict=True)
    ]
    return {name: np.stack([own[name] for own in views]) for name in ("global_views", "local_views")}


def assert_views(batch: ViewBatch, expected: dict[str, np.ndarray]) -> None:
    assert np.array_equal(batch.global_BGCHW.numpy(), expected["global_views"])
    assert np.array_equal(batch.local_BPLCHW.numpy(), expected["local_views"])


@pytest.mark.parametrize("threads", [1, 2])
def test_views_of_a_batch_are_those_of_its_images_one_by_one(rows: Rows, threads: int) -> None:
    order = EpochOrder(len(rows), 4, seed=1)
    steps = range(5)
    encoded = (table for step in steps for table in read_encoded(rows, order, range(step, step + 1)))
    batches = list(maker(rows, order).batches(encoded, threads))
    assert len(batches) == len(steps)
    for step, batch in zip(steps, batches, strict=True):
        draws, numbers = order.batch(step)
        assert_views(batch, one_by_one(rows, draws.tolist(), numbers.tolist()))
        assert batch.bad == []


@pytest.mark.parametrize("content", [b"", b"\xff\xd8\xff no image", None])
def test_an_image_that_cannot_be_used_is_replaced_as_the_order_says(
    rows: Rows, tmp_path: Path, content: bytes | None
) -> None:
    order = EpochOrder(len(rows), 4, seed=1)
    draws, numbers = (values.tolist() for values in order.batch(0))
    bad = tmp_path / str(rows.image_ids[numbers[1]])
    bad.unlink() if content is None else bad.write_bytes(content)
    with pytest.raises(BadImage) as error:
        rows.image(numbers[1])
    (table,) = read_encoded(rows, order, range(1))
    batch = maker(rows, order)(table)
    assert batch.bad == [(bad.name, error.value.reason)]
    numbers[1], draws[1] = order.substitute(0, numbers[1], 1), -1 - draws[1]
    assert_views(batch, one_by_one(rows, draws, numbers))


def test_a_bad_substitute_is_told_too(rows: Rows, tmp_path: Path) -> None:
    order = EpochOrder(len(rows), 4, seed=1)
    numbers = order.batch(0)[1].tolist()
    for number in (numbers[0], order.substitute(0, numbers[0], 1)):
        (tmp_path / str(rows.image_ids[number])).write_bytes(b"")
    (table,) = read_encoded(rows, order, range(1))
    assert isinstance(table, pa.Table)
    batch = maker(rows, order)(table)
    assert [reason for _, reason in batch.bad] == ["empty"] * len(batch.bad)
    assert len(batch.bad) in (2, 3)  # the second may be in the batch itself
