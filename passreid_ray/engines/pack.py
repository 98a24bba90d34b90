"""Images packed into Parquet shards that training streams: checked, hashed, each shard whole or not at all.

Reads from top to bottom in the order it runs: settings, ``run``, the folder, duplicates, shards, what is written last.
A stopped job goes on from the finished shards. Looking for duplicates takes about 40 bytes of memory for each row.
"""

import errno
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from pydantic import Field
from ray.exceptions import RayTaskError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from passreid_ray.config import Section
from passreid_ray.data import JUNK_PERSON_ID, BadImage, Rows, Source, SyntheticSource, open_rows
from passreid_ray.data.decode import MIN_SIDE_PX
from passreid_ray.data.image_hash import repeats
from passreid_ray.data.manifest import MANIFEST_FILE, BadRow, Manifest, Sidecar, fingerprint_of
from passreid_ray.data.pack_folder import PackFolder, claim
from passreid_ray.data.packed import write_whole
from passreid_ray.data.rows import GROUP_ROWS
from passreid_ray.data.storage import UserAddress, is_remote, locate, reason, shown
from passreid_ray.engines.pack_shard import ImageRule, ShardTask, hash_rows, pack_image, pack_shard
from passreid_ray.engines.progress import LINE_SECONDS
from passreid_ray.engines.ray_cluster import WorkersConfig, connect
from passreid_ray.engines.row_blocks import MAX_TASK_RETRIES
from passreid_ray.engines.run_folder import check_writable
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
FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk and a full quota raise."""
NOT_CONTENT = {"output", "max_bad_share"}
"""Settings that change no shard, so that a restart may change them."""


class PackConfig(Section):
    """Settings of jobs/pack.py."""

    data: Source = SyntheticSource()
    """The images to pack."""
    output: UserAddress = Path("outputs/packed")
    """Folder for the shards, which all nodes must share, or an address such as s3://bucket/folder."""
    rows_per_group: int = Field(default=GROUP_ROWS, ge=1)
    """Images in a row group, the smallest piece that is read at a time."""
    groups_per_shard: int = Field(default=128, ge=1)
    """Row groups in a shard, the piece that one task writes."""
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
            cannot be used; finished shards stay.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    rows = open_rows(config.data)
    folder = claimed(config, rows)
    finished = folder.finished(num_shards(config, len(rows)))
    bytes_per_row = sampled_bytes_per_row(rows, config)
    if finished:
        console.print(f"{len(finished):,} of {num_shards(config, len(rows)):,} shards are there and stay", markup=False)
    warn_when_disk_is_small(folder, bytes_per_row * rows_left(config, len(rows), finished), console)
    connect(WorkersConfig())
    start = time.monotonic()
    rows_ref = ray.put(rows)
    with PackProgress(console) as progress:
        repeats_M2 = found_repeats(config, folder, rows_ref, len(rows), progress)
        sidecars = packed_shards(config, folder, rows_ref, len(rows), repeats_M2, finished, bytes_per_row, progress)
    bad, duplicates_D = left_out([row for sidecar in sidecars for row in sidecar.bad], repeats_M2, rows)
    lines = [json.dumps({"image_id": row.image_id, "reason": row.reason}) + "\n" for row in bad]
    _write(folder, QUARANTINE_FILE, "".join(lines).encode())
    check_bad(bad, len(rows), config)
    manifest = manifest_of(config, rows, sidecars, bad, duplicates_D)
    _write(folder, MANIFEST_FILE, manifest.model_dump_json(indent=1).encode())
    new_rows = sum(sidecar.shard.rows for number, sidecar in enumerate(sidecars) if number not in finished)
    console.print(summary(config, manifest, new_rows / (time.monotonic() - start)), markup=False)
    return manifest


def claimed(config: PackConfig, rows: Rows) -> PackFolder:
    """The output folder, marked as that of this data and these settings."""
    if not is_remote(config.output):
        if Path(config.output).is_file():
            raise UserError(f"output: {config.output} is a file; give a folder")
        check_writable(Path(config.output), "output")
    settings = {name: value for name, value in written_settings(config).items() if name not in NOT_CONTENT}
    try:
        return claim(config.output, rows.fingerprint(), settings)
    except OSError as error:
        raise UserError(f"output: {shown(config.output)} cannot be used: {reason(error)}") from None


