"""Requests to the ports of a local cluster: refused without its token."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import grpc
import pytest
import ray
from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
from ray._private.worker import get_dashboard_url

from tests.processes import own_processes

TIMEOUT_SECONDS = 30
WRONG = {"Authorization": "Bearer 0123456789abcdef0123456789abcdef"}


def _right() -> dict[str, str]:
    return get_auth_headers_if_auth_enabled({})


def _status(path: str, headers: dict[str, str], body: dict[str, Any] | None = None) -> int:
    data = None if body is None else json.dumps(body).encode()
    request = Request(f"http://{get_dashboard_url()}{path}", data, {**headers, "Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
            return answer.status
    except HTTPError as error:
        return error.code


@pytest.mark.parametrize(
    "path",
    ["/api/version", "/api/jobs/", "/nodes?view=summary", "/api/v0/tasks", "/api/v0/logs?node_id=0", "/timezone"],
)
def test_the_dashboard_and_its_apis_answer_only_to_the_token(cluster: None, path: str) -> None:
    assert _status(path, {}) == 401
    assert _status(path, WRONG) == 403
    assert _status(path, _right()) not in (401, 403)


def test_a_job_cannot_be_submitted_without_the_token(cluster: None, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    job = {"entrypoint": f"touch {witness}"}
    assert _status("/api/jobs/", {}, job) == 401
    assert _status("/api/jobs/", WRONG, job) == 403
    with urlopen(Request(f"http://{get_dashboard_url()}/api/jobs/", headers=_right()), timeout=TIMEOUT_SECONDS) as jobs:
        assert not [known for known in json.load(jobs) if str(witness) in str(known)]
    assert not witness.exists()


def _head() -> str:
    return ray.get_runtime_context().gcs_address


def _node(port: str) -> str:
    (node,) = ray.nodes()
    return f"{node['NodeManagerAddress']}:{node[port]}"


@pytest.mark.parametrize(
    ("address", "method"),
    [
        (_head, "NodeInfoGcsService/GetAllNodeInfo"),
        (_head, "InternalKVGcsService/InternalKVKeys"),
        (_head, "JobInfoGcsService/GetAllJobInfo"),
        (_head, "ActorInfoGcsService/GetAllActorInfo"),
        (lambda: _node("NodeManagerPort"), "NodeManagerService/GetNodeStats"),
    ],
    ids=["nodes", "key-value store", "jobs", "actors", "raylet"],
)
def test_head_and_raylet_answer_only_to_the_token(cluster: None, address: Callable[[], str], method: str) -> None:
    def answer(headers: dict[str, str]) -> grpc.StatusCode:
        metadata = tuple((name.lower(), value) for name, value in headers.items())
        with grpc.insecure_channel(address()) as channel:
            try:
                channel.unary_unary(f"/ray.rpc.{method}")(b"", timeout=TIMEOUT_SECONDS, metadata=metadata)
            except grpc.RpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    assert answer({}) == grpc.StatusCode.UNAUTHENTICATED
    assert answer(WRONG) == grpc.StatusCode.UNAUTHENTICATED
    assert answer(_right()) == grpc.StatusCode.OK


def test_a_local_cluster_has_no_port_for_ray_clients(cluster: None) -> None:
    assert own_processes("gcs_server")
    assert own_processes("ray.util.client.server") == []
