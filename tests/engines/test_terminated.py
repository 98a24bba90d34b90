import os
import signal
import threading
import time

import pytest

from passreid_ray.engines.fit import outcome_in_thread
from passreid_ray.engines.terminated import Terminated, keeping_sigterm, noticing_sigterm, terminated_by_sigterm


def send_sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)  # handlers run between two instructions of the main thread


def test_sigterm_ends_what_runs_and_counts_as_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as error, terminated_by_sigterm():
        send_sigterm()
    assert error.type is Terminated
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_first_sigterm_is_noticed_and_the_second_one_ends() -> None:
    with noticing_sigterm() as noticed:
        send_sigterm()
        assert noticed.is_set()
        with pytest.raises(Terminated):
            send_sigterm()


def test_what_starts_does_not_take_sigterm_over() -> None:
    with terminated_by_sigterm():
        with keeping_sigterm():
            signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
        with pytest.raises(Terminated):
            send_sigterm()


def test_other_threads_leave_signals_alone() -> None:
    before, seen = signal.getsignal(signal.SIGTERM), []

    def elsewhere() -> None:
        with terminated_by_sigterm(), noticing_sigterm() as noticed, keeping_sigterm():
            seen.append(noticed.is_set())

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [False]
    assert signal.getsignal(signal.SIGTERM) == before


def test_work_that_is_told_to_end_is_asked_to_and_waited_for() -> None:
    asked, told = threading.Event(), threading.Event()
    threading.Timer(0.2, told.set).start()
    ended = []

    def work() -> None:
        asked.wait(20)
        ended.append(True)

    assert outcome_in_thread(work, told, asked.set) is None
    assert ended == [True]


def test_work_that_does_not_end_when_asked_to_is_left_behind() -> None:
    ended, told = threading.Event(), threading.Event()
    told.set()
    outcome_in_thread(lambda: ended.wait(20), told, patience_seconds=0.1)
    assert not ended.is_set()
    ended.set()
