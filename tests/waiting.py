"""Waiting for what another process or thread does."""

import time
from collections.abc import Callable


def wait_for(is_so: Callable[[], object], seconds: float = 60.0, pause: float = 0.05) -> None:
    """Wait until ``is_so``, asked every ``pause`` seconds; raises ``TimeoutError`` after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not so within {seconds:g} s")
        time.sleep(pause)
