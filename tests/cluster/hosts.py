"""Several hosts on one machine: what happens between real nodes, when they die, are cut off or are slow.

A host is a network namespace on a bridge without an uplink, so that nothing leaves the machine, with process, mount,
host name and IPC namespaces of its own: its own process numbers (``ray stop`` and Ray's discovery scan processes), its
own home, ``/tmp/ray`` and ``/dev/shm``, and the machine's files otherwise. Needs root, iproute2, util-linux, procps,
curl, sshd, ssh and rsync.
"""

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

CONTROL = 0
HEAD = 1
"""Numbers of hosts; workers come from 2 on."""
NETWORK = "10.77.0"
PROGRAMS = (
    *("ip", "tc", "ss", "nsenter", "unshare", "setpriv", "ps", "pgrep", "curl"),
    *("ssh", "ssh-keygen", "rsync", "/usr/sbin/sshd"),
)
START_SECONDS = 30.0
STOP_SECONDS = 20.0
SHM_BYTES = 8 * 2**30
CPU_PERIOD_US = 100_000
CPU_GROUPS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))
"""Where groups that share CPU time are: version 1 of cgroups, else version 2."""

NEW_HOST = (
    # Each ends with its parent: a test that is killed leaves no processes behind.
    *("setpriv", "--pdeathsig", "KILL", "unshare", "--fork", "--kill-child"),
    *("--pid", "--mount", "--uts", "--ipc", "--mount-proc", "sh", str(Path(__file__).with_name("host.sh"))),
)

Command = str | Sequence[str]


def missing() -> list[str]:
    """What these hosts need and this machine lacks, in words."""
    lacking = [] if os.geteuid() == 0 else ["root"]
    return lacking + [program for program in PROGRAMS if shutil.which(program) is None]


