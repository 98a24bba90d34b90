"""What a packed data set says of itself: ``manifest.json``, and beside every shard a sidecar.

A folder of shards is whole when ``manifest.json`` is there, for it is written last.
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from passreid_ray.errors import UserError

MANIFEST_FILE = "manifest.json"
CLAIM_FILE = "pack.json"
"""Written first: which data and settings the folder is for."""

Count = Annotated[int, Field(ge=0)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
ShardName = Annotated[str, Field(pattern=r"^shard-\d{5,}\.parquet$")]
"""Nothing else is ever joined to a path."""


class Record(BaseModel):
    """A part of what is written as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Shard(Record):
    """One Parquet file."""

    file: ShardName
    rows: Count
    row_groups: list[Count]
    """Rows of each row group."""
    bytes: Count
    """Size of the file."""
    sha256: Digest
    """Of the file."""
    content: Digest
    """Of image_id, labels and the image's SHA-256 of every row; the same for the same rows, however they are stored."""

    @model_validator(mode="after")
    def _check_rows(self) -> Self:
        if sum(self.row_groups) != self.rows:
            raise ValueError(f"{self.file}: its row groups hold {sum(self.row_groups)} rows, not {self.rows}")
        return self


class BadRow(Record):
    """An image that was left out."""

    row: Count
    """Number among the rows of the source."""
    image_id: str
    reason: str


class Sidecar(Record):
    """What is known of a finished shard; lies beside it."""

    settings: str
    """Digest of the settings and the data that the shard was made with."""
    shard: Shard
    bad: list[BadRow]


class Manifest(Record):
    """What a packed data set holds."""

    format: Literal[1] = 1
    rows: Count
    bytes: Count
    """Size of all shards."""
    num_identities: Count
    num_cameras: Count
    rows_per_group: Annotated[int, Field(ge=1)]
    """Most rows of a row group. The last of a shard has fewer, and so has one of large images."""
    shards: list[Shard]
    fingerprint: Digest
    """Of all content; does not depend on when or where the shards were written."""
    num_bad: Count
    """Rows of the source that are left out because their image cannot be used; see quarantine.jsonl."""
    num_duplicates: Count
    """Rows of the source that are left out because an earlier one has the same bytes."""
    settings: dict[str, Any]
    """Settings of the job that wrote it."""

    @model_validator(mode="after")
    def _check_sums(self) -> Self:
        for name in ("rows", "bytes"):
            found = sum(getattr(shard, name) for shard in self.shards)
            if found != getattr(self, name):
                raise ValueError(f"the shards sum up to {found} {name}, not {getattr(self, name)}")
        if fingerprint_of(self.shards) != self.fingerprint:
            raise ValueError("the fingerprint is not that of the shards")
        return self


def fingerprint_of(shards: Iterable[Shard]) -> str:
    """Fingerprint of the content of ``shards``, in their order."""
    return hashlib.sha256("\n".join(shard.content for shard in shards).encode()).hexdigest()


def parse_manifest(content: bytes, where: str) -> Manifest:
    """The manifest that ``content`` holds; ``UserError`` with the place ``where`` when it is damaged."""
    try:
        return Manifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{where}: damaged: {f'{place}: ' if place else ''}{first['msg']}; "
            "delete it and pack again, finished shards are kept"
        ) from None


def parse_sidecar(content: bytes) -> Sidecar | None:
    """The sidecar that ``content`` holds; None when it is damaged, then the shard counts as not there."""
    try:
        return Sidecar.model_validate_json(content)
    except ValidationError:
        return None
