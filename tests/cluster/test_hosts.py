"""The hosts themselves: what the other tests of this folder stand on."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.hosts import CONTROL, CPU_GROUPS, HEAD, Hosts

pytestmark = [pytest.mark.cluster, pytest.mark.short, pytest.mark.timeout(120)]
ROOT = Path(__file__).parents[2]
WORKER = HEAD + 1


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Hosts(1, tmp_path_factory.mktemp("hosts"), name="prt") as hosts:
        yield hosts


def ssh(hosts: Hosts, number: int, command: str) -> list[str]:
    options = ("StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null", "LogLevel=ERROR", "ConnectTimeout=5")
    login = [f"-o{option}" for option in options] + ["-i", str(hosts.ssh_key), f"root@{hosts.address(number)}"]
    return ["ssh", *login, command]


def is_reached(hosts: Hosts, number: int) -> bool:
    return hosts.run(CONTROL, ssh(hosts, number, "true"), check=False).returncode == 0


def test_the_control_host_logs_in_everywhere_and_finds_ray_there(hosts: Hosts) -> None:
    for number in (HEAD, WORKER):
        said = hosts.run(CONTROL, ssh(hosts, number, "bash --login -c 'hostname; which ray; echo ~'")).stdout.split()
        assert said == [f"prt-{number}", f"{Path(sys.executable).parent}/ray", str(Path.home())]


def test_a_host_has_processes_home_and_temporary_files_of_its_own_and_the_machines_files_otherwise(
    hosts: Hosts, tmp_path: Path
) -> None:
    hosts.run(HEAD, "touch ~/mine /tmp/ray/mine /dev/shm/mine")
    assert (hosts.home(HEAD) / "mine").exists()
    script = "ls ~ /tmp/ray /dev/shm | grep -c mine"
    assert [hosts.run(number, script, check=False).stdout for number in (HEAD, WORKER)] == ["3\n", "0\n"]
    assert str(os.getpid()) not in hosts.run(HEAD, ["ps", "-Ao", "pid="]).stdout.split()
    hosts.run(HEAD, ["touch", str(tmp_path / "shared")])
    assert (tmp_path / "shared").exists()


def test_nothing_leaves_the_machine(hosts: Hosts) -> None:
    routes = hosts.run(WORKER, ["ip", "route"]).stdout.splitlines()
    assert [route.split()[0] for route in routes] == ["10.77.0.0/24"]


def test_a_command_that_fails_or_takes_too_long_is_told_with_what_it_said(hosts: Hosts) -> None:
    with pytest.raises(AssertionError, match=r"host 2 \(10\.77\.0\.12\): echo why; exit 3(.|\n)*why(.|\n)*status 3"):
        hosts.run(WORKER, "echo why; exit 3")
    with pytest.raises(AssertionError, match=r"said(.|\n)*took too long and was killed"):
        hosts.run(WORKER, "echo said; sleep 1234", timeout_seconds=0.5)
    assert "sleep 1234" not in hosts.run(WORKER, ["ps", "-Ao", "args="]).stdout


def test_a_host_that_is_cut_off_runs_on_and_comes_back(hosts: Hosts) -> None:
    hosts.cut(WORKER)
    assert not is_reached(hosts, WORKER)
    assert hosts.run(WORKER, "echo here").stdout == "here\n"
    hosts.mend(WORKER)
    assert is_reached(hosts, WORKER)


def test_a_host_that_crashes_takes_its_processes_along_and_can_be_revived(hosts: Hosts) -> None:
    running = hosts.start(WORKER, "sleep 1000")
    hosts.run(WORKER, "touch ~/kept /tmp/ray/lost")
    hosts.crash(WORKER)
    assert running.wait(10) != 0
    assert not is_reached(hosts, WORKER)
    hosts.revive(WORKER)
    assert is_reached(hosts, WORKER)
    assert hosts.run(WORKER, "ls ~/kept /tmp/ray", check=False).stdout.split() == [f"{Path.home()}/kept", "/tmp/ray:"]


def test_a_host_may_miss_a_folder_that_the_others_see(hosts: Hosts, tmp_path: Path) -> None:
    (tmp_path / "here").touch()
    hosts.hide(WORKER, tmp_path)
    assert [hosts.run(number, ["ls", str(tmp_path)]).stdout for number in (HEAD, WORKER)] == ["here\n", ""]
    hosts.unhide(WORKER, tmp_path)
    assert hosts.run(WORKER, ["ls", str(tmp_path)]).stdout == "here\n"


def test_a_host_can_have_little_of_a_cpu(hosts: Hosts) -> None:
    work = [sys.executable, "-c", "sum(range(10**7))"]

    def times_held_back() -> int:
        hosts.run(WORKER, work)
        group = next(base for base in CPU_GROUPS if (base / "cgroup.procs").exists()) / "prt-2"
        return int(dict(line.split() for line in (group / "cpu.stat").read_text().splitlines())["nr_throttled"])

    assert times_held_back() == 0
    hosts.slow_cpu(WORKER, 0.1)
    held_back = times_held_back()
    assert held_back > 3
    hosts.slow_cpu(WORKER, None)
    assert times_held_back() <= held_back + 1  # the last period of before


def test_a_host_can_have_a_slow_link(hosts: Hosts) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        hosts.run(CONTROL, [*ssh(hosts, WORKER, "head -c 2000000 /dev/zero")])
        return time.perf_counter() - start

    hosts.slow_link(WORKER, 2)
    slow_seconds = seconds()
    hosts.slow_link(WORKER, None)
    assert slow_seconds > 7  # 16 Mbit
    assert seconds() < slow_seconds


def test_sets_of_hosts_do_not_see_each_other_and_leave_nothing_behind(hosts: Hosts, tmp_path: Path) -> None:
    with Hosts(0, tmp_path, name="prt-b") as others:
        assert others.run(CONTROL, ssh(others, HEAD, "hostname")).stdout == "prt-b-1\n"
        assert not is_reached(hosts, 5)
        others.run(HEAD, "(sleep 1000 & )")
    assert "prt-b" not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert is_reached(hosts, HEAD)
    with pytest.raises(RuntimeError, match="hosts called prt are up already"), Hosts(0, tmp_path, name="prt"):
        pass


def test_what_a_killed_test_left_is_removed_by_the_next_set_of_that_name(tmp_path: Path) -> None:
    script = (
        "import os, pathlib, signal\n"
        "from tests.cluster.hosts import Hosts\n"
        f"hosts = Hosts(0, pathlib.Path({str(tmp_path)!r}), name='prt-3').__enter__()\n"
        "hosts.run(1, 'sleep 1000 &')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert "prt-3-1" in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    with Hosts(0, tmp_path, name="prt-3") as hosts:
        assert "sleep 1000" not in hosts.run(HEAD, ["ps", "-Ao", "args="]).stdout
