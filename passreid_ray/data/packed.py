"""Packed data: Parquet shards of encoded images with their labels and hashes, written whole or not at all.

``shard-00000.parquet`` holds the columns of ``SCHEMA`` in row groups of one size; ``shard-00000.json`` beside it says
that it is whole. Other programs read the shards as any Parquet file.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from passreid_ray.data.manifest import CLAIM_FILE, MANIFEST_FILE, Manifest, Shard, parse_manifest
from passreid_ray.data.storage import address_of, explained
from passreid_ray.errors import UserError

SCHEMA = pa.schema(
    [
        pa.field("image_id", pa.string(), nullable=False),
        ("person_id", pa.string()),
        ("camera_id", pa.string()),
        ("split", pa.string()),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),  # of the upright image
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.binary(32), nullable=False),  # of the column image
        pa.field("dhash", pa.uint64(), nullable=False),  # see image_hash.difference_hash
    ]
)
LABELS = ("image_id", "person_id", "camera_id", "split")
DRAFT = re.compile(r"(shard-\d{5,}\.(parquet|json)|[a-z]+\.(json|jsonl|npy))\.[0-9a-f]{8}\.part")
"""Names of what is being written; nothing else is ever deleted as a draft."""
COLUMNS_WITH_DICTIONARY: Any = [*LABELS[1:]]
COLUMNS_WITH_STATISTICS: Any = [*LABELS]
PAGE_CHECK_ROWS = 16
"""The writer looks after so many rows whether a page is full, lest large images make a page above 2 GB."""
CHUNK_BYTES = 2**20
VERIFY_THREADS = 4
NUM_NAMED = 3


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"shard-{number:05d}.parquet"


def sidecar_name(number: int) -> str:
    """File name of a shard's sidecar."""
    return f"shard-{number:05d}.json"


def write_shard(filesystem: pafs.FileSystem, root: str, name: str, groups: Iterable[pa.Table]) -> Shard:
    """Write the tables ``groups``, of columns ``SCHEMA``, as the row groups of a shard below ``root``.

    One table is in memory at a time. Readers see the whole shard or none: when anything is raised, here or by
    ``groups``, the beginning is removed and a shard that was there stays.
    """
    draft = _draft_of(f"{root}/{name}")
    content, row_groups = hashlib.sha256(), []
    try:
        with filesystem.open_output_stream(draft) as stream:
            counted = _CountedStream(stream)
            writer = pq.ParquetWriter(
                counted,
                SCHEMA,
                compression="none",  # encoded images do not shrink
                use_dictionary=COLUMNS_WITH_DICTIONARY,
                write_statistics=COLUMNS_WITH_STATISTICS,
                write_page_checksum=True,
                write_batch_size=PAGE_CHECK_ROWS,
            )
            try:
                for table in groups:
                    writer.write_table(table, row_group_size=len(table))
                    row_groups.append(len(table))
                    content.update(_content(table))
                writer.close()
            except BaseException:
                # Else it writes the end of the file whenever it is collected, on a disk that is full.
                counted.is_given_up = True
                with suppress(OSError, pa.ArrowException):
                    writer.close()
                raise
        filesystem.move(draft, f"{root}/{name}")
    except BaseException:
        with suppress(OSError):
            filesystem.delete_file(draft)
        raise
    return Shard(
        file=name,
        rows=sum(row_groups),
        row_groups=row_groups,
        bytes=counted.size,
        sha256=counted.sha256.hexdigest(),
        content=content.hexdigest(),
    )


def write_whole(filesystem: pafs.FileSystem, path: str, content: bytes) -> None:
    """Write a small file; readers see all of it or what was there before."""
    draft = _draft_of(path)
    try:
        with filesystem.open_output_stream(draft) as stream:
            stream.write(content)
        filesystem.move(draft, path)
    except BaseException:
        with suppress(OSError):
            filesystem.delete_file(draft)
        raise


