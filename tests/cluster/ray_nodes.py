"""Ray nodes on the hosts of ``hosts.py``, started as a person would by hand, with token authentication."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import psutil

from tests.cluster.hosts import CONTROL, HEAD, Hosts

ROOT = Path(__file__).parents[2]
PORT = 6379
NAMESPACE = "chaos"
START_SECONDS = 120.0
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "PYTHONPATH": str(ROOT),  # where Ray's processes find the package
    # A node that does not answer is declared dead after about ten seconds; by Ray's defaults after a minute.
    "RAY_health_check_initial_delay_ms": "3000",
    "RAY_health_check_period_ms": "2000",
    "RAY_health_check_timeout_ms": "4000",
    "RAY_health_check_failure_threshold": "3",
    # Each node takes all memory of the machine for its own, and would end its workers when others fill it.
    "RAY_memory_monitor_refresh_ms": "0",
}
"""Of every host."""
COUNT_NODES = """
import json, sys
from ray._raylet import GcsClient
print(json.dumps([node.node_manager_address for node in GcsClient(sys.argv[1]).get_all_node_info().values()
                  if node.state == 0]))
"""


class RayNodes:
    """A Ray cluster: its head on host 1, Redis for it on host 0, and a node of one logical CPU on every host.

    One CPU on each, so that two training workers are on two hosts.
    """

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        token = hosts.run(CONTROL, ["ray", "get-auth-token", "--generate"]).stdout
        for number in range(hosts.num_hosts):
            folder = hosts.home(number) / ".ray"
            folder.mkdir(exist_ok=True)
            (folder / "auth_token").write_text(token)
            (folder / "auth_token").chmod(0o600)

    @property
    def address(self) -> str:
        """What a job's ``RAY_ADDRESS`` is set to."""
        return f"{self.hosts.address(HEAD)}:{PORT}"

    def start_redis(self) -> None:
        """Start an empty Redis, where the head keeps what it knows of the cluster."""
        # The hosts' network is theirs alone.
        options = ["--bind", self.hosts.address(CONTROL), "--protected-mode", "no", "--save", "", "--appendonly", "no"]
        self.hosts.run(CONTROL, ["redis-server", *options, "--daemonize", "yes"])

    def start_head(self) -> None:
        """Start the head; with what Redis knows of an earlier one it goes on where that was."""
        redis = {
            "RAY_REDIS_ADDRESS": f"{self.hosts.address(CONTROL)}:6379",
            "RAY_external_storage_namespace": NAMESPACE,
        }
        self._start(HEAD, ["--head", f"--port={PORT}", "--dashboard-host=127.0.0.1"], redis)

    def start_worker(self, number: int, environment: Mapping[str, str] | None = None) -> None:
        """Join the cluster with a node on host ``number``."""
        self._start(number, [f"--address={self.address}"], environment)

    def _start(self, number: int, options: list[str], environment: Mapping[str, str] | None = None) -> None:
        own = [f"--node-ip-address={self.hosts.address(number)}", "--num-cpus=1", "--object-store-memory=100000000"]
        self.hosts.run(
            number,
            ["ray", "start", "--disable-usage-stats", *own, *options],
            START_SECONDS,
            environment=environment,
        )

    def addresses(self) -> list[str]:
        """Addresses of the nodes that the cluster believes alive."""
        said = self.hosts.run(HEAD, [sys.executable, "-c", COUNT_NODES, self.address]).stdout
        return sorted(json.loads(said))

    def complete(self) -> None:
        """Start a node on every worker host that has none, reviving the host if need be."""
        for number in self.hosts.workers:
            if not self.is_up(number):
                self.hosts.revive(number)
            if not self.processes(number, "raylet"):
                self.start_worker(number)

    def is_up(self, number: int) -> bool:
        """Whether host ``number`` runs."""
        try:
            self.hosts.first_process(number)
        except RuntimeError:
            return False
        return True

    def processes(self, number: int, name: str) -> list[psutil.Process]:
        """Processes of Ray on host ``number`` whose program or title is ``name``."""
        found = []
        # Whatever Ray starts belongs to the host's first process once `ray start` has ended.
        for process in psutil.Process(self.hosts.first_process(number)).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # ended meanwhile
                command = process.cmdline()  # none of a process that waits to be buried
                if command and re.match(rf"([^ ]*/)?{name}\b", command[0]):
                    found.append(process)
        return found

    def kill(self, number: int, name: str) -> None:
        """SIGKILL to the processes that ``processes`` finds, of which there must be one or more."""
        found = self.processes(number, name)
        assert found, f"host {number} runs no {name}"
        for process in found:
            process.kill()

    def restart_gcs(self, after_seconds: float) -> None:
        """SIGKILL to the head's ``gcs_server``, and later the same command again, as a supervisor would give it."""
        (gcs,) = self.processes(HEAD, "gcs_server")
        command, environment = gcs.cmdline(), gcs.environ()
        gcs.kill()
        gcs.wait(10)
        time.sleep(after_seconds)
        # In the background, so that it goes to the host's first process, as one started by Ray does.
        self.hosts.run(HEAD, f"{shlex.join(command)} >/dev/null 2>&1 &", environment=environment)

    def training_hosts(self) -> list[int]:
        """Worker hosts on which a training worker runs."""
        return [number for number in self.hosts.workers if self.processes(number, "ray::RayTrainWorker")]

    def start_job(self, job: str, arguments: list[str], log: Path, number: int = HEAD) -> subprocess.Popen[str]:
        """Start ``jobs/<job>`` on a host; what it says goes to ``log``."""
        environment = {"RAY_ADDRESS": self.address, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        with log.open("a") as file:
            command = [sys.executable, str(ROOT / "jobs" / job), *arguments]
            return self.hosts.start(number, command, environment=environment, stdout=file, stderr=file)

    def logs(self) -> str:
        """The tail of what went wrong on the nodes, for a test that failed."""
        script = "tail -n 15 /tmp/ray/session_latest/logs/{gcs_server.out,raylet.out,raylet.err} 2>/dev/null"
        parts = [
            f"=== host {number}\n{self.hosts.run(number, script, check=False).stdout}"
            for number in range(HEAD, self.hosts.num_hosts)
            if self.is_up(number)
        ]
        return "\n".join(parts)
