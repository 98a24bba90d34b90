"""Lines of a packing job's progress."""

import io

import pytest
from rich.console import Console

from passreid_ray.engines import pack_progress
from passreid_ray.engines.pack_progress import PackProgress


def test_progress_outside_a_terminal_is_lines_with_rate_and_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 10.0, 20.0, 40.0])
    monkeypatch.setattr(pack_progress.time, "monotonic", lambda: next(now))
    file = io.StringIO()
    progress = PackProgress(Console(file=file, width=200))  # not entered: only lines are looked at
    progress("packing", 100, 1000)
    progress("packing", 200, 1000, 1000)
    progress("packing", 300, 1000, 2000)
    progress("packing", 500, 1000, 4000)
    assert file.getvalue() == "packing: 500 of 1,000  10 images/s, 7.0 kB  0:00:50 left\n"
