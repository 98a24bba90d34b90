"""Which clusters are joined without a token, and how a head is asked whether it wants one."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray

from passreid_ray.engines import cluster_access
from passreid_ray.engines.cluster_access import (
    IS_ALIVE,
    check_local_start,
    check_open_cluster,
    exposed_addresses,
    head_asks_for_token,
    reach_of,
)
from passreid_ray.engines.ray_cluster import WorkersConfig, connect
from passreid_ray.errors import UserError

TOKEN = "0123456789abcdef0123456789abcdef"
BUSY, DENIED = "e" * 32, "d" * 32
"""Tokens that a head answers in other ways."""


def _must_not_run(*_: object, **__: object) -> None:
    raise AssertionError("ray.init was called")


@pytest.mark.parametrize(
    ("address", "reach"),
    [
        ("127.0.0.2", "this machine"),
        ("::1", "this machine"),
        ("0.0.0.0", "this machine"),
        ("::ffff:127.0.0.1", "this machine"),
        ("10.1.2.3", "private network"),
        ("172.16.0.1", "private network"),
        ("172.31.255.254", "private network"),
        ("192.168.7.1", "private network"),
        ("169.254.1.1", "private network"),
        ("100.64.0.1", "private network"),
        ("100.127.255.254", "private network"),
        ("fe80::1", "private network"),
        ("fe80::1%eth0", "private network"),
        ("fd12:3456::1", "private network"),
        ("::ffff:10.0.0.1", "private network"),
        ("172.32.0.1", "internet"),
        ("100.63.255.255", "internet"),
        ("100.128.0.1", "internet"),
        ("8.8.8.8", "internet"),
        ("192.0.2.1", "internet"),
        ("2001:4860:4860::8888", "internet"),
        ("::ffff:8.8.8.8", "internet"),
    ],
)
def test_loopback_private_and_public_addresses_are_told_apart(address: str, reach: str) -> None:
    assert reach_of(address) == reach


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """This machine's addresses, as the test writes them."""
    addresses = ["127.0.0.1"]
    monkeypatch.setattr(cluster_access, "own_addresses", lambda: addresses)
    return addresses


def test_an_interface_that_is_down_gives_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "127.0.0.1" in cluster_access.own_addresses()
    monkeypatch.setattr(cluster_access.psutil, "net_if_stats", dict)
    assert cluster_access.own_addresses() == []


@pytest.mark.parametrize("mode", [None, "token", "TOKEN"])
def test_a_local_cluster_with_a_token_may_start_in_any_network(
    own: list[str], monkeypatch: pytest.MonkeyPatch, mode: str | None
) -> None:
    own.append("8.8.8.8")
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    if mode is not None:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
    check_local_start()


@pytest.mark.parametrize("mode", ["disabled", "", "tokens"])
@pytest.mark.parametrize("address", ["8.8.8.8", "192.168.1.7", "fe80::1%eth0"])
def test_a_local_cluster_without_a_token_is_refused_where_others_reach_this_machine(
    own: list[str], monkeypatch: pytest.MonkeyPatch, mode: str, address: str
) -> None:
    own.append(address)
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", _must_not_run)
    with pytest.raises(UserError, match=rf"^RAY_AUTH_MODE={mode}: whoever reaches this machine, at {address} for one"):
        connect(WorkersConfig())


