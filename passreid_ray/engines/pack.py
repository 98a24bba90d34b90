"""Images packed into Parquet shards that training streams: checked, hashed, each shard whole or not at all.

Reads from top to bottom in the order it runs: settings, ``run``, the folder, duplicates, shards, what is written last.
A stopped job goes on from the finished shards. Looking for duplicates takes about 40 bytes of memory for each row.
"""

import json
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from pydantic import Field
from ray.exceptions import RayError, RayTaskError
from rich.console import Console

from passreid_ray.config import Section
from passreid_ray.data import JUNK_PERSON_ID, BadImage, Rows, Source, SyntheticSource, open_rows
from passreid_ray.data.decode import MIN_SIDE_PX
from passreid_ray.data.image_hash import repeats
from passreid_ray.data.manifest import MANIFEST_FILE, BadRow, Manifest, Sidecar, fingerprint_of
from passreid_ray.data.pack_folder import PackFolder, claim, pack_folder
from passreid_ray.data.rows import GROUP_ROWS
from passreid_ray.data.storage import UserAddress, below, is_remote, locate, shown
from passreid_ray.engines.image_pieces import read_in_pieces
from passreid_ray.engines.pack_disk import output_errors, size_text, warn_when_disk_is_small
from passreid_ray.engines.pack_progress import PackProgress
from passreid_ray.engines.pack_shard import ImageRule, ShardTask, hash_rows, pack_image, pack_shard
from passreid_ray.engines.precheck import check_readable
from passreid_ray.engines.ray_cluster import WorkersConfig, connect
from passreid_ray.engines.row_blocks import MAX_TASK_RETRIES
from passreid_ray.engines.shard_layout import ShardLayout
from passreid_ray.engines.task_errors import user_error
from passreid_ray.errors import UserError

QUARANTINE_FILE = "quarantine.jsonl"
DUPLICATES_FILE = "duplicates.npy"
"""``(M, 2)`` rows left out and the rows whose bytes they repeat, so that a restart need not look for them again."""
TASKS_PER_CPU = 2
"""Tasks that Ray knows of at a time: one runs, one waits."""
HASH_ROWS = 16384
NUM_SAMPLED = 64
NUM_NAMED = 3
STOP_SECONDS = 30.0
S3_SHARD_BYTES = 4e9
"""S3 refuses to rename what is larger than 5 GB; sizes are estimated from a sample."""
NOT_CONTENT = {"data", "output", "max_bad_share"}
"""Settings that a restart may change. Data that was moved has the same fingerprint, other data has not."""


class PackConfig(Section):
    """Settings of jobs/pack.py."""

    data: Source = SyntheticSource()
    """The images to pack."""
    output: UserAddress = Path("outputs/packed")
    """Folder for the shards, which all nodes must share, or an address such as s3://bucket/folder."""
    rows_per_group: int = Field(default=GROUP_ROWS, ge=1)
    """Images in a row group, the smallest piece that is read at a time; large images fill it at 32 MB."""
    groups_per_shard: int = Field(default=128, ge=1)
    """Row groups in a shard, the piece that one task writes. S3 takes no shard above 5 GB: fewer for large images."""
    longest_side_px: int | None = Field(default=None, ge=MIN_SIDE_PX)
    """Images with a longer side are shrunk to it and written as JPEG; none: all images keep their bytes."""
    jpeg_quality: int = Field(default=95, ge=1, le=100)
    """JPEG quality of images that are shrunk."""
    drop_duplicates: bool = False
    """Of images with the same bytes keep the first by image_id; reads all twice, takes 40 bytes of memory a row."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this share of the images cannot be used."""

    @property
    def rows_per_shard(self) -> int:
        """Rows of the source that make a shard."""
        return self.rows_per_group * self.groups_per_shard


