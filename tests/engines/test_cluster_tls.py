"""Two nodes that speak TLS: a job joins them with the certificates and the token, and with nothing less."""

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import grpc
import psutil
import pytest

REPOSITORY = Path(__file__).parents[2]
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
TOKEN = "0123456789abcdef0123456789abcdef0123456789abcdef"
START_SECONDS = 120
JOB = """
import sys, time
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from passreid_ray.engines.ray_cluster import WorkersConfig, connect
from passreid_ray.errors import UserError
try:
    connect(WorkersConfig())
except UserError as error:
    sys.exit(f"error: {error}")
end = time.monotonic() + 60
while len(nodes := [node for node in ray.nodes() if node["Alive"]]) < 2 and time.monotonic() < end:
    time.sleep(0.5)

@ray.remote(num_cpus=0)
def where():
    return ray.util.get_node_ip_address()

places = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in nodes]
print(*sorted(ray.get([where.options(scheduling_strategy=place).remote() for place in places])))
"""


def _certificates(folder: Path) -> dict[str, str]:
    """What the environment of a node with certificates of an authority of its own holds."""
    script = REPOSITORY / "deploy" / "make_certificates.sh"
    subprocess.run([script, folder, HEAD, WORKER, "127.0.0.1", "localhost"], check=True, capture_output=True)
    assert folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    return {
        "RAY_USE_TLS": "1",
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
        "RAY_TLS_SERVER_CERT": str(folder / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "node.key"),
    }


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HEAD, 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Cluster:
    port: int
    client_port: int
    environment: dict[str, str]
    """Of its nodes."""
    tls: dict[str, str]


def _plain_environment(home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_AUTH", "RAY_TLS"))}
    return {**kept, "HOME": str(home), "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(REPOSITORY)}


def _end(process: "subprocess.Popen[bytes]") -> None:
    # Its own processes only: ray stop would end every cluster of this machine.
    with suppress(psutil.NoSuchProcess):
        own = psutil.Process(process.pid)
        for child in [*own.children(recursive=True), own]:
            child.kill()
    process.wait()


def _content(log: IO[bytes]) -> str:
    log.seek(0)
    return log.read().decode()[-2000:]


def _start(stack: ExitStack, arguments: list[str], environment: dict[str, str], address: str, port: int) -> None:
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--node-ip-address={address}"]
    command += ["--num-cpus=1", "--object-store-memory=80000000", *arguments]
    log = stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115 the stack closes it
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    stack.callback(_end, process)
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        try:
            socket.create_connection((address, port), timeout=1).close()
        except OSError:
            assert process.poll() is None, _content(log)
            time.sleep(0.2)
        else:
            return
    raise AssertionError(f"{address}:{port} does not listen after {START_SECONDS} s")


@pytest.fixture(scope="module")
def tls_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("tls")
    tls = _certificates(folder / "certificates")
    port, client_port, worker_port = _free_port(), _free_port(), _free_port()
    with ExitStack() as stack:
        # Short, since sockets lie below it.
        ray_folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="ray", dir="/tmp", ignore_cleanup_errors=True)
        )
        environment = {**_plain_environment(folder), **tls, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
        environment["RAY_TMPDIR"] = ray_folder
        head = ["--head", "--include-dashboard=false", f"--port={port}", f"--ray-client-server-port={client_port}"]
        _start(stack, head, environment, HEAD, port)
        worker = [f"--address={HEAD}:{port}", f"--node-manager-port={worker_port}"]
        _start(stack, worker, environment, WORKER, worker_port)
        yield Cluster(port, client_port, environment, tls)


def _joined(cluster: Cluster, home: Path, **environment: str) -> tuple[str, str]:
    """What a job says, and the last line of its errors."""
    done = subprocess.run(
        [sys.executable, "-c", JOB],
        env={**_plain_environment(home), "RAY_ADDRESS": f"{HEAD}:{cluster.port}", **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
    )
    return done.stdout.strip(), (done.stderr.strip().splitlines() or [""])[-1]


@pytest.mark.slow
def test_only_a_job_with_certificates_and_token_joins(tls_cluster: Cluster, tmp_path: Path) -> None:
    token = {"RAY_AUTH_TOKEN": TOKEN}
    said, error = _joined(tls_cluster, tmp_path, **tls_cluster.tls, **token)
    assert said == f"{HEAD} {WORKER}", error

    said, error = _joined(tls_cluster, tmp_path, **token)
    assert (said, error.partition(";")[0]) == (
        "",
        f"error: RAY_ADDRESS: no head of a cluster answers at {HEAD}:{tls_cluster.port} without TLS (UNAVAILABLE)",
    )

    said, error = _joined(tls_cluster, tmp_path, **_certificates(tmp_path / "other"), **token)
    assert (said, error.partition(";")[0]) == (
        "",
        f"error: RAY_ADDRESS: no head of a cluster answers at {HEAD}:{tls_cluster.port} with TLS (RAY_USE_TLS=1) "
        "(UNAVAILABLE)",
    )

    said, error = _joined(tls_cluster, tmp_path, **tls_cluster.tls)
    assert said == ""
    assert f"the head at {HEAD}:{tls_cluster.port} asks for a token, but there is none here" in error


@pytest.mark.slow
def test_the_port_for_ray_clients_asks_for_certificates_and_token(tls_cluster: Cluster) -> None:
    def answer(channel: grpc.Channel, **headers: str) -> grpc.StatusCode:
        with channel:
            ask = channel.unary_unary("/ray.rpc.RayletDriver/ClusterInfo")
            try:
                ask(b"", timeout=60, metadata=tuple(headers.items()))
            except grpc.RpcError as error:
                return error.code()
        return grpc.StatusCode.OK

    where = f"{HEAD}:{tls_cluster.client_port}"
    authority, key, certificate = (
        Path(tls_cluster.tls[f"RAY_TLS_{name}"]).read_bytes() for name in ("CA_CERT", "SERVER_KEY", "SERVER_CERT")
    )

    def with_certificates() -> grpc.Channel:
        return grpc.secure_channel(where, grpc.ssl_channel_credentials(authority, key, certificate))

    assert answer(grpc.insecure_channel(where), authorization=f"Bearer {TOKEN}") == grpc.StatusCode.UNAVAILABLE
    assert answer(with_certificates()) == grpc.StatusCode.UNAUTHENTICATED
    assert answer(with_certificates(), authorization=f"Bearer {TOKEN[::-1]}") == grpc.StatusCode.UNAUTHENTICATED
    assert answer(with_certificates(), authorization=f"Bearer {TOKEN}") != grpc.StatusCode.UNAUTHENTICATED
