"""Nodes that die, hang, come back or lie about the time while a run trains on them.

Each ends with the job done and the result equal, to the bit, to that of a run which nothing disturbed.
"""

import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.fault_records import write_record
from tests.cluster.hosts import HEAD, Hosts
from tests.cluster.ray_nodes import ENVIRONMENT, RayNodes
from tests.cluster.watched_run import LIMIT_SECONDS, Recovery, WatchedRun, assert_equal

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1500)]
FAULT_STEP = 15
"""After the first checkpoints, and long before the end."""
GCS_DOWN_SECONDS = 5.0
EQUAL = "done, equal to the bit"


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayNodes]:
    folder = tmp_path_factory.mktemp("hosts")
    with Hosts(3, folder, name="prc", environment=ENVIRONMENT, shm_bytes=300_000_000) as hosts:
        nodes = RayNodes(hosts)
        nodes.start_redis()
        nodes.start_head()
        nodes.complete()
        yield nodes


@pytest.fixture(scope="module")
def undisturbed(started: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> WatchedRun:
    """A run of two workers that nothing disturbed, on the same cluster."""
    with WatchedRun(started, tmp_path_factory.mktemp("undisturbed")) as run:
        run.finish()
    assert run.continued() == []
    return run


@pytest.fixture
def nodes(started: RayNodes, undisturbed: WatchedRun) -> RayNodes:
    """The cluster with all its nodes, whatever the test before has done to them."""
    started.complete()
    return started


def record(fault: str, recovery: Recovery) -> None:
    write_record(fault, steps_lost=recovery.steps_lost, seconds=recovery.seconds, ends=EQUAL)


def test_a_host_that_crashes_is_done_without_and_used_again_when_it_is_back(
    nodes: RayNodes, undisturbed: WatchedRun, tmp_path: Path
) -> None:
    with WatchedRun(nodes, tmp_path) as run:
        run.wait_for_step(FAULT_STEP)
        assert nodes.processes(HEAD, "ray::Board")  # elsewhere it could die with a host
        victim = nodes.training_hosts()[0]
        with run.fault() as cost:
            nodes.hosts.crash(victim)
        nodes.hosts.revive(victim)
        nodes.start_worker(victim)
        assert nodes.hosts.address(victim) in nodes.addresses()
        run.finish()
    assert_equal(run, undisturbed)
    record("a host with a worker crashes", cost[0])


def test_a_killed_raylet_costs_the_steps_since_the_last_checkpoint(
    nodes: RayNodes, undisturbed: WatchedRun, tmp_path: Path
) -> None:
    with WatchedRun(nodes, tmp_path) as run:
        run.wait_for_step(FAULT_STEP)
        with run.fault() as cost:
            nodes.kill(nodes.training_hosts()[0], "raylet")
        run.finish()
    assert_equal(run, undisturbed)
    record("SIGKILL of the raylet of a node with a worker", cost[0])


def test_a_killed_worker_on_another_host_is_started_again(
    nodes: RayNodes, undisturbed: WatchedRun, tmp_path: Path
) -> None:
    with WatchedRun(nodes, tmp_path) as run:
        run.wait_for_step(FAULT_STEP)
        with run.fault() as cost:
            nodes.kill(nodes.training_hosts()[0], "ray::RayTrainWorker")
        run.finish()
    assert_equal(run, undisturbed)
    record("SIGKILL of a worker on another host than the driver's", cost[0])


def test_a_node_that_is_cut_off_is_done_without_and_ends_itself_when_it_hears_of_it(
    nodes: RayNodes, undisturbed: WatchedRun, tmp_path: Path
) -> None:
    with WatchedRun(nodes, tmp_path) as run:
        run.wait_for_step(FAULT_STEP)
        victim = nodes.training_hosts()[0]
        try:
            with run.fault() as cost:
                nodes.hosts.cut(victim)
        finally:
            nodes.hosts.mend(victim)
        deadline = time.monotonic() + LIMIT_SECONDS
        while nodes.processes(victim, "raylet") or nodes.processes(victim, "ray::RayTrainWorker"):
            assert time.monotonic() < deadline, nodes.logs()
            time.sleep(0.2)
        nodes.start_worker(victim)
        assert nodes.hosts.address(victim) in nodes.addresses()
        run.finish()
    assert_equal(run, undisturbed)
    record("a node with a worker is cut off from the network", cost[0])


def test_a_slow_node_makes_a_run_slow_and_nothing_else(
    nodes: RayNodes, undisturbed: WatchedRun, tmp_path: Path
) -> None:
    num_steps = 24

    def seconds_of_steps(run: WatchedRun) -> float:
        first, start = run.step, time.monotonic()
        run.wait_for_step(first + num_steps)
        return time.monotonic() - start

    with WatchedRun(nodes, tmp_path) as run:
        run.wait_for_step(FAULT_STEP)
        victim = nodes.training_hosts()[0]
        usual_seconds = seconds_of_steps(run)
        try:
            nodes.hosts.slow_cpu(victim, 0.15)
            nodes.hosts.slow_link(victim, 20)
            slow_seconds = seconds_of_steps(run)
        finally:
            nodes.hosts.slow_cpu(victim, None)
            nodes.hosts.slow_link(victim, None)
        run.finish()
    assert run.continued() == []
    assert_equal(run, undisturbed)
    ends = f"{EQUAL}; {num_steps} steps took {slow_seconds:.1f} s instead of {usual_seconds:.1f} s meanwhile"
    write_record("a node with a worker has 0.15 of a CPU and 20 Mbit/s", ends=ends)


def test_a_gcs_server_that_is_started_again_finds_the_run_going_on(
    nodes: RayNodes, undisturbed: WatchedRun, tmp_path: Path
) -> None:
    with WatchedRun(nodes, tmp_path) as run:
        run.wait_for_step(FAULT_STEP)
        start, step = time.monotonic(), run.step
        nodes.restart_gcs(after_seconds=GCS_DOWN_SECONDS)
        back = run.step
        run.wait_for_step(max(step + 12, back + 1))  # over a checkpoint, which the controller must hear of
        seconds = time.monotonic() - start
        run.finish()
    assert run.continued() == []
    assert_equal(run, undisturbed)
    assert len(nodes.addresses()) == 1 + len(nodes.hosts.workers)
    fault = f"SIGKILL of the head's gcs_server, back after {GCS_DOWN_SECONDS:.0f} s, Redis there"
    write_record(fault, steps_lost=0, seconds=seconds, ends=EQUAL)


def test_the_same_command_goes_on_when_the_head_with_the_driver_crashed(
    nodes: RayNodes, undisturbed: WatchedRun, tmp_path: Path
) -> None:
    with WatchedRun(nodes, tmp_path) as run:
        run.wait_for_step(FAULT_STEP)
        with run.fault() as cost:
            nodes.hosts.crash(HEAD)
            run.wait_for_death()
            nodes.hosts.revive(HEAD)
            nodes.start_head()
            run.give_again()
        run.finish()
        assert len(nodes.addresses()) == 1 + len(nodes.hosts.workers)
    assert_equal(run, undisturbed)
    record("the head crashes with the driver, Redis elsewhere; the same command again", cost[0])


def test_a_node_whose_clock_is_hours_ahead_takes_part(nodes: RayNodes, undisturbed: WatchedRun, tmp_path: Path) -> None:
    library = tmp_path / "wrong_clock.so"
    source = Path(__file__).with_name("wrong_clock.c")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(source), "-ldl"], check=True)
    absent, ahead = nodes.hosts.workers[0], nodes.hosts.workers[1]
    clock = {"LD_PRELOAD": str(library), "CLOCK_OFFSET_SECONDS": str(5 * 3600)}
    assert int(nodes.hosts.run(ahead, "date +%s", environment=clock).stdout) > time.time() + 4 * 3600
    for number in (absent, ahead):
        nodes.kill(number, "raylet")
    nodes.start_worker(ahead, clock)
    try:
        (raylet,) = nodes.processes(ahead, "raylet")
        assert any(library.name in mapped.path for mapped in raylet.memory_maps())
        # Three CPUs are left for two workers and their data: every node takes part.
        with WatchedRun(nodes, tmp_path) as run:
            run.finish()
    finally:
        nodes.kill(ahead, "raylet")
    assert run.continued() == []
    assert_equal(run, undisturbed)
    write_record("a node's clock is 5 hours ahead", ends=EQUAL)