def run(config: PackConfig, console: Console | None = None) -> Manifest:
    """Pack ``config.data``; finished shards of an earlier run of the same data and settings are not made again.

    Raises:
        UserError: the output is of other data or settings or cannot be written, the disk is full, or too many images
            cannot be used, which is looked at in a few images first; finished shards stay.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    rows = open_rows(config.data)
    check_readable(rows, config.max_bad_share)
    layout = ShardLayout(len(rows), config.rows_per_shard, sampled_bytes_per_row(rows, config))
    check_shard_size(config, layout)
    folder, finished = claimed(config, rows, layout)
    if finished:
        console.print(f"{len(finished):,} of {layout.num_shards:,} shards are there and stay", markup=False)
    warn_when_disk_is_small(folder, layout.bytes_left(finished), console)
    connect(WorkersConfig())
    start = time.monotonic()
    rows_ref = ray.put(rows)
    with output_errors(folder, layout), PackProgress(console) as progress:
        repeats_M2 = found_repeats(config, folder, rows_ref, len(rows), progress)
        sidecars = packed_shards(config, folder, rows_ref, layout, repeats_M2, finished, progress)
    bad, duplicates_D = left_out([row for sidecar in sidecars for row in sidecar.bad], repeats_M2, rows)
    lines = [json.dumps({"image_id": row.image_id, "reason": row.reason}) + "\n" for row in bad]
    with output_errors(folder, layout):
        folder.write(QUARANTINE_FILE, "".join(lines).encode())
        check_bad(bad, len(rows), config)
        manifest = manifest_of(config, rows, sidecars, bad, duplicates_D)
        folder.write(MANIFEST_FILE, manifest.model_dump_json(indent=1).encode())
    new_rows = sum(sidecar.shard.rows for number, sidecar in enumerate(sidecars) if number not in finished)
    is_new = len(finished) < layout.num_shards
    console.print(summary(config, manifest, new_rows / (time.monotonic() - start) if is_new else None), markup=False)
    return manifest


def check_shard_size(config: PackConfig, layout: ShardLayout) -> None:
    """Raise ``UserError`` with a fitting ``groups_per_shard`` when S3 would refuse shards of this size."""
    shard_bytes = layout.bytes_per_row * min(layout.rows_per_shard, layout.num_rows)
    if str(config.output).startswith("s3://") and shard_bytes > S3_SHARD_BYTES:
        fitting = max(1, int(S3_SHARD_BYTES / (layout.bytes_per_row * config.rows_per_group)))
        raise UserError(
            f"groups_per_shard: a shard of {config.groups_per_shard} x {config.rows_per_group} images would take "
            f"about {size_text(shard_bytes)}, and S3 takes no shard above 5 GB; set groups_per_shard={fitting}"
        )


def claimed(config: PackConfig, rows: Rows, layout: ShardLayout) -> tuple[PackFolder, dict[int, Sidecar]]:
    """The output folder, marked as that of this data and these settings, and its finished shards."""
    if not is_remote(config.output) and Path(config.output).is_file():
        raise UserError(f"output: {config.output} is a file; give a folder")
    settings = config.model_dump(mode="json", exclude=NOT_CONTENT)
    fingerprint = rows.fingerprint()
    with output_errors(pack_folder(config.output, fingerprint, settings), layout):
        folder = claim(config.output, fingerprint, settings)
        return folder, folder.finished(layout.num_shards)


def sampled_bytes_per_row(rows: Rows, config: PackConfig) -> float:
    """Mean size of a few packed images spread over ``rows``; ``UserError`` when none of them can be packed."""
    numbers = np.unique(np.linspace(0, len(rows) - 1, num=NUM_SAMPLED, dtype=np.int64))
    sizes, reasons = [], []
    for number, data in zip(numbers.tolist(), read_in_pieces(rows, numbers), strict=True):
        try:
            if isinstance(data, BadImage):
                raise data
            sizes.append(len(pack_image(data, image_rule(config)).data))
        except BadImage as error:
            reasons.append(f"{rows.table['image_id'][number].as_py()}: {error.reason}")
    if not sizes:
        raise UserError(
            f"data: none of the {len(numbers)} images looked at can be packed, the first: {reasons[0]}; check the "
            "data's path and longest_side_px"
        )
    return float(np.mean(sizes))


def image_rule(config: PackConfig) -> ImageRule:
    """What is done to each image."""
    return ImageRule(config.longest_side_px, config.jpeg_quality)


def found_repeats(
    config: PackConfig, folder: PackFolder, rows: ray.ObjectRef, num_rows: int, progress: PackProgress
) -> NDArray[np.int64]:
    """Rows that repeat an earlier one's bytes and that row, ``(M, 2)``; none unless ``config.drop_duplicates``."""
    if not config.drop_duplicates:
        return np.empty((0, 2), np.int64)
    if (known := folder.read(DUPLICATES_FILE)) is not None:
        return _known_repeats(known, num_rows, folder)
    prefixes_N2 = np.zeros((num_rows, 2), np.uint64)
    blocks = [slice(first, min(first + HASH_ROWS, num_rows)) for first in range(0, num_rows, HASH_ROWS)]
    done = 0
    progress("hashing", 0, num_rows)
    for own, prefixes_R2 in _in_flight(hash_rows, ((own, (rows, own)) for own in blocks)):
        prefixes_N2[own] = prefixes_R2
        done += own.stop - own.start
        progress("hashing", done, num_rows)
    pairs_M2 = repeats(prefixes_N2)
    file = BytesIO()
    np.save(file, pairs_M2)
    folder.write(DUPLICATES_FILE, file.getvalue())
    return pairs_M2


