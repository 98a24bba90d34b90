from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from passreid_ray.engines import shared_storage
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.engines.shared_storage import (
    DRIVERS_FILE,
    Node,
    answer,
    check_storage_is_shared,
    nodes_for_work,
    read,
    refusal,
    write,
)
from passreid_ray.errors import UserError
from tests.data.s3 import Bucket, bucket, s3_host, s3_keys

__all__ = ["bucket", "s3_host", "s3_keys"]  # fixtures


def node(name: str, address: str, alive: bool = True, **resources: float) -> dict[str, Any]:
    return {"NodeID": name, "NodeManagerAddress": address, "Alive": alive, "Resources": resources}


def test_nodes_for_work_are_those_that_live_and_have_cpus_or_gpus() -> None:
    nodes = [
        node("d", "10.0.0.4", GPU=1),
        node("a", "10.0.0.1", CPU=2, memory=3),
        node("b", "10.0.0.2", alive=False, CPU=2),
        node("c", "10.0.0.3", CPU=0, memory=3),
    ]
    assert nodes_for_work(nodes) == [Node("a", "10.0.0.1"), Node("d", "10.0.0.4")]


def test_a_node_that_sees_the_drivers_file_writes_its_own(tmp_path: Path) -> None:
    probe = str(tmp_path / "probe")
    write(probe, DRIVERS_FILE)
    assert answer(probe, "node-a") == ""
    assert read(probe, "node-a")


def test_a_node_that_does_not_see_the_drivers_file_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_storage, "SEEN_SECONDS", 0.0)
    assert answer(str(tmp_path / "probe"), "node-a") == "does not see what the job writes there"
    assert list(tmp_path.iterdir()) == []


def test_a_node_that_cannot_write_says_why(tmp_path: Path) -> None:
    probe = str(tmp_path / "probe")
    write(probe, DRIVERS_FILE)
    (tmp_path / "probe" / "node-a").mkdir()  # root may write into folders that are read-only
    assert "cannot use it (" in answer(probe, "node-a")


def test_a_file_of_other_content_is_not_the_nodes(tmp_path: Path) -> None:
    (tmp_path / "node-a").write_text("node-b")
    assert not read(str(tmp_path), "node-a", seconds=0.0)


def test_the_refusal_names_setting_path_node_and_what_to_do() -> None:
    text = refusal("run.storage", "/runs", "10.0.0.3", "does not see what the job writes there")
    assert text.startswith("run.storage: /runs: node 10.0.0.3: does not see what the job writes there; ")
    assert text.endswith("set run.storage to one")
    of_bucket = refusal("run.storage", "s3://bucket/runs?region=x", "10.0.0.3", "cannot use it (Access Denied)")
    assert of_bucket == (
        "run.storage: s3://bucket/runs: node 10.0.0.3: cannot use it (Access Denied); check that node's credentials "
        "and network"
    )


def test_a_bucket_is_asked_in_the_same_way(bucket: Bucket) -> None:
    write(bucket.address("runs/probe"), DRIVERS_FILE)
    assert answer(bucket.address("runs/probe"), "node-a") == ""
    assert read(bucket.address("runs/probe"), "node-a")


def test_on_one_node_nothing_is_asked_or_written(cluster: None, tmp_path: Path) -> None:
    check_storage_is_shared(RunConfig(output=tmp_path), WorkersConfig())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def head_without_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver is on a head that gets no work; the one other node does not see what it writes."""
    nodes = [node("head", "10.0.0.1", memory=3), node("a", "10.0.0.2", CPU=2)]
    monkeypatch.setattr(ray, "nodes", lambda: nodes)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "head"))
    monkeypatch.setattr(shared_storage, "_ask", lambda nodes, _: dict.fromkeys(nodes, "does not see it"))


def test_one_node_for_work_is_asked_when_the_driver_is_on_another(head_without_cpus: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"node 10\.0\.0\.2: does not see it"):
        check_storage_is_shared(RunConfig(output=tmp_path), WorkersConfig(num_workers=1))


def test_nobody_is_asked_when_all_work_is_done_by_the_driver(head_without_cpus: None, tmp_path: Path) -> None:
    check_storage_is_shared(RunConfig(output=tmp_path), WorkersConfig(num_workers=0))
    assert list(tmp_path.iterdir()) == []
