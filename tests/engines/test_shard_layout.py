"""Which rows are in which shard, against cutting a list."""

import pytest

from passreid_ray.data.manifest import Shard, Sidecar
from passreid_ray.engines.shard_layout import LISTS_BYTES_PER_SHARD, ShardLayout


def _sidecar(rows: int, size: int) -> Sidecar:
    shard = Shard(
        file="shard-00000.parquet", rows=rows, row_groups=[rows], bytes=size, sha256="0" * 64, content="0" * 64
    )
    return Sidecar(settings="s", shard=shard, bad=[])


@pytest.mark.parametrize(("num_rows", "num_shards"), [(1, 1), (16, 1), (17, 2), (40, 3)])
def test_shards_cut_the_rows_into_runs_of_one_length(num_rows: int, num_shards: int) -> None:
    layout = ShardLayout(num_rows, 16, 1.0)
    assert layout.num_shards == num_shards
    rows = list(range(num_rows))
    assert [rows[layout.rows_of(number)] for number in range(num_shards)] == [
        rows[start : start + 16] for start in range(0, num_rows, 16)
    ]


def test_rows_left_are_those_of_the_other_shards() -> None:
    layout = ShardLayout(40, 16, 1.0)
    assert [layout.rows_left(done) for done in ([], [0], [2], [0, 1, 2])] == [40, 24, 32, 0]


def test_bytes_left_follow_the_sample_until_shards_tell_better() -> None:
    layout = ShardLayout(40, 16, 100.0)
    lists = 3 * LISTS_BYTES_PER_SHARD
    assert layout.bytes_left({}) == 4000 + lists
    assert layout.bytes_left({0: _sidecar(15, 3000)}) == 200 * 24 + lists
    assert layout.bytes_left({0: _sidecar(0, 500)}) == 100 * 24 + lists  # all its images were bad
