"""Room for what is packed: what the user is told when there is little, and when something cannot be written."""

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from passreid_ray.data.manifest import Sidecar
from passreid_ray.data.pack_folder import PackFolder
from passreid_ray.data.storage import is_remote, reason, shown
from passreid_ray.engines.shard_layout import ShardLayout
from passreid_ray.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)
"""What a full disk and a full quota raise."""


@contextmanager
def output_errors(folder: PackFolder, layout: ShardLayout) -> Iterator[None]:
    """Any ``OSError`` inside becomes a ``UserError`` that names the folder; on a full disk it says what is needed."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            # Looked up now: shards that other tasks finished meanwhile count too.
            raise UserError(full_disk(folder, layout, _whole_shards(folder, layout))) from None
        raise UserError(
            f"output: {shown(folder.address)} cannot be written: {reason(error)}; mend it or set another output. "
            "Finished shards stay, the same command goes on"
        ) from None


def full_disk(folder: PackFolder, layout: ShardLayout, finished: Mapping[int, Sidecar]) -> str:
    """What the user is told when no space is left: what stays, and about how much is still needed."""
    return (
        f"output: no space left in {shown(folder.address)}; {len(finished)} of {layout.num_shards} shards are whole "
        f"and stay, about {size_text(layout.bytes_left(finished))} are still needed; make room and run the same "
        "command again"
    )


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


def size_text(num_bytes: float) -> str:
    """A size for people: 12 B, 3.4 kB, 5.6 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _whole_shards(folder: PackFolder, layout: ShardLayout) -> Mapping[int, Sidecar]:
    try:
        return folder.whole_shards(layout.num_shards)
    except OSError:  # the error that is being told matters more
        return {}
