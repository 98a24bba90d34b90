import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import DEVNULL, PIPE
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import ray.train
import torch

from passreid_ray.engines import fit as fit_module
from passreid_ray.engines import shared_storage
from passreid_ray.engines.board import Board
from passreid_ray.engines.fit import _ask_to_leave, _Guarded, fit, outcome_in_thread
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.engines.storage_marker import StorageNotSeen, leave_marker
from passreid_ray.errors import UserError
from tests.waiting import wait_for


def test_ctrl_c_reaches_the_caller_while_the_work_goes_on_elsewhere() -> None:
    ended = threading.Event()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts with "&"
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        outcome_in_thread(lambda: ended.wait(20))
    signal.signal(signal.SIGINT, before)
    ended.set()


def test_the_outcome_is_the_error_or_nothing() -> None:
    assert outcome_in_thread(lambda: time.sleep(0)) is None
    assert isinstance(outcome_in_thread(lambda: torch.zeros(2) @ torch.zeros(3)), RuntimeError)


def raise_user_error(loop_config: dict[str, object]) -> None:
    raise UserError(f"data: {loop_config['what']} is gone")


def test_a_users_mistake_on_a_worker_ends_the_run_at_once_with_its_line(cluster: None, tmp_path: Path) -> None:
    board: Any = Board.remote()
    run = RunConfig(output=tmp_path)
    with pytest.raises(UserError, match=r"^data: it is gone$"):
        fit(raise_user_error, {"what": "it"}, run, WorkersConfig(max_failures=3), board)
    assert ray.get(board.stop_reason.remote()) == "data: it is gone"


def test_a_worker_that_does_not_see_the_marker_fails_before_it_trains_and_does_not_end_the_run(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_storage, "SEEN_SECONDS", 0.0)
    context = SimpleNamespace(get_world_rank=lambda: 0, get_world_size=lambda: 1)
    monkeypatch.setattr(ray.train, "get_context", lambda: context)
    board: Any = Board.remote()
    marker, trained = leave_marker(RunConfig(output=tmp_path)), []
    _Guarded(trained.append, board, None, marker)({"step": 1})
    assert trained == [{"step": 1}]
    leave_marker(RunConfig(output=tmp_path))  # takes the place of the first
    with pytest.raises(StorageNotSeen, match=r"^node \S+ does not see this run's storage "):
        _Guarded(trained.append, board, None, marker)({"step": 2})
    assert trained == [{"step": 1}]
    assert ray.get(board.stop_reason.remote()) is None


@ray.remote(num_cpus=0)
class CutOff:
    def post(self, record: dict[str, Any]) -> None:
        time.sleep(60)

    def ask(self, what: str) -> None:
        time.sleep(60)


def test_a_board_that_does_not_answer_does_not_keep_a_job_from_ending(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "ASK_SECONDS", 0.2)
    board: Any = CutOff.remote()
    start = time.monotonic()
    _ask_to_leave(board)
    assert time.monotonic() - start < 30
    ray.kill(board)


@pytest.fixture
def other_cluster() -> Iterator[None]:
    """A second Ray cluster on this machine, as that of another user or of another job."""
    script = (
        "from passreid_ray.engines.ray_cluster import *; connect(WorkersConfig()); print('up', flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=PIPE, stdout=PIPE, stderr=DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield
        process.communicate()


@ray.remote(num_cpus=0)
class Trial:
    def fit(self, folder: Path) -> None:
        board: Any = Board.remote()
        fit(touch_and_wait, {"file": folder / "begun"}, RunConfig(output=folder), WorkersConfig(), board)


def touch_and_wait(loop_config: dict[str, Any]) -> None:
    loop_config["file"].touch()
    time.sleep(600)


@pytest.mark.usefixtures("other_cluster")
def test_the_cpus_of_a_run_are_free_after_its_process_was_killed_beside_another_cluster(
    cluster: None, tmp_path: Path
) -> None:
    wait_for(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
    trial: Any = Trial.remote()
    trial.fit.remote(tmp_path)
    wait_for((tmp_path / "begun").exists)
    ray.kill(trial)
    wait_for(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"])
