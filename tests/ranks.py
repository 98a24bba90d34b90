"""Run a function on several gloo ranks of this machine."""

import os
import pickle
import tempfile
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

_TIMEOUT = timedelta(seconds=60)


def run_on_ranks(function: Callable[..., Any], *args: Any, world_size: int = 2) -> list[Any]:
    """What ``function(*args)`` returns on each of ``world_size`` ranks, in rank order.

    ``function`` is a module-level function; it and what it takes and returns are pickled. An error on a rank, failed
    assertions included, is raised here with that rank's traceback.
    """
    # Ranks are forked from a small server that has torch imported: a second per test less than spawning them.
    get_context("forkserver").set_forkserver_preload(["torch.distributed", "tests.ranks"])
    with tempfile.TemporaryDirectory() as folder:
        start_processes(_run_rank, (function, args, world_size, folder), nprocs=world_size, start_method="forkserver")
        return [pickle.loads(_result_path(folder, rank).read_bytes()) for rank in range(world_size)]


def _run_rank(rank: int, function: Callable[..., Any], args: tuple[Any, ...], world_size: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/init", rank=rank, world_size=world_size, timeout=_TIMEOUT
    )
    # A rank that had nothing to send would be gone, and its connections closed, before a slower one has made its own.
    dist.barrier()
    try:
        _result_path(folder, rank).write_bytes(pickle.dumps(function(*args)))
    finally:
        dist.destroy_process_group()


def _result_path(folder: str, rank: int) -> Path:
    return Path(folder) / f"result{rank}.pickle"
