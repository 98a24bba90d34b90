import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
import ray.data
from ray.data import DataContext
from ray.exceptions import AuthenticationError

from passreid_ray.config import build, load_config, to_toml
from passreid_ray.engines import ray_cluster as cluster_module
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.engines.ray_cluster import WorkersConfig, connect, data_share, num_cores, spare_cpus
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


def test_a_range_of_workers_starts_with_the_least_and_shares_for_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = build(WorkersConfig, {"num_workers": [2, 5], "resize_seconds": 7})
    assert (workers.is_range, list(workers.sizes), workers.world_size) == (True, [2, 3, 4, 5], 5)
    assert workers.described == "2 to 5 workers"
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 2.0, "CPU": 2.0})
    scaling = workers.to_ray()
    assert (scaling.num_workers, scaling.use_gpu, scaling.elastic_resize_monitor_interval_s) == ((2, 5), True, 7)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 1.0})
    with pytest.raises(UserError, match="2 workers take a CPU each; the cluster has 1"):
        workers.to_ray()


@pytest.mark.parametrize(("num_workers", "sizes"), [(0, [1]), (1, [1]), (3, [3]), ((1, 1), [1])])
def test_one_number_of_workers_is_one_size(num_workers: int | tuple[int, int], sizes: list[int]) -> None:
    assert list(WorkersConfig(num_workers=num_workers).sizes) == sizes


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("[3, 1]", r"workers.num_workers: expected \[min, max\] with min <= max, got \[3, 1\]"),
        ("[0, 2]", "workers.num_workers.*expected at least 1"),
        ("[1, 2, 3]", "workers.num_workers: expected .* 2 values"),
        ("-1", "workers.num_workers: expected at least 0"),
        ("many", "workers.num_workers: expected a whole number or expected a list|a whole number or a list"),
    ],
)
def test_what_is_no_number_of_workers_is_told(value: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load_config(PretrainConfig, [f"workers.num_workers={value}"])


def test_a_range_is_read_from_the_command_line_and_from_a_written_preset(tmp_path: Path) -> None:
    config = load_config(PretrainConfig, ["workers.num_workers=[1,3]"])
    assert config.workers.num_workers == (1, 3)
    (tmp_path / "written.toml").write_text(to_toml(config))
    assert load_config(PretrainConfig, [str(tmp_path / "written.toml")]) == config


@pytest.mark.parametrize(("cpus", "spare"), [(2.0, 0), (2.5, 0), (3.0, 1), (9.0, 1)])
def test_data_has_a_cpu_only_where_workers_leave_one(monkeypatch: pytest.MonkeyPatch, cpus: float, spare: int) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": cpus})
    assert spare_cpus(2) == spare
    assert data_share(2).has_cpu == bool(spare)


def test_workers_whose_number_is_a_range_count_on_no_cpu_of_a_node_that_may_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 64.0})
    assert data_share(2).has_cpu
    assert not data_share(2, is_range=True).has_cpu
    assert spare_cpus(2, 1.0, is_range=True) == 0


def test_a_cluster_without_a_cpu_for_the_data_is_told_instead_of_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    with pytest.raises(UserError, match="2 workers take a CPU each and data needs one more; the cluster has 2"):
        WorkersConfig(num_workers=2).to_ray()


def test_workers_with_a_fraction_of_a_cpu_share_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 3.0})
    workers = WorkersConfig(num_workers=16, cpus_per_worker=0.125)
    assert workers.cpus == 2
    assert workers.to_ray().resources_per_worker == {"CPU": 0.125, "GPU": 0}
    with pytest.raises(UserError, match=r"17 workers take 0\.125 CPUs each and data needs one more; the cluster has 3"):
        WorkersConfig(num_workers=17, cpus_per_worker=0.125).to_ray()


def test_streams_of_data_share_the_cpus_that_workers_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 16.0, "object_store_memory": 8e9})
    assert [data_share(2, cpus).cpus for cpus in (0.5, 1.0, 4.0)] == [7.5, 7.0, 4.0]
    assert data_share(2).cpus == 7.0


def test_a_local_cluster_has_the_cpus_of_all_workers_beside_those_of_data(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", lambda *_, num_cpus, **__: asked.append(num_cpus))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    connect(WorkersConfig(num_workers=16, cpus_per_worker=0.125))
    connect(WorkersConfig(num_workers=3, cpus_per_worker=0.5))
    connect(WorkersConfig(num_workers=0))
    assert asked == [num_cores() + 2, num_cores() + 2, num_cores()]


def test_gpus_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": 1.0, "CPU": 3.0})
    with pytest.raises(UserError, match="2 workers need a GPU each, the cluster has 1; give fewer workers, or submit"):
        WorkersConfig(num_workers=2, use_gpu=True).to_ray()


@pytest.mark.parametrize(
    ("settings", "num_gpus", "is_warned"),
    [
        ({"num_workers": 2}, 1, True),
        ({"num_workers": [2, 4]}, 1, True),
        ({"num_workers": 2}, 0, False),
        ({"num_workers": 2}, 2, False),
        ({"num_workers": [2, 4]}, 2, False),
        ({"num_workers": 2, "use_gpu": False}, 1, False),
        ({"num_workers": 0}, 1, False),
    ],
)
def test_a_job_on_cpus_beside_gpus_that_are_too_few_is_warned(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], num_gpus: int, is_warned: bool
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": float(num_gpus), "CPU": 9.0})
    warning = build(WorkersConfig, settings).gpu_warning()
    assert (warning is not None) == is_warned
    if warning is not None:
        assert "2 workers train on CPUs, since the cluster has 1 GPU(s)" in warning


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


def test_what_ray_says_when_it_cannot_join_is_told_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AuthenticationError("Token authentication is enabled, but no token was found.\nMore.")

    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(ray, "is_initialized", lambda: False)
        monkeypatch.setattr(ray, "init", refuse)
        monkeypatch.setattr(cluster_module, "head_asks_for_token", lambda *_, **__: True)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError) as error:
            connect(WorkersConfig())
    said = f"RAY_ADDRESS: cannot join {address}: Token authentication is enabled, but no token was found.; give host:"
    assert str(error.value).startswith(said)


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
