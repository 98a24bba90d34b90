"""One Ray Train run: restarts crashed workers, turns failures into words."""

import contextlib
import os
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import ray
import ray.train
import ray.util
from ray.exceptions import RayError
from ray.train import FailureConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import ENV_VARS_TO_PROPAGATE
from rich.console import Console

from passreid_ray.engines.board import Listener, Monitor, new_board
from passreid_ray.engines.hang_watch import HangWatch
from passreid_ray.engines.interruptions import Interruptions
from passreid_ray.engines.live_metrics import RunGauges
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.engines.shared_storage import check_storage_is_shared
from passreid_ray.engines.storage_marker import StorageMarker, leave_marker
from passreid_ray.engines.task_errors import users_mistake
from passreid_ray.engines.terminated import Terminated, noticing_sigterm
from passreid_ray.errors import UserError
from passreid_ray.train.heartbeat import beating
from passreid_ray.train.node_network import NodeTorchConfig
from passreid_ray.train.orders import Left
from passreid_ray.train.run_log import RunLog

TrainWorker = Callable[[dict[str, Any]], None]
POLL_SECONDS = 0.2
LEAVE_SECONDS = 30.0
"""How long workers have for a checkpoint after SIGTERM."""
CLUSTER_ADDRESS = "RAY_API_SERVER_ADDRESS"
"""Environment variable: which cluster Ray's state API asks."""
ASK_SECONDS = 5.0
"""How long the board has for an answer then: its node may be cut off."""
RANGE_START_SECONDS = "20"
"""How long a group waits for its place when its size follows the nodes: Ray counts them every 20 s, so a node that is
gone may still be counted; Ray's own 60 s would only be lost."""


class TrainingFailed(UserError):
    """Workers crashed more often than they may be restarted, or hang: another process may succeed."""


def fit(
    train_worker: TrainWorker,
    loop_config: dict[str, Any],
    run: RunConfig,
    workers: WorkersConfig,
    board: Any,
    gave_up: threading.Event | None = None,
    marker: StorageMarker | None = None,
) -> None:
    """Run ``train_worker`` on every worker until it ends.

    Workers that crash are restarted from the newest checkpoint; a run of the same name and storage is continued.
    Raises ``UserError`` with the reason when a worker raised one, ``TrainingFailed`` when restarts are used up, and
    ``KeyboardInterrupt`` on Ctrl-C; the workers end with this process. On SIGTERM they save a checkpoint first, if that
    takes less than ``LEAVE_SECONDS``; then ``Terminated`` is raised. Once ``gave_up`` is set they are not waited for,
    and ``TrainingFailed`` has the reason: a thread of this process still trains.
    A worker that does not see ``marker`` in the run's storage counts as crashed before it trains.
    """
    _tell_cleaner_the_address()
    if workers.is_range:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", RANGE_START_SECONDS)
    trainer = TorchTrainer(
        _Guarded(train_worker, board, workers.hang_seconds, marker),
        train_loop_config=loop_config,
        torch_config=NodeTorchConfig(),
        scaling_config=workers.to_ray(),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=run.storage_path,
            # A node that is taken away says nothing about the run.
            failure_config=FailureConfig(max_failures=workers.max_failures, max_preemption_failures=-1),
            callbacks=[Interruptions(board)],  # pyright: ignore[reportArgumentType] any callback of Ray Train is taken
        ),
    )
    with noticing_sigterm() as told_to_end:
        error = outcome_in_thread(trainer.fit, told_to_end, partial(_ask_to_leave, board), gave_up=gave_up)
    if told_to_end.is_set():
        raise Terminated
    if (reason := _stop_reason(board)) is not None:
        raise TrainingFailed(reason) if gave_up is not None and gave_up.is_set() else UserError(reason)
    if error is not None:
        path = run.folder / "error.log"
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
        raise TrainingFailed(
            f"training failed and restarts did not help: {_last_line(error)}. All of it is in {path}; "
            "the same command goes on from the last checkpoint"
        )


