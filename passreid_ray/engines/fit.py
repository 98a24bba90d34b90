"""One Ray Train run: restarts crashed workers, turns failures into words."""

import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.exceptions import RayError
from ray.train import FailureConfig
from ray.train.torch import TorchTrainer
from rich.console import Console

from passreid_ray.engines.board import Board, Listener, Monitor
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.engines.task_errors import users_mistake
from passreid_ray.errors import UserError
from passreid_ray.train.run_log import RunLog

TrainWorker = Callable[[dict[str, Any]], None]


class TrainingFailed(UserError):
    """Workers crashed more often than they may be restarted: another attempt may succeed."""


def fit(
    train_worker: TrainWorker, loop_config: dict[str, Any], run: RunConfig, workers: WorkersConfig, board: Any
) -> None:
    """Run ``train_worker`` on every worker until it ends.

    Workers that crash are restarted from the newest checkpoint; a run of the same name and storage is continued.
    Raises ``UserError`` with the reason when a worker raised one, or when restarts are used up, and
    ``KeyboardInterrupt`` on Ctrl-C; the workers end with this process.
    """
    trainer = TorchTrainer(
        _Guarded(train_worker, board),
        train_loop_config=loop_config,
        scaling_config=workers.to_ray(),
        run_config=ray.train.RunConfig(
            name=run.name,
            storage_path=run.storage_path,
            failure_config=FailureConfig(max_failures=workers.max_failures),
        ),
    )
    error = outcome_in_thread(trainer.fit)
    if (reason := _stop_reason(board)) is not None:
        raise UserError(reason)
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
    listener: Listener | None = None,
) -> None:
    """``fit`` with a board, under the key "board" of ``loop_config``, that is read into logs and progress meanwhile.

    ``listener`` is told what is logged.
    """
    board: Any = Board.remote()
    log = RunLog(run.folder)
    with Monitor(board, log, console, num_rows=num_rows, max_bad_share=max_bad_share, listener=listener):
        fit(train_worker, {**loop_config, "board": board}, run, workers, board)


def refusal(step: int, in_a_row: int, folder: Path, rate: str = "optimizer.lr") -> str:
    """Why a run stops whose steps are refused; ``rate`` is the setting of its learning rate."""
    return (
        f"stopped after step {step}: loss or gradient was not finite {in_a_row} times in a row. The weights before "
        f"that are in {folder}; lower {rate} or set precision=fp32"
    )


def _stop_reason(board: Any) -> str | None:
    try:
        return ray.get(board.stop_reason.remote())
    except RayError:
        return None  # the board went down with the cluster


def outcome_in_thread(function: Callable[[], Any]) -> BaseException | None:
    """Call ``function`` in a thread and wait for its end; what it raised, if anything."""
    # In the main thread Ray Train would take over Ctrl-C, and end the process without a word and with status 1.
    outcome: list[BaseException] = []

    def call() -> None:
        try:
            function()
        except BaseException as error:  # noqa: BLE001 whatever ended the run, the user gets its reason and the log
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join()
    return outcome[0] if outcome else None


class _Guarded:
    """Calls the training function; what only the user can mend is kept on the board, so that restarts end at once."""

    def __init__(self, train_worker: TrainWorker, board: Any) -> None:
        self._train_worker = train_worker
        self._board = board

    def __call__(self, loop_config: dict[str, Any]) -> None:
        if ray.get(self._board.stop_reason.remote()) is not None:
            return
        try:
            self._train_worker(loop_config)
        except Exception as error:
            # A task that died is no mistake: another attempt may have the memory or the machine that was missing.
            reason = users_mistake(error)
            if reason is not None:
                ray.get(self._board.stop.remote(str(reason)))
            raise


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
