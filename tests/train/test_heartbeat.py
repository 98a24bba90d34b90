import sys
import threading
import time
from collections.abc import Callable

import torch

from passreid_ray.data.read_ahead import made_ahead
from passreid_ray.train.heartbeat import stacks_of, whereabouts
from passreid_ray.train.pulse import pulse
from tests.waiting import wait_for

BLOCKS = "event" + ".wait(60)"
"""The line at which a thread blocks; in two pieces, for the line that looks for it is in the stacks too."""


def blocked(function: Callable[[threading.Event], object]) -> tuple[tuple[str, bool], str]:
    """(whereabouts of its thread, stacks of all) while ``function`` waits for an event in a thread of its own."""
    event = threading.Event()
    thread = threading.Thread(target=function, args=(event,), daemon=True, name="own")
    thread.start()
    assert thread.ident is not None
    ident = thread.ident
    wait_for(lambda: BLOCKS in stacks_of(sys._current_frames(), ident))
    # Now: a frame whose function has ended may have lost those that called it.
    place, text = whereabouts(sys._current_frames()[ident]), stacks_of(sys._current_frames(), ident)
    event.set()
    thread.join()
    return place, text


def read_data_that_blocks(event: threading.Event) -> None:
    def read(number: int) -> int:
        event.wait(60)
        return number

    list(made_ahead(read, range(3)))


class Blocking(torch.autograd.Function):
    """Blocks in its backward, as DDP does until the others are there."""

    event: threading.Event

    @staticmethod
    def forward(ctx: object, value: torch.Tensor) -> torch.Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, *grads: torch.Tensor) -> torch.Tensor:
        Blocking.event.wait(60)
        return grads[0]


def block_in_backward(event: threading.Event) -> None:
    Blocking.event = event
    total = Blocking.apply(torch.ones(1, requires_grad=True))
    assert isinstance(total, torch.Tensor)
    total.backward()


def test_the_place_is_the_innermost_line_of_this_package() -> None:
    (place, waits_for_others), _ = blocked(read_data_that_blocks)
    assert place.startswith("passreid_ray/data/read_ahead.py:")
    assert place.endswith("(made_ahead)")
    assert not waits_for_others


def test_a_backward_pass_may_wait_for_the_other_workers() -> None:
    (_, waits_for_others), _ = blocked(block_in_backward)
    assert waits_for_others


def test_stacks_are_of_all_threads_the_one_that_trains_first() -> None:
    _, text = blocked(read_data_that_blocks)
    assert text.startswith("thread own, which trains:\n")
    assert "in read_data_that_blocks" in text.split("\nthread ")[0]
    assert "in read\n" in text.split("\nthread ", maxsplit=1)[1]
    assert "thread MainThread:\n" in text


def test_saying_that_one_gets_on_takes_microseconds() -> None:
    calls, begin = 100_000, time.thread_time()
    for _ in range(calls):
        pulse.get_on()
    assert (time.thread_time() - begin) / calls < 20e-6