def _known_repeats(content: bytes, num_rows: int, folder: PackFolder) -> NDArray[np.int64]:
    """What ``found_repeats`` has written; raises ``UserError`` for anything else, which is not unpickled either."""
    try:
        pairs_M2 = np.lib.format.read_array(BytesIO(content), allow_pickle=False)
    except (ValueError, OSError, EOFError, MemoryError) as error:
        raise _damaged_repeats(folder, str(error) or type(error).__name__) from None
    if pairs_M2.dtype != np.int64 or pairs_M2.ndim != 2 or pairs_M2.shape[1] != 2:
        raise _damaged_repeats(folder, f"pairs of rows expected, found {pairs_M2.dtype} of shape {pairs_M2.shape}")
    if len(pairs_M2) and (pairs_M2.min() < 0 or pairs_M2.max() >= num_rows):
        raise _damaged_repeats(folder, f"rows below {num_rows} expected, found {pairs_M2.min()} to {pairs_M2.max()}")
    return pairs_M2


def _damaged_repeats(folder: PackFolder, found: str) -> UserError:
    return UserError(
        f"output: {shown(below(folder.address, DUPLICATES_FILE))}: damaged: {found}; delete it, and it is made again"
    )


def packed_shards(
    config: PackConfig,
    folder: PackFolder,
    rows: ray.ObjectRef,
    layout: ShardLayout,
    repeats_M2: NDArray[np.int64],
    finished: Mapping[int, Sidecar],
    progress: PackProgress,
) -> list[Sidecar]:
    """Sidecars of all shards in their order, once those that are not ``finished`` are written.

    Of fewer shards when so many images are bad that the others cannot change what ``check_bad`` says.
    """
    sidecars = dict(finished)

    def calls() -> Iterator[tuple[int, tuple[Any, ...]]]:
        for number in range(layout.num_shards):
            if number not in finished:
                own = layout.rows_of(number)
                first, end = np.searchsorted(repeats_M2[:, 0], (own.start, own.stop))
                task = ShardTask(
                    number=number,
                    rows=own,
                    left_out=repeats_M2[first:end, 0].copy(),
                    rows_per_group=config.rows_per_group,
                    rule=image_rule(config),
                    settings=folder.settings,
                )
                yield number, (rows, task, folder.address)

    progress("packing", layout.num_rows - layout.rows_left(sidecars), layout.num_rows)
    num_bad = sum(len(sidecar.bad) for sidecar in sidecars.values())
    with closing(_in_flight(_pack_task, calls())) as packed:
        while not is_hopeless(num_bad, layout.num_rows, config) and (found := next(packed, None)) is not None:
            number, sidecar = found
            sidecars[number] = sidecar
            num_bad += len(sidecar.bad)
            progress("packing", layout.num_rows - layout.rows_left(sidecars), layout.num_rows, sidecar.shard.bytes)
    return [sidecars[number] for number in sorted(sidecars)]


def _pack_task(rows: Rows, task: ShardTask, address: str) -> Sidecar:
    return pack_shard(rows, task, *locate(address))


def _in_flight(
    function: Callable[..., Any], calls: Iterator[tuple[Any, tuple[Any, ...]]]
) -> Generator[tuple[Any, Any], None, None]:
    """(key, ``function(*arguments)``) of every (key, arguments) as they finish, a few at a time as Ray tasks.

    What a task raised is raised here, once no task runs any more: ``UserError`` and ``OSError`` as they are, so that
    the user reads one line.
    """
    task = ray.remote(num_cpus=1, max_retries=MAX_TASK_RETRIES, scheduling_strategy="DEFAULT")(function)
    limit = max(1, int(TASKS_PER_CPU * ray.cluster_resources().get("CPU", 1)))
    running: dict[ray.ObjectRef, Any] = {}
    try:
        while True:
            while len(running) < limit and (call := next(calls, None)) is not None:
                key, arguments = call
                running[task.remote(*arguments)] = key
            if not running:
                return
            (ready,), _ = ray.wait(list(running), num_returns=1)
            key = running.pop(ready)
            yield key, ray.get(ready)
    except RayError as error:
        if (told := user_error(error)) is not None:
            raise told from None
        if isinstance(error, RayTaskError) and isinstance(error.cause, OSError):
            raise error.cause from None
        raise
    finally:
        for reference in running:
            ray.cancel(reference)
        if running:
            ray.wait(list(running), num_returns=len(running), timeout=STOP_SECONDS)


