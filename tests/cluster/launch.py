"""A cluster that ``ray up cluster.yaml`` starts on hosts in namespaces, and the commands that a user gives it."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.hosts import CONTROL, HEAD, Hosts
from tests.waiting import wait_for

ROOT = Path(__file__).parents[2]
DASHBOARD = "http://127.0.0.1:8265"
TOKEN_AUTH = {"RAY_AUTH_MODE": "token"}
UP_SECONDS = 240.0


@dataclass(frozen=True)
class Cluster:
    """A cluster of ``hosts`` that is up; ``config`` is the file that it was started with."""

    hosts: Hosts
    config: Path

    def control(self, command: str, timeout_seconds: float = 120.0, *, check: bool = True) -> str:
        """What ``command``, given as the user on the control host in the checkout, prints on stdout and stderr."""
        done = self.hosts.run(CONTROL, f"cd {ROOT}; {command}", timeout_seconds, check=check, environment=TOKEN_AUTH)
        return done.stdout + done.stderr

    def nodes(self) -> list[str]:
        """Addresses of the living nodes."""
        script = "import json, ray; ray.init('auto', log_to_driver=False); print('nodes', json.dumps(ray.nodes()))"
        out = self.hosts.run(HEAD, [sys.executable, "-c", script], 60, environment=TOKEN_AUTH).stdout
        line = next(line for line in out.splitlines() if line.startswith("nodes "))
        return sorted(node["NodeManagerAddress"] for node in json.loads(line[6:]) if node["Alive"])

    def submit(self, name: str, *arguments: str, job: str = "pretrain") -> None:
        """``ray job submit`` of a job, under the id ``name``, with this checkout as working directory."""
        words = " ".join(["python", f"jobs/{job}.py", *arguments])
        options = f"--no-wait --submission-id {name} --address {DASHBOARD} --working-dir ."
        self.control(f"ray job submit {options} -- {words}")

    def job(self, command: str, name: str) -> str:
        """What ``ray job`` ``command`` says of the job of that id."""
        return self.control(f"ray job {command} --address {DASHBOARD} {name}")

    def ended(self, name: str, timeout_seconds: float) -> str:
        """Logs of a job, once it has ended."""
        statuses = ("succeeded", "failed", "was stopped")
        wait_for(lambda: any(word in self.job("status", name) for word in statuses), timeout_seconds, pause=2.0)
        return self.job("logs", name)


@contextmanager
def launched(folder: Path, name: str, num_workers: int = 2) -> Iterator[Cluster]:
    """Hosts, and on them the cluster of this checkout's cluster.yaml, with a tunnel to its dashboard."""
    with Hosts(num_workers, folder, name=name) as hosts:
        cluster = Cluster(hosts, write_config(hosts))
        cluster.control("umask 077; ray get-auth-token --generate >/dev/null")
        cluster.control(f"ray up -y {cluster.config}", UP_SECONDS)
        wait_for(lambda: len(cluster.nodes()) == 1 + num_workers, UP_SECONDS, pause=2.0)
        tunnel = hosts.start(CONTROL, f"cd {ROOT}; ray dashboard {cluster.config}", environment=TOKEN_AUTH)
        wait_for(lambda: status_of(cluster, "api/version", with_token=True) == "200", 60, pause=1.0)
        yield cluster
        tunnel.kill()


def write_config(hosts: Hosts) -> Path:
    """cluster.yaml with the hosts' addresses and key, and without the network that pip would need."""
    config: dict[str, Any] = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    config["provider"]["head_ip"] = hosts.address(HEAD)
    config["provider"]["worker_ips"] = [hosts.address(number) for number in hosts.workers]
    config["auth"] = {"ssh_user": "root", "ssh_private_key": str(hosts.ssh_key)}
    (install,) = (number for number, text in enumerate(config["setup_commands"]) if "pip install" in text)
    config["setup_commands"][install] = f"ln -sfn {Path(sys.prefix).resolve()} ~/passreid_env"
    path = hosts.folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return path


def status_of(cluster: Cluster, path: str, *, with_token: bool = False, base: str = DASHBOARD) -> str:
    """HTTP status of a request from the control host; 000 when nothing answers."""
    header = '-H "Authorization: Bearer $(cat ~/.ray/auth_token)"' if with_token else ""
    return cluster.control(f"curl -s -o /dev/null -w '%{{http_code}}' {header} {base}/{path}", check=False)
