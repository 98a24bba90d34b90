"""Pre-training from every kind of storage: the same losses, and damage that is told."""

import shutil
from pathlib import Path
from typing import Any

import lmdb
import pytest

from passreid_ray.config import build
from passreid_ray.data import Rows, open_rows
from passreid_ray.data.parquet import ParquetSource
from passreid_ray.engines import pack, pretrain
from passreid_ray.engines.pack import PackConfig
from passreid_ray.errors import UserError
from tests.engines.killing import losses
from tests.engines.micro import IN_PROCESS, STEPS_PER_EPOCH, micro_config

STREAMS = {"streams": 4, "window_rows": 8}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """The synthetic people of the micro run."""
    return open_rows(micro_config(tmp_path_factory.mktemp("rows")).data)


@pytest.fixture(scope="module")
def folder(rows: Rows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    for number, image_id in enumerate(rows.image_ids):
        path = root / image_id
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(rows.image_bytes(number))
    return root


def packed(folder: Path, output: Path) -> Path:
    pack.run(build(PackConfig, {"data": {"kind": "folder", "root": str(folder)}, "output": str(output)}))
    return output


def trained(output: Path, data: dict[str, Any], **changes: Any) -> dict[int, float]:
    config = micro_config(output, data=data, evaluation={}, epochs=2, order=STREAMS, workers=IN_PROCESS, **changes)
    return losses(pretrain.run(config))


def test_a_folder_an_lmdb_and_packed_shards_of_the_same_images_give_the_same_losses(
    cluster: None, rows: Rows, folder: Path, tmp_path: Path
) -> None:
    with lmdb.open(str(tmp_path / "lmdb"), map_size=2**26) as environment, environment.begin(write=True) as writer:
        for number, image_id in enumerate(rows.image_ids):
            writer.put(str(image_id).encode(), rows.image_bytes(number))
    expected = trained(tmp_path / "from_folder", {"kind": "folder", "root": str(folder)})
    assert len(expected) == 2 * STEPS_PER_EPOCH
    assert trained(tmp_path / "from_lmdb", {"kind": "lmdb", "path": str(tmp_path / "lmdb")}) == expected
    shards = packed(folder, tmp_path / "packed")
    assert trained(tmp_path / "from_packed", {"kind": "parquet", "path": str(shards)}) == expected


def test_a_shard_edited_since_it_was_packed_stops_the_run_with_its_name(
    cluster: None, folder: Path, tmp_path: Path
) -> None:
    shards = packed(folder, tmp_path / "packed")
    (shard,) = shards.glob("*.parquet")
    content = bytearray(shard.read_bytes())
    middle = len(content) // 3  # in the images
    content[middle] ^= 255
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-00000\.parquet: row group 0 was edited or damaged since it was packed"):
        trained(tmp_path, {"kind": "parquet", "path": str(shards)})


def test_a_shard_that_is_missing_or_cut_short_is_told_before_anything_starts(
    cluster: None, folder: Path, tmp_path: Path
) -> None:
    shards = packed(folder, tmp_path / "packed")
    (shard,) = shards.glob("*.parquet")
    data = {"kind": "parquet", "path": str(shards)}
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"shard-00000\.parquet"):
        trained(tmp_path, data)
    shard.unlink()
    with pytest.raises(UserError, match=r"shard-00000\.parquet is missing"):
        trained(tmp_path, data)
    assert not (tmp_path / "pretrain").exists()


def test_packed_shards_of_other_images_are_other_data(cluster: None, folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    same, other = packed(copy, tmp_path / "same"), tmp_path / "other"
    image = next(copy.rglob("*.jpg"))
    image.write_bytes(image.read_bytes() + b" ")  # the same name, other bytes
    packed(copy, other)
    fingerprints = [
        open_rows(ParquetSource(path=path)).fingerprint() for path in (packed(folder, tmp_path / "a"), same)
    ]
    assert fingerprints[0] == fingerprints[1] != open_rows(ParquetSource(path=other)).fingerprint()


def test_workers_that_cannot_share_the_streams_are_told_before_anything_starts(tmp_path: Path) -> None:
    config = micro_config(tmp_path, order={"streams": 4}, workers={"num_workers": 8})
    with pytest.raises(UserError, match="8 workers cannot share 4 streams of data alike"):
        pretrain.run(config)
    assert not config.run.folder.exists()
