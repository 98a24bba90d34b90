import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from passreid_ray.engines.board import Board
from passreid_ray.engines.fit import fit, outcome_in_thread
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.errors import UserError


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
