import threading
import time
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from passreid_ray.engines import hang_watch
from passreid_ray.engines.board import Board
from passreid_ray.engines.fit import TrainingFailed, fit_and_watch
from passreid_ray.engines.hang_watch import HangWatch
from passreid_ray.engines.hangs import Hang
from passreid_ray.engines.hung_process import Seen
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.train.beats import Beat, Heard, WorkerProcess
from passreid_ray.train.pulse import EVALUATION, STEP, pulse

released = threading.Event()


def run(train_worker: Any, folder: Path, hang_seconds: float) -> str:
    """What is printed of a run whose worker is this process."""
    console = Console(file=StringIO(), soft_wrap=True)
    workers = WorkersConfig(num_workers=0, hang_seconds=hang_seconds)
    fit_and_watch(
        train_worker, {}, RunConfig(output=folder), workers, console, num_rows=1, max_bad_share=0, job_name="test"
    )
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def blocks_in_its_third_step(loop_config: dict[str, Any]) -> None:
    pulse.count_step()
    with pulse.doing(STEP):
        pulse.count_step()
        released.wait(60)


def computes_for_long(loop_config: dict[str, Any]) -> None:
    with pulse.doing(EVALUATION):
        end = time.monotonic() + 6
        while time.monotonic() < end:
            pass


def test_a_hang_of_this_process_itself_is_named_with_its_stack_and_ends_the_run(cluster: None, tmp_path: Path) -> None:
    # Not any UserError: a sweep tries the trial again in another process.
    with pytest.raises(TrainingFailed) as caught:
        run(blocks_in_its_third_step, tmp_path, hang_seconds=2)
    released.set()
    line = str(caught.value)
    assert line.startswith("rank 0 on ")
    assert " hangs after step 2: no progress for " in line
    assert " s. It is in a step, at passreid_ray/engines/fit.py:" in line
    assert line.endswith("so the run ends; the same command goes on from what was saved")
    assert "in blocks_in_its_third_step" in (tmp_path / "pretrain" / "stacks-2.txt").read_text()


def test_work_that_computes_may_take_longer_than_the_limit(cluster: None, tmp_path: Path) -> None:
    assert "hangs" not in run(computes_for_long, tmp_path, hang_seconds=2)
    assert not list((tmp_path / "pretrain").glob("stacks-*"))


def test_several_machines_that_do_not_answer_are_asked_at_the_same_time(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_there = threading.Barrier(3, timeout=20)  # broken, and so an error, when one is asked after the other

    def look_at(process: WorkerProcess) -> Seen:
        all_there.wait()
        return Seen(f"state {process.rank}")

    def end(process: WorkerProcess) -> str:
        all_there.wait()
        return f"failure {process.rank}"

    monkeypatch.setattr(hang_watch, "look_at", look_at)
    monkeypatch.setattr(hang_watch, "end", end)
    processes = [WorkerProcess(rank, "a", "127.0.0.2", rank, 0.0) for rank in range(3)]
    workers = tuple(Heard(Beat(own, STEP, 0, 4, 9.0, "", waits_for_others=False), 9.0) for own in processes)
    board: Any = Board.remote()
    watch = HangWatch(board, WorkersConfig(num_workers=3, hang_seconds=9.0), tmp_path)
    watch._handle(Hang(workers, are_silent=True, workers=workers, step=4))
    told = [post["text"] for post in ray.get(board.take.remote())]
    assert [f"(state {rank})" in line and f"failure {rank}" in line for rank, line in enumerate(told)] == [True] * 3