def written_settings(config: PackConfig) -> dict[str, Any]:
    """The settings as they are written to disk: addresses without credentials."""

    def without_credentials(value: Any) -> Any:
        match value:
            case dict():
                return {key: without_credentials(own) for key, own in value.items()}
            case list():
                return [without_credentials(own) for own in value]
            case str() if is_remote(value):
                return shown(value)
            case _:
                return value

    return without_credentials(config.model_dump(mode="json"))


def num_shards(config: PackConfig, num_rows: int) -> int:
    """How many shards ``num_rows`` make."""
    return -(-num_rows // config.rows_per_shard)


def shard_rows(config: PackConfig, num_rows: int, number: int) -> slice:
    """Rows of the source that shard ``number`` is made of."""
    return slice(number * config.rows_per_shard, min((number + 1) * config.rows_per_shard, num_rows))


def rows_left(config: PackConfig, num_rows: int, finished: dict[int, Sidecar]) -> int:
    """Rows of the shards that are not finished."""
    owns = [shard_rows(config, num_rows, number) for number in finished]
    return num_rows - sum(own.stop - own.start for own in owns)


def sampled_bytes_per_row(rows: Rows, config: PackConfig) -> float:
    """Mean size of a few packed images spread over ``rows``; 0 when none of them can be used."""
    numbers = np.unique(np.linspace(0, len(rows) - 1, num=NUM_SAMPLED, dtype=np.int64))
    sizes = []
    for data in rows.read_many(numbers):
        try:
            if not isinstance(data, BadImage):
                sizes.append(len(pack_image(data, image_rule(config)).data))
        except BadImage:
            continue
    return float(np.mean(sizes)) if sizes else 0.0


def warn_when_disk_is_small(folder: PackFolder, needed_bytes: float, console: Console) -> None:
    """Say so when a local disk has less room than the shards will likely take; sizes are estimated, so go on."""
    if is_remote(folder.address):
        return
    free_bytes = shutil.disk_usage(folder.root).free
    if needed_bytes > free_bytes:
        console.print(
            f"warning: about {size_text(needed_bytes)} will be written to {folder.root}, which has "
            f"{size_text(free_bytes)} free",
            markup=False,
        )


def image_rule(config: PackConfig) -> ImageRule:
    """What is done to each image."""
    return ImageRule(config.longest_side_px, config.jpeg_quality)


def found_repeats(
    config: PackConfig, folder: PackFolder, rows: ray.ObjectRef, num_rows: int, progress: "PackProgress"
) -> NDArray[np.int64]:
    """Rows that repeat an earlier one's bytes and that row, ``(M, 2)``; none unless ``config.drop_duplicates``."""
    if not config.drop_duplicates:
        return np.empty((0, 2), np.int64)
    if (known := folder.read(DUPLICATES_FILE)) is not None:
        return np.load(BytesIO(known), allow_pickle=False)
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
    _write(folder, DUPLICATES_FILE, file.getvalue())
    return pairs_M2


def packed_shards(
    config: PackConfig,
    folder: PackFolder,
    rows: ray.ObjectRef,
    num_rows: int,
    repeats_M2: NDArray[np.int64],
    finished: dict[int, Sidecar],
    bytes_per_row: float,
    progress: "PackProgress",
) -> list[Sidecar]:
    """Sidecars of all shards in their order, once those that are not ``finished`` are written."""
    sidecars = dict(finished)

    def calls() -> Iterator[tuple[int, tuple[Any, ...]]]:
        for number in range(num_shards(config, num_rows)):
            if number not in finished:
                own = shard_rows(config, num_rows, number)
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

    progress("packing", num_rows - rows_left(config, num_rows, sidecars), num_rows)
    try:
        for number, sidecar in _in_flight(_pack_task, calls()):
            sidecars[number] = sidecar
            done = num_rows - rows_left(config, num_rows, sidecars)
            progress("packing", done, num_rows, sidecar.shard.bytes)
    except OSError as error:
        if error.errno not in FULL:
            raise _unwritable(folder, error) from None
        # Shards that other tasks finished meanwhile count too.
        sidecars = folder.finished(num_shards(config, num_rows))
        raise UserError(full_disk(folder, config, num_rows, sidecars, bytes_per_row)) from None
    return [sidecars[number] for number in range(num_shards(config, num_rows))]


def full_disk(
    folder: PackFolder, config: PackConfig, num_rows: int, finished: dict[int, Sidecar], bytes_per_row: float
) -> str:
    """What the user is told when no space is left: what stays, and about how much is still needed."""
    packed_rows = sum(sidecar.shard.rows for sidecar in finished.values())
    if packed_rows:
        bytes_per_row = sum(sidecar.shard.bytes for sidecar in finished.values()) / packed_rows
    needed_bytes = bytes_per_row * rows_left(config, num_rows, finished)
    return (
        f"output: no space left in {shown(folder.address)}; {len(finished)} of {num_shards(config, num_rows)} shards "
        f"are whole and stay, about {size_text(needed_bytes)} are still needed; make room and run the "
        "same command again"
    )


def _write(folder: PackFolder, name: str, content: bytes) -> None:
    try:
        write_whole(folder.filesystem, folder.path(name), content)
    except OSError as error:
        raise _unwritable(folder, error) from None


def _unwritable(folder: PackFolder, error: OSError) -> UserError:
    return UserError(
        f"output: {shown(folder.address)} cannot be written: {reason(error)}; finished shards stay, the same "
        "command goes on"
    )


def _pack_task(rows: Rows, task: ShardTask, address: str) -> Sidecar:
    return pack_shard(rows, task, *locate(address))


def _in_flight(function: Callable[..., Any], calls: Iterator[tuple[Any, tuple[Any, ...]]]) -> Iterator[tuple[Any, Any]]:
    """(key, ``function(*arguments)``) of every (key, arguments) as they finish, a few at a time as Ray tasks.

    What a task raised is raised here, once no task runs any more.
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
    except RayTaskError as error:
        if isinstance(error.cause, OSError):
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


def check_bad(bad: Sequence[BadRow], num_rows: int, config: PackConfig) -> None:
    """Raise ``UserError`` with the first reasons when more images than ``max_bad_share`` allows cannot be used."""
    if len(bad) > config.max_bad_share * num_rows:
        first = "; ".join(f"{row.image_id}: {row.reason}" for row in bad[:NUM_NAMED])
        raise UserError(
            f"{len(bad)} of {num_rows} images cannot be used, more than max_bad_share={config.max_bad_share:g} allows; "
            f"the first: {first}. All are in {shown(config.output, QUARANTINE_FILE)}; the shards are kept: with a "
            "larger max_bad_share none is made again"
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
        settings=written_settings(config),
    )


def summary(config: PackConfig, manifest: Manifest, images_per_second: float) -> str:
    """What the user is told at the end."""
    bad = f" ({QUARANTINE_FILE})" if manifest.num_bad else ""
    return (
        f"packed:   {manifest.rows:,} images of {manifest.num_identities:,} people by {manifest.num_cameras:,} "
        f"cameras, {size_text(manifest.bytes)} in {len(manifest.shards):,} shards, {images_per_second:,.0f} images/s\n"
        f"left out: {manifest.num_bad:,} bad images{bad}, {manifest.num_duplicates:,} duplicates\n"
        f"train:    python jobs/pretrain.py data.kind=parquet data.path={shown(config.output)}"
    )


def size_text(num_bytes: float) -> str:
    """A size for people: 12 B, 3.4 kB, 5.6 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


class PackProgress:
    """Images per second and bytes written: a live bar in a terminal, now and then a line anywhere else."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("starting", total=None, state="")
        self._phase = ""
        self._first, self._start, self._last = 0, 0.0, 0.0
        """Images that were done when the phase began, when that was, and when the last line was."""
        self._bytes = 0

    def __enter__(self) -> "PackProgress":
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    def __call__(self, phase: str, done: int, total: int, new_bytes: int = 0) -> None:
        """``done`` of ``total`` images; ``new_bytes`` were written since the last call."""
        now = time.monotonic()
        if phase != self._phase:
            self._phase, self._first, self._start, self._last, self._bytes = phase, done, now, now, 0
            self._bar.reset(self._task, description=phase, total=total)
        self._bytes += new_bytes
        per_second = (done - self._first) / max(now - self._start, 1e-9)
        state = f"{per_second:,.0f} images/s" + (f", {size_text(self._bytes)}" if self._bytes else "")
        self._bar.update(self._task, completed=done, state=state)
        if now - self._last >= LINE_SECONDS and not self._console.is_terminal and per_second:
            self._last = now
            left = timedelta(seconds=round((total - done) / per_second))
            self._console.print(f"{phase}: {done:,} of {total:,}  {state}  {left} left", highlight=False, markup=False)
