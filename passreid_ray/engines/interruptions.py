"""What Ray Train's controller knows of a run's workers, told to the board; and a checkpoint before they are resized."""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.controller.state import ResizingState, RestartingState
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.exceptions import ControllerError, PreemptionError, WorkerGroupError

from passreid_ray.engines.setbacks import Cause

SAVE_SECONDS = 60.0
"""How long a resize waits for the checkpoint that is asked for before it."""
MAX_REASON = 200


class Interruptions(ControllerCallback, WorkerGroupCallback):
    """Lives in Ray Train's controller, whose loop stands still while a method runs."""

    def __init__(self, board: Any) -> None:
        self._board = board
        self._addresses: dict[int, str] = {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Tell how many workers there are now."""
        workers = worker_group.get_workers()
        self._addresses = {own.distributed_context.world_rank: own.metadata.node_ip for own in workers}
        with _board_may_be_gone():
            ray.get(self._board.begin_group.remote())
            ray.get(self._board.post.remote({"kind": "group", "num_workers": len(workers)}))

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Tell why workers end; have them save before they are resized, for Ray ends them without asking."""
        match current_state:
            case RestartingState(training_failed_error=error):
                cause, why = told(error, self._addresses)
            case ResizingState(scaling_decision=ResizeDecision(num_workers=num)):
                cause, why = "resized", f"from {len(self._addresses)} to {num}"
                with _board_may_be_gone():
                    self._save()
            case _:
                return
        with _board_may_be_gone():
            ray.get(self._board.end_group.remote())
            ray.get(self._board.post.remote({"kind": "interruption", "cause": cause, "why": why}))

    def _save(self) -> None:
        """Ask for a checkpoint, after which workers wait for their end.

        Nothing that workers report to Ray is taken meanwhile, so they must not wait for that.
        """
        ray.get(self._board.ask.remote("wait"))
        deadline = time.monotonic() + SAVE_SECONDS
        # The answer counts, not what is asked: SIGTERM may ask them to leave, before this or meanwhile.
        while not ray.get(self._board.has_answered.remote()) and time.monotonic() < deadline:
            time.sleep(0.05)


def told(error: BaseException, addresses: Mapping[int, str]) -> tuple[Cause, str]:
    """(cause, "rank 1 on ADDRESS: REASON") of what made Ray Train start workers anew; ``addresses`` by rank."""
    match error:
        case PreemptionError(preemption_info=info):
            ranks = ", ".join(_place(rank, addresses) for rank in info.preempted_ranks)
            return "preempted", f"{ranks}: the node is taken away"
        case WorkerGroupError(worker_failures=failures) if failures:
            # When one dies, those who wait for it fail too: it is the one to name.
            rank = min(failures, key=lambda own: (not isinstance(failures[own], WorkerHealthCheckFailedError), own))
            cause: Cause = "preempted" if _is_preempted(failures[rank]) else "failed"
            return cause, f"{_place(rank, addresses)}: {reason(failures[rank])}"
        case ControllerError(controller_failure=failure):
            return "failed", reason(failure)
        case _:
            return "failed", reason(error)


def reason(error: BaseException) -> str:
    """Why a worker failed, in a few words."""
    cause = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error
    if isinstance(cause, RayActorError):
        if cause.preempted:
            return "its node was taken away"
        return "its node died" if "node died" in str(cause) or "node has died" in str(cause) else "its process died"
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    text = f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
    return text if len(text) <= MAX_REASON else f"{text[:MAX_REASON]}..."


def _is_preempted(error: BaseException) -> bool:
    cause = error.health_check_failure if isinstance(error, WorkerHealthCheckFailedError) else error
    return isinstance(cause, RayActorError) and cause.preempted


def _place(rank: int, addresses: Mapping[int, str]) -> str:
    return f"rank {rank} on {addresses[rank]}" if rank in addresses else f"rank {rank}"


@contextlib.contextmanager
def _board_may_be_gone() -> Iterator[None]:
    with contextlib.suppress(RayError):  # then the driver is gone too, and nobody is left to tell
        yield