def fit_and_watch(
    train_worker: TrainWorker,
    loop_config: dict[str, Any],
    run: RunConfig,
    workers: WorkersConfig,
    console: Console,
    *,
    num_rows: int,
    max_bad_share: float,
    job_name: str,
    listener: Listener | None = None,
) -> None:
    """``fit`` with a board, under the key "board" of ``loop_config``, that is read into logs and progress meanwhile.

    ``listener`` is told what is logged; without one, the gauges of a run of ``job_name`` are. Raises ``UserError``
    before anything else when a node of the cluster does not share the run's storage.
    """
    check_storage_is_shared(run, workers)
    marker = None if workers.num_workers == 0 else leave_marker(run)
    if (warning := workers.gpu_warning()) is not None:
        console.print(warning, markup=False)
    board = new_board()
    log = RunLog(run.folder)
    told = RunGauges(job_name, run.name) if listener is None else nullcontext(listener)
    with (
        told as hears,
        Monitor(board, log, console, num_rows=num_rows, max_bad_share=max_bad_share, listener=hears),
        HangWatch(board, workers, run.folder) as watch,
    ):
        fit(train_worker, {**loop_config, "board": board}, run, workers, board, watch.gave_up, marker)


def refusal(step: int, in_a_row: int, folder: Path, rate: str = "optimizer.lr") -> str:
    """Why a run stops whose steps are refused; ``rate`` is the setting of its learning rate."""
    return (
        f"stopped after step {step}: loss or gradient was not finite {in_a_row} times in a row. The weights before "
        f"that are in {folder}; lower {rate} or set precision=fp32"
    )


def _tell_cleaner_the_address() -> None:
    # What Ray Train leaves behind to free the workers' CPUs when this process is killed looks for a cluster on the
    # machine. Beside a second one it would find two and give up, or the wrong one and take the run for dead.
    os.environ[CLUSTER_ADDRESS] = ray.get_runtime_context().gcs_address
    ENV_VARS_TO_PROPAGATE.add(CLUSTER_ADDRESS)


def _ask_to_leave(board: Any) -> None:
    with contextlib.suppress(RayError):
        text = f"SIGTERM: saving a checkpoint and stopping, within {LEAVE_SECONDS:g} s"
        asked = [board.post.remote({"kind": "say", "text": text}), board.ask.remote("leave")]
        ray.get(asked, timeout=ASK_SECONDS)


def _stop_reason(board: Any) -> str | None:
    try:
        return ray.get(board.stop_reason.remote())
    except RayError:
        return None  # the board went down with the cluster


def outcome_in_thread(
    function: Callable[[], Any],
    told_to_end: threading.Event | None = None,
    ask_to_end: Callable[[], None] = lambda: None,
    patience_seconds: float = LEAVE_SECONDS,
    gave_up: threading.Event | None = None,
) -> BaseException | None:
    """Call ``function`` in a thread and wait for its end, or for ``gave_up``; what it raised, if anything.

    Once ``told_to_end`` is set, calls ``ask_to_end`` and waits no longer than ``patience_seconds``.
    """
    # In the main thread Ray Train would take over Ctrl-C, and end the process without a word and with status 1.
    outcome: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 whatever ended the run, the user gets its reason and the log
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    told_to_end, gave_up = told_to_end or threading.Event(), gave_up or threading.Event()
    while thread.is_alive() and not (told_to_end.is_set() or gave_up.is_set()):
        thread.join(POLL_SECONDS)
    if told_to_end.is_set() and thread.is_alive():
        ask_to_end()
        thread.join(patience_seconds)
    return outcome[0] if outcome else None


class _Guarded:
    """Calls the training function; what only the user can mend is kept on the board, so that restarts end at once."""

    def __init__(
        self, train_worker: TrainWorker, board: Any, hang_seconds: float | None, marker: StorageMarker | None
    ) -> None:
        self._train_worker = train_worker
        self._board = board
        self._hang_seconds = hang_seconds
        self._marker = marker

    def __call__(self, loop_config: dict[str, Any]) -> None:
        if ray.get(self._board.stop_reason.remote()) is not None:
            return
        # Before anything that may fail or wait for other workers: then it is known where that was.
        context, address = ray.train.get_context(), ray.util.get_node_ip_address()
        place = {"rank": context.get_world_rank(), "world_size": context.get_world_size(), "address": address}
        self._board.post.remote({"kind": "worker", **place})
        try:
            with beating(self._board, self._hang_seconds):
                if self._marker is not None:  # without the storage it would find no checkpoint, and begin again
                    self._marker.check(address)
                self._train_worker(loop_config)
        except Left:
            return
        except Exception as error:
            # A task that died is no mistake: another attempt may have the memory or the machine that was missing.
            reason = users_mistake(error)
            if reason is not None:
                ray.get(self._board.stop.remote(str(reason)))
            raise


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