def read_file(filesystem: pafs.FileSystem, path: str) -> bytes:
    """Content of a small file."""
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def read_manifest(filesystem: pafs.FileSystem, path: str) -> Manifest | None:
    """Manifest of the folder ``path``; None when it is not a packed data set, such as Parquet files of other origin.

    Raises ``UserError`` when the manifest is damaged or cannot be read, or when the job that packs the folder has not
    finished.
    """
    where = address_of(filesystem, path)
    with explained(where):
        manifest, claim = filesystem.get_file_info([f"{path}/{MANIFEST_FILE}", f"{path}/{CLAIM_FILE}"])
        content = read_file(filesystem, manifest.path) if manifest.type == pafs.FileType.File else None
    if content is not None:
        return parse_manifest(content, f"{where}/{MANIFEST_FILE}")
    if claim.type == pafs.FileType.File:
        raise UserError(
            f"{where}: holds {CLAIM_FILE} but no {MANIFEST_FILE}: it is not packed to its end; run the packing job "
            "again, it goes on from the finished shards"
        )
    return None


def check_shards(manifest: Manifest, filesystem: pafs.FileSystem, path: str, *, verify: bool = False) -> None:
    """Raise ``UserError`` that names the first few shards of folder ``path`` that are not as ``manifest`` says.

    Looks at sizes only, in one listing of the folder; ``verify`` also reads every shard and compares its SHA-256.
    Raises ``UserError`` too when the folder or a shard cannot be read.
    """
    where = address_of(filesystem, path)
    with explained(where):
        wrong = _wrong_shards(manifest, filesystem, path, verify=verify)
    if wrong:
        first = ", ".join(wrong[:NUM_NAMED]) + (", ..." if len(wrong) > NUM_NAMED else "")
        raise UserError(
            f"{where}: {len(wrong)} of {len(manifest.shards)} shards are not as {MANIFEST_FILE} says: {first}; "
            "copy them again, or delete them with their .json files and run the packing job again"
        )


def _wrong_shards(manifest: Manifest, filesystem: pafs.FileSystem, path: str, *, verify: bool) -> list[str]:
    entries = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True))
    sizes = {entry.base_name: entry.size for entry in entries if entry.type == pafs.FileType.File}
    wrong = [f"{shard.file} {fault}" for shard in manifest.shards if (fault := _fault(shard, sizes.get(shard.file)))]
    if not wrong and verify:
        with ThreadPoolExecutor(VERIFY_THREADS) as pool:
            found = pool.map(lambda shard: _sha256(filesystem, f"{path}/{shard.file}"), manifest.shards)
            wrong = [
                f"{shard.file} was edited or damaged (its SHA-256 is another)"
                for shard, digest in zip(manifest.shards, found, strict=True)
                if digest != shard.sha256
            ]
    return wrong


def _draft_of(path: str) -> str:
    # Each attempt has its own: a task that was given up for lost may still be writing.
    return f"{path}.{os.urandom(4).hex()}.part"


def _fault(shard: Shard, size: int | None) -> str | None:
    match size:
        case None:
            return "is missing"
        case shard.bytes:
            return None
        case _ if size < shard.bytes:
            return f"is cut short ({size} of {shard.bytes} bytes)"
        case _:
            return f"was edited ({size} bytes, packed with {shard.bytes})"


def _sha256(filesystem: pafs.FileSystem, path: str) -> str:
    digest = hashlib.sha256()
    with filesystem.open_input_stream(path) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _content(table: pa.Table) -> bytes:
    columns = [table[name].to_pylist() for name in LABELS]
    digests = [digest.hex() for digest in table["sha256"].to_pylist()]
    return "".join(json.dumps(row) + "\n" for row in zip(*columns, digests, strict=True)).encode()


class _CountedStream:
    """Passes on what is written, and knows its size and SHA-256, so that nothing is read again."""

    closed = False
    is_given_up = False
    """What is still written goes nowhere."""

    def __init__(self, stream: pa.NativeFile) -> None:
        self._stream = stream
        self.size = 0
        self.sha256 = hashlib.sha256()

    def write(self, data: bytes) -> int:
        if self.is_given_up:
            return len(data)
        self._stream.write(data)
        self.size += len(data)
        self.sha256.update(data)
        return len(data)

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._stream.flush()

    def close(self) -> None:
        self.closed = True
