import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from passreid_ray.engines import own_token
from passreid_ray.engines.own_token import keep_token_private, token_path


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of a user without a token."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_token_is_long_and_only_its_owner_reads_it(home: Path) -> None:
    before = os.umask(0)
    try:
        keep_token_private()
    finally:
        os.umask(before)
    assert token_path() == home / ".ray" / "auth_token"
    assert len(token_path().read_text()) == 64
    assert _mode(token_path()) == 0o600
    assert [path.name for path in token_path().parent.iterdir()] == ["auth_token"]


def test_a_token_that_all_could_read_is_kept_and_closed(home: Path) -> None:
    token_path().parent.mkdir()
    token_path().write_text("a" * 64)
    token_path().chmod(0o644)
    keep_token_private()
    assert token_path().read_text() == "a" * 64
    assert _mode(token_path()) == 0o600


def test_processes_that_come_first_at_the_same_time_read_the_same_token(home: Path) -> None:
    def seen(_: int) -> str:
        keep_token_private()
        return token_path().read_text()

    with ThreadPoolExecutor(8) as pool:
        tokens = set(pool.map(seen, range(32)))
    assert len(tokens) == 1
    assert len(tokens.pop()) == 64


def test_where_files_cannot_be_linked_the_token_is_written_in_place_for_its_owner_only(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    before = os.umask(0)
    try:
        keep_token_private()
    finally:
        os.umask(before)
    token = token_path().read_text()
    assert len(token) == 64
    assert _mode(token_path()) == 0o600
    own_token._write(token_path())
    assert token_path().read_text() == token


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_with_a_token_from_elsewhere_no_file_is_made(home: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "elsewhere")
    keep_token_private()
    assert not (home / ".ray").exists()


def test_a_home_that_cannot_be_written_is_left_to_ray(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/dev/null/none")
    keep_token_private()