def test_a_local_cluster_without_a_token_may_start_where_nobody_else_is(
    own: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    check_local_start()


def test_a_node_that_is_this_machine_is_reached_at_all_of_its_addresses(own: list[str]) -> None:
    own += ["10.0.0.5", "8.8.8.8"]
    assert "8.8.8.8" in exposed_addresses(["10.0.0.5"])
    assert "8.8.8.8" in exposed_addresses(["127.0.0.2"])
    assert exposed_addresses(["10.0.0.6"]) == ["10.0.0.6"]


def test_a_cluster_without_a_token_is_refused_on_a_public_address_and_warned_of_on_a_private_one(
    own: list[str],
) -> None:
    with pytest.raises(UserError, match=r"asks for no token and has the public address 8\.8\.4\.4: anybody can run"):
        check_open_cluster(["10.0.0.1", "8.8.4.4"], "10.0.0.1:6379")
    warning = check_open_cluster(["127.0.0.1", "10.0.0.1"], "10.0.0.1:6379")
    assert warning is not None
    assert warning.startswith("warning: the cluster at 10.0.0.1:6379 asks for no token: whoever reaches 10.0.0.1 can")
    assert len(warning.splitlines()) == 1
    assert check_open_cluster(["127.0.0.2"], "127.0.0.2:6379") is None


class _Head(grpc.GenericRpcHandler):
    """Answers as a head does: with a token or without."""

    def __init__(self, token: str | None) -> None:
        self.token = token
        self.headers: list[str | None] = []

    def service(self, handler_call_details: Any) -> Any:
        if handler_call_details.method != IS_ALIVE:
            return None
        header = dict(handler_call_details.invocation_metadata).get("authorization")
        self.headers.append(header)

        def answer(_: bytes, context: grpc.ServicerContext) -> bytes:
            if header == f"Bearer {BUSY}":
                context.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
            if header == f"Bearer {DENIED}":
                context.abort(grpc.StatusCode.PERMISSION_DENIED, "not yours")
            if self.token is not None and header != f"Bearer {self.token}":
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        return grpc.unary_unary_rpc_method_handler(answer)


@pytest.fixture
def heads() -> Iterator[Any]:
    """Starts heads; answers with their ports."""
    servers: list[grpc.Server] = []

    def start(head: _Head) -> int:
        server = grpc.server(ThreadPoolExecutor(1), handlers=[head])
        servers.append(server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        return port

    yield start
    for server in servers:
        server.stop(None)


def test_a_head_that_asks_for_nothing_is_not_sent_the_token(heads: Any) -> None:
    head = _Head(None)
    assert head_asks_for_token("127.0.0.1", heads(head), timeout_seconds=10) is False
    assert head.headers == [None]


def test_a_port_where_no_head_answers_is_told(heads: Any) -> None:
    with pytest.raises(
        UserError, match=r"no head of a cluster answers at 127.0.0.1:1 without TLS \(UNAVAILABLE\); give"
    ):
        head_asks_for_token("127.0.0.1", 1, timeout_seconds=10)


ASK = """
import json, os, sys
from passreid_ray.engines.cluster_access import head_asks_for_token
from passreid_ray.errors import UserError
from ray._raylet import AuthenticationTokenLoader, Config
answers = {}
for case, environment in json.loads(sys.argv[2]).items():
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        os.environ.pop(name, None)
    os.environ |= environment
    AuthenticationTokenLoader.instance().reset_cache()
    Config.initialize("")
    try:
        answers[case] = head_asks_for_token("127.0.0.1", int(sys.argv[1]), timeout_seconds=10)
    except UserError as error:
        answers[case] = str(error)
print(json.dumps(answers))
"""
"""Asks one head as processes of several users would; a process of its own, since the token is a process's state."""


def test_a_head_that_asks_for_a_token_gets_that_of_the_user_or_the_user_is_told(heads: Any, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    cases = {
        "mode unset": {"RAY_AUTH_TOKEN": TOKEN},
        "mode token": {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "token"},
        "a file": {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")},
        "another": {"RAY_AUTH_TOKEN": TOKEN[::-1]},
        "denied": {"RAY_AUTH_TOKEN": DENIED},
        "busy": {"RAY_AUTH_TOKEN": BUSY},
        "none": {},
        "disabled": {"RAY_AUTH_TOKEN": TOKEN, "RAY_AUTH_MODE": "disabled"},
    }
    head = _Head(TOKEN)
    environment = {**os.environ, "HOME": str(tmp_path)}
    command = [sys.executable, "-c", ASK, str(heads(head)), json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    answers = json.loads(done.stdout)
    assert [answers[case] for case in ("mode unset", "mode token", "a file")] == [True, True, True]
    assert "refuses the token of this user; bring the cluster's to ~/.ray/auth_token" in answers["another"]
    assert "refuses the token of this user" in answers["denied"]
    assert "asked for a token and then did not answer (UNAVAILABLE): it may be busy or restarting" in answers["busy"]
    assert "asks for a token, but there is none here; bring" in answers["none"]
    assert "asks for a token, but RAY_AUTH_MODE=disabled; bring" in answers["disabled"]
    assert not any(TOKEN in str(answer) or TOKEN[::-1] in str(answer) for answer in answers.values())


@pytest.fixture
def open_head(heads: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """Address of a head that asks for no token, which RAY_ADDRESS names."""
    address = f"127.0.0.1:{heads(_Head(None))}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    return address


def test_a_head_without_a_token_on_a_public_address_is_not_joined(
    open_head: str, own: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own.append("8.8.8.8")
    monkeypatch.setattr(ray, "init", _must_not_run)
    with pytest.raises(UserError, match=rf"the cluster at {open_head} asks for no token and has the public address"):
        connect(WorkersConfig())


@pytest.mark.parametrize(("node", "told"), [("10.0.0.9", "warning: the cluster at"), ("127.0.0.2", "")])
def test_a_head_without_a_token_on_a_private_network_is_joined_with_a_warning_of_one_line(
    open_head: str,
    own: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    node: str,
    told: str,
) -> None:
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": node, "Alive": True}])
    connect(WorkersConfig())
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(told)
    assert all(line.startswith(told) for line in lines)


def test_a_cluster_with_a_node_on_a_public_address_is_left_again(
    open_head: str, own: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[bool] = []
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: left.append(True))
    monkeypatch.setattr(ray, "nodes", lambda: [{"NodeManagerAddress": "8.8.8.8", "Alive": True}])
    with pytest.raises(UserError, match="public address"):
        connect(WorkersConfig())
    assert left == [True]
