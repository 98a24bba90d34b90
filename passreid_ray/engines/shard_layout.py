"""Which rows of a source go into which shard, and about how large the shards get. Plain arithmetic."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from passreid_ray.data.manifest import Sidecar

LISTS_BYTES_PER_SHARD = 4096
"""Room for a shard's sidecar and its part of the manifest."""


@dataclass(frozen=True)
class ShardLayout:
    """How the rows of a source are cut into shards."""

    num_rows: int
    rows_per_shard: int
    bytes_per_row: float
    """Mean size of a few packed images."""

    @property
    def num_shards(self) -> int:
        """How many shards the rows make."""
        return -(-self.num_rows // self.rows_per_shard)

    def rows_of(self, number: int) -> slice:
        """Rows of the source that shard ``number`` is made of."""
        return slice(number * self.rows_per_shard, min((number + 1) * self.rows_per_shard, self.num_rows))

    def rows_left(self, finished: Collection[int]) -> int:
        """Rows of the shards that are not ``finished``."""
        owns = [self.rows_of(number) for number in finished]
        return self.num_rows - sum(own.stop - own.start for own in owns)

    def bytes_left(self, finished: Mapping[int, Sidecar]) -> float:
        """About how much is still to be written; the ``finished`` shards tell the size of a row, if there are some."""
        packed_rows = sum(sidecar.shard.rows for sidecar in finished.values())
        packed_bytes = sum(sidecar.shard.bytes for sidecar in finished.values())
        bytes_per_row = packed_bytes / packed_rows if packed_rows else self.bytes_per_row
        return bytes_per_row * self.rows_left(finished) + LISTS_BYTES_PER_SHARD * self.num_shards
