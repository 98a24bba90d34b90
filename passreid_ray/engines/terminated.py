"""SIGTERM, as ``ray job stop``, schedulers and container runtimes send it: an end that is asked for, not a crash."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The process was told to end by SIGTERM; handled wherever Ctrl-C is."""


def raise_terminated(number: int, frame: FrameType | None) -> None:
    """A signal handler that ends what the main thread does."""
    raise Terminated


@contextlib.contextmanager
def terminated_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM raises ``Terminated`` in the main thread; in other threads nothing changes."""
    with _handling(raise_terminated):
        yield


@contextlib.contextmanager
def noticing_sigterm() -> Iterator[threading.Event]:
    """Inside, the first SIGTERM sets the event and nothing else; the second one raises ``Terminated``.

    In other threads than the main one nothing changes, and the event is never set.
    """
    noticed = threading.Event()

    def notice(number: int, frame: FrameType | None) -> None:
        if noticed.is_set():
            raise Terminated
        noticed.set()

    with _handling(notice):
        yield noticed


@contextlib.contextmanager
def keeping_sigterm() -> Iterator[None]:
    """Undo what is done inside to the handling of SIGTERM: Ray, when it starts, makes it a silent exit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if before not in (None, signal.SIG_DFL):  # nobody handles it: Ray's way is better than none
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _handling(handler: object) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, handler)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before if before is not None else signal.SIG_DFL)