class Hosts:
    """A control host (0, without sshd), a head (1) and workers (2, ...), up between ``with`` and its end.

    ``name``: of the set; sets of different names do not see each other and may be up at the same time. What an earlier
    set of that name left, because its test was killed, is removed first. ``folder``: homes, keys and logs.
    ``environment``: set in every login and command on every host, beside ``PATH`` with this Python's folder.
    """

    def __init__(
        self,
        num_workers: int,
        folder: Path,
        *,
        name: str = "pr",
        environment: Mapping[str, str] | None = None,
        shm_bytes: int = SHM_BYTES,
    ) -> None:
        self.num_hosts = 2 + num_workers
        self.folder = folder
        self.name = name
        self._environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(Path.home()),
            "LANG": "C.UTF-8",
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        }
        self._shm_bytes = shm_bytes
        self._hosts: dict[int, subprocess.Popen[bytes]] = {}
        self._lock: IO[str] | None = None

    def __enter__(self) -> "Hosts":
        if lacking := missing():
            raise RuntimeError(f"hosts in namespaces need {', '.join(lacking)}; `make cluster-test` runs as root")
        self._lock = Path(f"/run/{self.name}-hosts.lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"hosts called {self.name} are up already, in another process") from None
        self._remove()
        try:
            self._make_files()
            self._make_network()
            for number in range(self.num_hosts):
                self._start_host(number)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._remove()
        for process in self._hosts.values():
            process.wait(STOP_SECONDS)
        self._hosts.clear()
        if self._lock is not None:
            self._lock.close()

    @property
    def workers(self) -> range:
        """Numbers of the worker hosts."""
        return range(HEAD + 1, self.num_hosts)

    @property
    def ssh_key(self) -> Path:
        """The private key that every host with sshd lets in, as root."""
        return self.folder / "id"

    def address(self, number: int) -> str:
        """IP address of a host."""
        return f"{NETWORK}.{10 + number}"

    def home(self, number: int) -> Path:
        """A host's home folder, as the machine sees it."""
        return self.folder / f"home{number}"

    def run(
        self,
        number: int,
        command: Command,
        timeout_seconds: float = 60.0,
        *,
        check: bool = True,
        environment: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Run ``command`` on a host (text: by bash) and wait for it; stdout and stderr are kept apart.

        Raises ``AssertionError`` with all that it said when it fails and ``check``, or when it takes too long; it and
        what it started in its session are killed then.
        """
        # Into files: what goes on in the background, as Ray does, would keep pipes open.
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = self.start(number, command, environment=environment, stdout=out, stderr=err)
            ended = "took too long and was killed"
            try:
                ended = f"exit status {process.wait(timeout_seconds)}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                check = True
            out.seek(0)
            err.seek(0)
            said = out.read(), err.read()
        if check and ended != "exit status 0":
            words = command if isinstance(command, str) else shlex.join(command)
            raise AssertionError(
                f"host {number} ({self.address(number)}): {words}\n"
                f"--- stdout\n{said[0]}\n--- stderr\n{said[1]}\n--- {ended}"
            )
        return subprocess.CompletedProcess(process.args, process.returncode, *said)

    def start(
        self,
        number: int,
        command: Command,
        *,
        environment: Mapping[str, str] | None = None,
        stdout: int | IO[str] = subprocess.DEVNULL,
        stderr: int | IO[str] = subprocess.DEVNULL,
    ) -> subprocess.Popen[str]:
        """Start ``command`` on a host; it ends with the host at the latest."""
        arguments = ["bash", "-c", command] if isinstance(command, str) else list(command)
        inside = ["nsenter", "--target", str(self.first_process(number)), "--pid", "--mount", "--uts", "--ipc", "--net"]
        return subprocess.Popen(
            [*self._in_cpu_group(number), *inside, "sh", "-c", 'cd && exec "$@"', "sh", *arguments],
            env={**self._environment, **(environment or {})},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )

    def first_process(self, number: int) -> int:
        """Process number, as the machine sees it, of a host's first process."""
        if self._hosts[number].poll() is None and (children := psutil.Process(self._hosts[number].pid).children()):
            return children[0].pid
        raise RuntimeError(f"host {number} is down")

    def crash(self, number: int) -> None:
        """SIGKILL everything on a host at once; connections to it are closed by the kernel, as when Ray is killed.

        ``cut`` it first for a host whose power is gone: others then hear nothing.
        """
        process = self._hosts[number]
        os.kill(self.first_process(number), signal.SIGKILL)
        process.wait(STOP_SECONDS)

    def revive(self, number: int) -> None:
        """Start a crashed host again: its home is as it was, ``/tmp/ray`` and ``/dev/shm`` are empty, Ray is not up."""
        assert self._hosts[number].poll() is not None, f"host {number} is up"
        self.mend(number)
        self._start_host(number)

    def cut(self, number: int) -> None:
        """Cut a host off the network: what is sent to it or by it is lost, and nobody is told."""
        self._in_switch("ip", "link", "set", f"p{number}", "down")

    def mend(self, number: int) -> None:
        """Join a host to the network again."""
        self._in_switch("ip", "link", "set", f"p{number}", "up")

    def slow_link(self, number: int, mbit_per_second: float | None) -> None:
        """Let a host send and receive at most so much; None: as much as it can."""
        for link, namespace in ((f"v{number}", self._namespace(number)), (f"p{number}", self._switch)):
            inside = ["ip", "netns", "exec", namespace, "tc", "qdisc"]
            subprocess.run([*inside, "del", "dev", link, "root"], check=False, capture_output=True)
            if mbit_per_second is not None:
                shape = ["tbf", "rate", f"{round(mbit_per_second * 1e6)}bit", "burst", "64kb", "latency", "200ms"]
                _call(*inside, "add", "dev", link, "root", *shape)

    def slow_cpu(self, number: int, cpus: float | None) -> None:
        """Give all processes of a host ``cpus`` CPUs together, such as 0.2; None: all."""
        group = self._cpu_group(number)
        quota_us = None if cpus is None else max(1000, round(cpus * CPU_PERIOD_US))
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text(str(quota_us or -1))
        else:
            (group / "cpu.max").write_text(f"{quota_us or 'max'} {CPU_PERIOD_US}")

    def hide(self, number: int, folder: Path) -> None:
        """Put an empty file system over ``folder`` on a host, as if it were not mounted there."""
        self.run(number, ["mount", "-t", "tmpfs", "tmpfs", str(folder)])

    def unhide(self, number: int, folder: Path) -> None:
        """Take the empty file system away again."""
        self.run(number, ["umount", str(folder)])

    @property
    def _switch(self) -> str:
        return f"{self.name}-switch"

    def _namespace(self, number: int) -> str:
        return f"{self.name}-{number}"

    def _in_switch(self, *command: str) -> None:
        _call("ip", "netns", "exec", self._switch, *command)

    def _make_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd insists
        for key in (self.ssh_key, self.folder / "host_key"):
            if not key.exists():
                _call("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key))
        exports = "".join(
            f"export {name}={shlex.quote(value)}\n" for name, value in self._environment.items() if name != "HOME"
        )
        for number in range(self.num_hosts):
            home = self.home(number)
            home.mkdir(exist_ok=True)
            (home / ".bashrc").write_text(exports)
            (home / ".bash_profile").write_text(". ~/.bashrc\n")
            if number != CONTROL:
                self._sshd_config(number).write_text(
                    f"Port 22\nListenAddress {self.address(number)}\nHostKey {self.folder / 'host_key'}\n"
                    f"AuthorizedKeysFile {self.ssh_key}.pub\nStrictModes no\nPasswordAuthentication no\n"
                    "PermitRootLogin prohibit-password\nUsePAM no\nPidFile none\nMaxStartups 100\nMaxSessions 100\n"
                )

    def _sshd_config(self, number: int) -> Path:
        return self.folder / f"sshd{number}.conf"

    def _make_network(self) -> None:
        _call("ip", "netns", "add", self._switch)
        self._in_switch("ip", "link", "set", "lo", "up")
        self._in_switch("ip", "link", "add", "bridge", "type", "bridge")
        self._in_switch("ip", "link", "set", "bridge", "up")
        for number in range(self.num_hosts):
            host, end = self._namespace(number), f"p{number}"
            _call("ip", "netns", "add", host)
            _call("ip", "link", "add", f"v{number}", "netns", host, "type", "veth", "peer", end, "netns", self._switch)
            self._in_switch("ip", "link", "set", end, "master", "bridge", "up")
            for command in (
                ("link", "set", "lo", "up"),
                ("addr", "add", f"{self.address(number)}/24", "dev", f"v{number}"),
                ("link", "set", f"v{number}", "up"),
            ):
                _call("ip", "-n", host, *command)

    def _start_host(self, number: int) -> None:
        ready = self.folder / f"host{number}" / "ready"
        ready.parent.mkdir(exist_ok=True)
        ready.unlink(missing_ok=True)
        with (self.folder / f"host{number}.log").open("a") as log:
            self._hosts[number] = subprocess.Popen(
                [*self._in_cpu_group(number), "ip", "netns", "exec", self._namespace(number), *NEW_HOST],
                env={
                    **self._environment,
                    "HOST": self._namespace(number),
                    "HOST_FOLDER": str(ready.parent),
                    "HOST_HOME": str(self.home(number)),
                    "KEEP": "\n".join(_kept_folders()),
                    "SHM_BYTES": str(self._shm_bytes),
                    "SSHD_CONFIG": "" if number == CONTROL else str(self._sshd_config(number)),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._wait_for_host(number, ready)

    def _wait_for_host(self, number: int, ready: Path) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            is_up = ready.exists() and (number == CONTROL or self._answers_ssh(number))
            if is_up:
                return
            if self._hosts[number].poll() is not None or time.monotonic() > deadline:
                log = (self.folder / f"host{number}.log").read_text()
                raise RuntimeError(f"host {number} does not come up: {log}")
            time.sleep(0.02)

    def _answers_ssh(self, number: int) -> bool:
        with contextlib.suppress(RuntimeError, AssertionError):
            listening = self.run(number, ["ss", "-Hltn", "sport = :22"]).stdout
            return self.address(number) in listening
        return False

    def _cpu_group(self, number: int) -> Path:
        base = next(folder for folder in CPU_GROUPS if (folder / "cgroup.procs").exists())
        group = base / self._namespace(number)
        group.mkdir(exist_ok=True)
        return group

    def _in_cpu_group(self, number: int) -> list[str]:
        """Words before a command that put it, and all that it starts, into the host's group."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._cpu_group(number) / "cgroup.procs")]

    def _pids(self, number: int) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self._namespace(number)], capture_output=True, text=True)
        return [int(pid) for pid in listed.stdout.split()]

    def _remove(self) -> None:
        """Kill what runs in namespaces of this set's name, then remove them; those of an earlier set too."""
        names = [line.split()[0] for line in _call("ip", "netns", "list").splitlines() if line]
        numbers = [int(end) for name in names if (end := name.removeprefix(f"{self.name}-")).isdigit()]
        deadline = time.monotonic() + STOP_SECONDS
        while pids := [pid for number in numbers for pid in self._pids(number)]:
            assert time.monotonic() < deadline, f"processes {pids} of the hosts {self.name} do not end"
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for number in numbers:
            _call("ip", "netns", "del", self._namespace(number))
            for base in CPU_GROUPS:
                if (group := base / self._namespace(number)).is_dir():
                    _remove_group(group)
        if self._switch in names:
            _call("ip", "netns", "del", self._switch)


def _kept_folders() -> list[str]:
    """Folders below the machine's home folder that a host needs too: Python, its packages, this checkout."""
    folders = {Path(sys.base_prefix).resolve(), Path(sys.prefix).resolve(), Path(__file__).parents[2]}
    return sorted(str(folder) for folder in folders if folder.is_relative_to(Path.home()))


def _remove_group(group: Path) -> None:
    deadline = time.monotonic() + STOP_SECONDS
    while True:
        try:
            group.rmdir()
            return
        except OSError:  # the kernel lets go of its processes a little later
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def _call(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)}: {done.stderr.strip() or done.returncode}")
    return done.stdout
