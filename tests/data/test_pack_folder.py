"""A folder that is packed into, beyond what test_packed.py says of it."""

from pathlib import Path

import pyarrow as pa
import pytest

from passreid_ray.data.manifest import CLAIM_FILE, MANIFEST_FILE
from passreid_ray.data.pack_folder import PackFolder, claim, pack_folder


def test_a_folder_is_known_before_it_is_claimed_and_nothing_is_touched(tmp_path: Path) -> None:
    planned = pack_folder(tmp_path / "out", "f", {"a": 1})
    assert not (tmp_path / "out").exists()
    claimed = claim(tmp_path / "out", "f", {"a": 1})
    assert (claimed.root, claimed.settings) == (planned.root, planned.settings)
    assert pack_folder(tmp_path / "out", "g", {"a": 1}).settings != planned.settings
    assert pack_folder(tmp_path / "out", "f", {"a": 2}).settings != planned.settings


def test_looking_for_whole_shards_leaves_the_manifest(tmp_path: Path) -> None:
    folder = claim(tmp_path / "out", "f", {})
    (tmp_path / "out" / MANIFEST_FILE).touch()
    assert folder.whole_shards(2) == {}
    assert (tmp_path / "out" / MANIFEST_FILE).exists()
    assert folder.finished(2) == {}
    assert not (tmp_path / "out" / MANIFEST_FILE).exists()


def test_a_folder_claimed_before_that_cannot_be_written_any_more_is_found_out_at_the_claim(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim(tmp_path / "out", "f", {})
    before = (tmp_path / "out" / CLAIM_FILE).read_bytes()
    (tmp_path / "out" / "shard-00000.parquet.0123abcd.part").touch()

    def refuse(*_: object) -> None:
        raise pa.ArrowIOError("read-only")

    monkeypatch.setattr(PackFolder, "write", refuse)
    with pytest.raises(OSError, match="read-only"):
        claim(tmp_path / "out", "f", {})
    assert [path.name for path in (tmp_path / "out").iterdir()] == [CLAIM_FILE]  # what makes room went first
    assert (tmp_path / "out" / CLAIM_FILE).read_bytes() == before