def left_out(
    bad: Sequence[BadRow], repeats_M2: NDArray[np.int64], rows: Rows
) -> tuple[list[BadRow], NDArray[np.int64]]:
    """(rows with an image that cannot be used, rows that repeat a usable one), both in their order.

    Repeats of a bad image are bad too, else a thousand copies of an error page would count as one bad image.
    """
    reasons = {row.row: row for row in bad}
    repeats_bad_M = np.isin(repeats_M2[:, 1], np.array(list(reasons), np.int64))
    copies = [
        BadRow(
            row=int(row),
            image_id=rows.table["image_id"][int(row)].as_py(),
            reason=f"same bytes as {reasons[int(first)].image_id}: {reasons[int(first)].reason}",
        )
        for row, first in repeats_M2[repeats_bad_M]
    ]
    return sorted([*bad, *copies], key=lambda row: row.row), repeats_M2[~repeats_bad_M, 0]


def is_hopeless(num_bad: int, num_rows: int, config: PackConfig) -> bool:
    """Whether more images than ``max_bad_share`` allows cannot be used."""
    return num_bad > config.max_bad_share * num_rows


def check_bad(bad: Sequence[BadRow], num_rows: int, config: PackConfig) -> None:
    """Raise ``UserError`` with the first reasons when more images than ``max_bad_share`` allows cannot be used."""
    if is_hopeless(len(bad), num_rows, config):
        first = "; ".join(f"{row.image_id}: {row.reason}" for row in bad[:NUM_NAMED])
        raise UserError(
            f"{len(bad)} of {num_rows} images cannot be used, more than max_bad_share={config.max_bad_share:g} allows; "
            f"the first: {first}. Those found are in {shown(config.output, QUARANTINE_FILE)}; finished shards stay: "
            "with a larger max_bad_share the same command goes on"
        )


def manifest_of(
    config: PackConfig, rows: Rows, sidecars: Sequence[Sidecar], bad: Sequence[BadRow], duplicates_D: NDArray[np.int64]
) -> Manifest:
    """Manifest of the finished shards ``sidecars``."""
    is_packed_N = np.ones(len(rows), bool)
    is_packed_N[[row.row for row in bad]] = False
    is_packed_N[duplicates_D] = False
    packed = rows.table.select(["person_id", "camera_id"]).filter(pa.array(is_packed_N))
    people = packed["person_id"].unique().drop_null().to_pylist()
    shards = [sidecar.shard for sidecar in sidecars]
    return Manifest(
        rows=sum(shard.rows for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        num_identities=sum(person != JUNK_PERSON_ID for person in people),
        num_cameras=len(packed["camera_id"].unique().drop_null()),
        rows_per_group=config.rows_per_group,
        shards=shards,
        fingerprint=fingerprint_of(shards),
        num_bad=len(bad),
        num_duplicates=len(duplicates_D),
        settings=config.model_dump(mode="json"),
    )


def summary(config: PackConfig, manifest: Manifest, images_per_second: float | None) -> str:
    """What the user is told at the end; no speed when all shards were there."""
    speed = "all were there" if images_per_second is None else f"{images_per_second:,.0f} images/s"
    bad = f" ({QUARANTINE_FILE})" if manifest.num_bad else ""
    return (
        f"packed:   {manifest.rows:,} images of {manifest.num_identities:,} people by {manifest.num_cameras:,} "
        f"cameras, {size_text(manifest.bytes)} in {len(manifest.shards):,} shards, {speed}\n"
        f"left out: {manifest.num_bad:,} bad images{bad}, {manifest.num_duplicates:,} duplicates\n"
        f"train:    python jobs/pretrain.py data.kind=parquet data.path={shown(config.output)}"
    )
