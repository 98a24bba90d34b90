import os
import subprocess
import sys

import psutil
import pytest
import ray
import ray.data
from ray.data import DataContext

from passreid_ray.engines import ray_cluster as cluster_module
from passreid_ray.engines.ray_cluster import WorkersConfig, connect, data_share, num_cores
from passreid_ray.errors import UserError
from tests.processes import own_processes


def test_a_worker_gets_its_share_of_the_cores() -> None:
    assert WorkersConfig(num_workers=2, threads=3).threads_per_worker() == 3
    assert WorkersConfig(num_workers=1).threads_per_worker() == num_cores()
    assert WorkersConfig(num_workers=10_000).threads_per_worker() == 1


@pytest.mark.parametrize(
    ("num_gpus", "use_gpu", "expected"), [(0, "auto", False), (1, "auto", False), (2, "auto", True), (2, False, False)]
)
def test_gpus_are_taken_when_there_is_one_for_every_worker(
    monkeypatch: pytest.MonkeyPatch, num_gpus: int, use_gpu: bool, expected: bool
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": float(num_gpus), "CPU": 3.0})
    scaling = WorkersConfig(num_workers=2, use_gpu=use_gpu).to_ray()
    assert (scaling.use_gpu, scaling.num_workers) == (expected, 2)


def test_a_cluster_without_a_cpu_for_the_data_is_told_instead_of_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(UserError, match="2 workers take a CPU each and data needs one more; the cluster has 2"):
        WorkersConfig(num_workers=2).to_ray()


def test_gpus_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0, "CPU": 3.0})
    with pytest.raises(UserError, match="2 workers need a GPU each, the cluster has 1"):
        WorkersConfig(num_workers=2, use_gpu=True).to_ray()


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("127.0.0.1:1", "nothing answers at 127.0.0.1:1 "),
        ("nowhere.invalid:6379", "nothing answers at nowhere.invalid:6379 "),
        ("http://127.0.0.1:8265", "http://127.0.0.1:8265 is not the address of a cluster's head"),
        ("ray://127.0.0.1:10001", "ray://127.0.0.1:10001 is not the address of a cluster's head"),
        ("junk", "'junk' is no address"),
    ],
)
def test_an_address_where_no_cluster_is_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, address: str, told: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(UserError) as error:
        connect(WorkersConfig())
    assert str(error.value).startswith(f"RAY_ADDRESS: {told}")
    assert "unset RAY_ADDRESS to run on this machine" in str(error.value)


def test_a_local_cluster_that_does_not_start_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise Exception("The current node timed out during startup.\nMore.")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"Ray does not start on this machine: .* timed out during startup\. Its logs"):
        connect(WorkersConfig())


def test_a_second_connection_is_the_first(cluster: None) -> None:
    node = ray.get_runtime_context().get_node_id()
    connect(WorkersConfig(num_workers=2))
    assert ray.get_runtime_context().get_node_id() == node


def test_data_and_training_workers_do_not_wait_for_each_other(cluster: None) -> None:
    assert ray.cluster_resources()["CPU"] == num_cores() + 2
    assert data_share(2).cpus == max(1.0, num_cores() / 2)
    assert not DataContext.get_current().enable_progress_bars


def test_a_local_cluster_and_its_dashboard_have_loopback_addresses(cluster: None) -> None:
    assert [node["NodeManagerAddress"] for node in ray.nodes()] == [cluster_module.NODE_ADDRESS]
    listening = [
        connection.laddr.ip
        for process in own_processes("dashboard.py")
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert cluster_module.DASHBOARD_HOST in listening  # beside Ray's exporters of metrics, which listen everywhere


def test_usage_statistics_are_off_and_token_authentication_is_on(cluster: None) -> None:
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert os.environ.get("RAY_AUTH_MODE", "token") == "token"


def test_starting_and_ending_a_local_cluster_says_nothing() -> None:
    script = (
        "from passreid_ray.engines.ray_cluster import WorkersConfig, connect\n"
        "import ray\n"
        "connect(WorkersConfig())\n"
        "assert ray.data.range(4).map_batches(lambda batch: batch).count() == 4\n"
    )
    environment = {**os.environ, "RAY_ADDRESS": ""}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
