"""What continuous integration runs, with programs that only write down how they are called."""

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / ".ci" / "run"
NEEDED = ("ip", "ss", "rsync", "ssh", "curl", "ps", "pgrep", "redis-server", "cc")


def calls(folder: Path, user: int, programs: tuple[str, ...]) -> list[str]:
    """How ``make`` and ``apt-get`` are called when the user's number is ``user`` and ``programs`` are there."""
    log = folder / "calls"
    recorder = f'#!/bin/sh\necho "${{0##*/}} $*" >>{log}\n'
    scripts = dict.fromkeys((*programs, "make", "apt-get"), recorder) | {"id": f"#!/bin/sh\necho {user}\n"}
    for name, text in scripts.items():
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder / "dirname").symlink_to("/usr/bin/dirname")
    subprocess.run(["/bin/bash", SCRIPT], env={"PATH": str(folder)}, check=True, capture_output=True)
    return log.read_text().splitlines()


def test_who_is_not_root_runs_no_tests_of_several_hosts(tmp_path: Path) -> None:
    assert calls(tmp_path, 1000, ()) == ["make lint", "make test"]


@pytest.mark.parametrize("lacking", NEEDED)
def test_root_installs_what_is_missing_and_runs_the_tests_of_several_hosts(tmp_path: Path, lacking: str) -> None:
    there = tuple(name for name in NEEDED if name != lacking)
    first, second, *middle, last = calls(tmp_path, 0, there)
    assert [first, second, last] == ["make lint", "make test", "make cluster-test CLUSTER=short"]
    assert [call.split()[1] for call in middle] == ["update", "install"]
    packages = set(middle[1].split())
    assert {"iproute2", "rsync", "openssh-client", "openssh-server", "curl", "procps", "redis-server"} <= packages
