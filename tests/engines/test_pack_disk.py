"""What is said about room for what is packed."""

import errno
import io
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from passreid_ray.data import open_rows
from passreid_ray.data.folder import FolderSource
from passreid_ray.data.pack_folder import PackFolder
from passreid_ray.data.storage import locate
from passreid_ray.engines import pack_disk
from passreid_ray.engines.pack_disk import full_disk, output_errors, size_text, warn_when_disk_is_small
from passreid_ray.engines.pack_shard import ImageRule, ShardTask, pack_shard
from passreid_ray.engines.shard_layout import LISTS_BYTES_PER_SHARD, ShardLayout
from passreid_ray.errors import UserError
from tests.data.pictures import write_images

LISTS_BYTES = 3 * LISTS_BYTES_PER_SHARD
LAYOUT = ShardLayout(40, 16, 100.0)


def _folder(tmp_path: Path) -> PackFolder:
    (tmp_path / "out").mkdir()
    return PackFolder(*locate(tmp_path / "out"), str(tmp_path / "out"), "s")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3.4e6, "3.4 MB"), (5e9, "5.0 GB"), (2e15, "2000.0 TB")],
)
def test_sizes_are_told_in_the_unit_that_fits(size: float, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(("free_bytes", "is_told"), [(999, True), (1000, False)])
def test_a_small_disk_is_told_beforehand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_bytes: int, is_told: bool
) -> None:
    console = Console(file=io.StringIO(), width=200)
    monkeypatch.setattr(pack_disk.shutil, "disk_usage", lambda _: type("Usage", (), {"free": free_bytes}))
    warn_when_disk_is_small(_folder(tmp_path), 1000, console)
    assert isinstance(console.file, io.StringIO)
    assert ("warning: about 1.0 kB will be written" in console.file.getvalue()) is is_told


def test_a_full_disk_names_what_is_needed_by_the_shards_that_are_there(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    sampled = size_text(4000 + LISTS_BYTES)
    assert f"0 of 3 shards are whole and stay, about {sampled} are still" in full_disk(folder, LAYOUT, {})
    rows = open_rows(FolderSource(root=write_images(tmp_path / "in", [f"{number:02d}.png" for number in range(16)])))
    task = ShardTask(0, slice(0, 16), np.empty(0, np.int64), 4, ImageRule(None, 95), "s")
    shard = pack_shard(rows, task, folder.filesystem, folder.root).shard
    needed = size_text(shard.bytes / 16 * 24 + LISTS_BYTES)
    with (
        pytest.raises(UserError, match=f"1 of 3 shards are whole and stay, about {needed}"),
        output_errors(folder, LAYOUT),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_disk_that_cannot_be_read_either_still_says_that_it_is_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(*_: object) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(PackFolder, "whole_shards", unreadable)
    with pytest.raises(UserError, match="no space left"), output_errors(_folder(tmp_path), LAYOUT):
        raise OSError(errno.EDQUOT, "quota")


def test_other_errors_of_the_output_name_it_and_their_first_line(tmp_path: Path) -> None:
    expected = r"^output: .*out cannot be written: access denied; mend it [^\n]*$"
    with pytest.raises(UserError, match=expected), output_errors(_folder(tmp_path), LAYOUT):
        raise OSError("access denied\nby a long answer of the bucket")


def test_errors_of_other_kinds_pass(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), output_errors(_folder(tmp_path), LAYOUT):
        raise ZeroDivisionError
