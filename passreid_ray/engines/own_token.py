"""The token of this user's local clusters: whoever can read it can run programs as this user."""

import os
import secrets
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

TOKEN_BYTES = 32
OWNER_ONLY = 0o600


def token_path() -> Path:
    """Where Ray looks for the token when neither RAY_AUTH_TOKEN nor RAY_AUTH_TOKEN_PATH says otherwise."""
    return Path.home() / ".ray" / "auth_token"


def keep_token_private() -> None:
    """Make the token's file, if there is none, and let nobody else read it; with another token nothing is done.

    Ray would make the file with the permissions of any other, which on many machines all users may read. What cannot be
    made or changed is left to Ray, which tells.
    """
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    path = token_path()
    with suppress(OSError):
        if not path.exists():
            _write(path)
        mode = path.stat()
        if mode.st_uid == os.getuid() and stat.S_IMODE(mode.st_mode) & ~OWNER_ONLY:
            path.chmod(OWNER_ONLY)


def _write(path: Path) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Linked under its name when it is whole: of two jobs that come first at the same time one wins, and both read it.
    with tempfile.NamedTemporaryFile("w", dir=path.parent) as draft:  # readable by its owner only
        token = secrets.token_hex(TOKEN_BYTES)
        draft.write(token)
        draft.flush()
        try:
            os.link(draft.name, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            _write_in_place(path, token)


def _write_in_place(path: Path, token: str) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    with suppress(FileExistsError), os.fdopen(os.open(path, flags, OWNER_ONLY), "w") as file:
        try:
            file.write(token)
            file.flush()
        except OSError:
            path.unlink()  # half a token would be taken for one
            raise
