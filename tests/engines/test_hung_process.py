import subprocess
import sys
from collections.abc import Iterator

import psutil
import pytest
import ray

from passreid_ray.engines.hung_process import end, look_at
from passreid_ray.train.beats import WorkerProcess

SLEEPS = """
import time
held = bytearray(512 * 2**20)
held[::4096] = b"x" * len(held[::4096])
print("ready", flush=True)
time.sleep(300)
"""
"""It holds memory: the kernel takes time to end it, as it does with a real worker, and shows no command line then."""


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    """A process that sleeps, with the title of a training worker."""
    command = [sys.executable, "-c", SLEEPS, "ray::RayTrainWorker"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "ready\n"
        yield psutil.Process(started.pid)
        started.kill()


def told(process: psutil.Process, **changes: object) -> WorkerProcess:
    values = {"rank": 0, "node_id": ray.get_runtime_context().get_node_id(), "address": "here"}
    values |= {"pid": process.pid, "created_seconds": process.create_time(), **changes}
    return WorkerProcess(**values)


def test_a_worker_is_seen_and_ended_on_its_machine(cluster: None, sleeper: psutil.Process) -> None:
    process = told(sleeper)
    assert look_at(process).is_there
    assert end(process) == ""
    assert not sleeper.is_running() or sleeper.status() == psutil.STATUS_ZOMBIE
    assert not look_at(process).is_there
    assert end(process) == ""


def test_another_process_that_has_the_pid_now_is_left_alone(cluster: None, sleeper: psutil.Process) -> None:
    earlier = told(sleeper, created_seconds=sleeper.create_time() - 60)
    assert not look_at(earlier).is_there
    assert end(earlier) == ""
    assert not look_at(told(psutil.Process())).is_there  # this one is no training worker
    assert sleeper.status() != psutil.STATUS_ZOMBIE


def test_a_machine_that_is_not_there_is_said_to_be_silent(cluster: None, sleeper: psutil.Process) -> None:
    process = told(sleeper, node_id="0" * 56)
    assert look_at(process).state == "its machine does not answer either"
    assert end(process) == "its machine does not answer"
