import threading
import time
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.controller.state import ResizingState, RestartingState, RunningState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError
from ray.train.v2.api.preemption import PreemptionInfo

from passreid_ray.engines.board import Board
from passreid_ray.engines.interruptions import MAX_REASON, Interruptions, reason, told
from passreid_ray.train.beats import Beat, WorkerProcess
from passreid_ray.train.pulse import STEP

ADDRESSES = {0: "127.0.0.2", 1: "127.0.0.3"}
DIED = WorkerHealthCheckFailedError("Actor of rank 1 failed its check.", ActorDiedError())
RESET = RuntimeError("Connection closed by peer [127.0.0.3]:4242\nmore")


def test_the_worker_that_died_is_named_and_not_those_that_waited_for_it() -> None:
    error = WorkerGroupError("two failed", {0: RESET, 1: DIED})
    assert told(error, ADDRESSES) == ("failed", "rank 1 on 127.0.0.3: its process died")


def test_an_error_is_told_by_its_kind_and_first_line() -> None:
    error = WorkerGroupError("one failed", {0: RESET})
    assert told(error, ADDRESSES) == (
        "failed",
        "rank 0 on 127.0.0.2: RuntimeError: Connection closed by peer [127.0.0.3]:4242",
    )


def test_a_worker_whose_address_is_not_known_is_named_by_its_rank() -> None:
    assert told(WorkerGroupError("", {3: KeyError()}), ADDRESSES) == ("failed", "rank 3: KeyError")


def test_a_node_that_is_taken_away_is_a_preemption_with_all_its_ranks() -> None:
    info = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a": [1], "b": [0]})
    assert told(PreemptionError(info), ADDRESSES) == (
        "preempted",
        "rank 0 on 127.0.0.2, rank 1 on 127.0.0.3: the node is taken away",
    )


def test_a_failure_of_ray_itself_is_told_too() -> None:
    cause, why = told(ControllerError(RuntimeError("no room")), ADDRESSES)
    assert cause == "failed"
    assert "no room" in why


def test_a_long_reason_is_cut() -> None:
    assert len(reason(ValueError("x" * 1000))) == MAX_REASON + len("...")


@pytest.mark.parametrize(
    ("message", "expected"),
    [("The actor died because its node has died.", "its node died"), ("The process is gone.", "its process died")],
)
def test_a_node_that_died_is_told_from_a_process_that_died(message: str, expected: str) -> None:
    class Died(ActorDiedError):
        def __str__(self) -> str:
            return message

    assert reason(WorkerHealthCheckFailedError("", Died())) == expected


@pytest.mark.parametrize("asked_first", ["leave", "wait"])
def test_a_resize_waits_for_the_checkpoint_also_when_workers_are_told_to_leave(cluster: None, asked_first: str) -> None:
    board: Any = Board.remote()
    resizing = ResizingState(ResizeDecision(num_workers=3, resources_per_worker={}))
    if asked_first == "leave":
        ray.get(board.ask.remote("leave"))
    thread = threading.Thread(
        target=Interruptions(board).after_controller_state_update, args=(RunningState(), resizing), daemon=True
    )
    thread.start()
    while ray.get(board.asked.remote()) is None:
        time.sleep(0.02)
    ray.get(board.ask.remote("leave"))
    thread.join(0.5)
    assert thread.is_alive()  # nobody has saved
    ray.get(board.answer.remote())
    thread.join(20)
    assert not thread.is_alive()


def test_workers_that_ray_restarts_are_not_missed_until_others_begin(cluster: None) -> None:
    board: Any = Board.remote()
    beat = Beat(WorkerProcess(0, "a", "127.0.0.2", 1, 2.0), STEP, 0, 3, 0.0, "", waits_for_others=False)
    ray.get(board.beat.remote(beat))
    assert len(ray.get(board.beats.remote())) == 1
    restarting = RestartingState(training_failed_error=WorkerGroupError("one failed", {1: DIED}))
    Interruptions(board).after_controller_state_update(RunningState(), restarting)
    ray.get(board.beat.remote(beat))  # one that is left, and waits for the one that died
    assert ray.get(board.beats.remote()) == []
    ray.get(board.begin_group.remote())
    ray.get(board.beat.remote(beat))
    assert len(ray.get(board.beats.remote())) == 1
