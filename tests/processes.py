"""Finding processes that a test has started."""

import contextlib

import psutil


def own_processes(word: str) -> list[psutil.Process]:
    """Descendants of this process whose command line holds ``word``."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # ended meanwhile, or waits to be buried
            if word in " ".join(process.cmdline()):
                found.append(process)
    return found
