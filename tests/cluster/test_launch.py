"""``ray up cluster.yaml``, ``ray job submit``, ``ray job stop``, ``ray down``, as a user gives them."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from passreid_ray.config import to_toml
from passreid_ray.train.run_log import read_jsonl
from passreid_ray.train.state_files import META_FILE
from tests.cluster.hosts import CONTROL, HEAD
from tests.cluster.launch import ROOT, Cluster, launched, status_of
from tests.engines.killing import losses
from tests.engines.micro import micro_config
from tests.waiting import wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
JOB_SECONDS = 300.0
STEPS = 240


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with launched(tmp_path_factory.mktemp("launch"), "prl") as cluster:
        yield cluster


@pytest.fixture
def preset(cluster: Cluster, tmp_path: Path) -> Path:
    """A run of 3 workers, which no host has room for alone, below a folder that all hosts share."""
    workers = {"num_workers": 3, "threads": 1}
    config = micro_config(tmp_path / "runs", epochs=STEPS // 8, batch_size=6, workers=workers)
    (tmp_path / "micro.toml").write_text(to_toml(config))
    return tmp_path / "micro.toml"


def run_python(cluster: Cluster, number: int, script: str, **environment: str) -> tuple[int, str]:
    done = cluster.hosts.run(number, ["python", "-c", script], 60, check=False, environment=environment)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.short
def test_every_host_of_the_file_is_a_node(cluster: Cluster) -> None:
    assert cluster.nodes() == [cluster.hosts.address(number) for number in (HEAD, *cluster.hosts.workers)]


@pytest.mark.short
def test_the_token_is_for_its_owner_only_on_every_host_and_on_no_command_line(cluster: Cluster) -> None:
    token = (cluster.hosts.home(CONTROL) / ".ray" / "auth_token").read_text()
    assert len(token) >= 32
    for number in (HEAD, *cluster.hosts.workers):
        path = cluster.hosts.home(number) / ".ray" / "auth_token"
        assert path.read_text() == token
        assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
        said = cluster.hosts.run(number, "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ | tr '\\0' '\\n'", check=False)
        assert "raylet" in said.stdout
        assert token not in said.stdout


@pytest.mark.short
def test_who_has_no_token_is_refused_by_dashboard_jobs_and_client_port(cluster: Cluster) -> None:
    for path in ("api/jobs/", "api/version", "nodes?view=summary", "api/cluster_status"):
        assert (status_of(cluster, path), status_of(cluster, path, with_token=True)) == ("401", "200")
    assert (
        cluster.control(
            "curl -s -o /dev/null -w '%{http_code}' -H 'Authorization: Bearer wrong' http://127.0.0.1:8265/api/jobs/"
        )
        == "403"
    )
    head = cluster.hosts.address(HEAD)
    assert status_of(cluster, "api/version", base=f"http://{head}:8265", with_token=True) == "000"
    join = f"import ray; ray.init('ray://{head}:10001'); print('joined', ray.cluster_resources())"
    with_token = run_python(cluster, CONTROL, join, RAY_AUTH_MODE="token")
    assert with_token[0] == 0
    assert "joined" in with_token[1]
    waits = {f"RAY_CLIENT_{which}_CONNECTION_TIMEOUT_S": "3" for which in ("INITIAL", "MAX")}
    for environment in ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong" * 8}):
        status, said = run_python(cluster, CONTROL, join, **environment, **waits)
        assert status == 1, said
        assert "joined" not in said


def test_a_job_that_joins_by_ray_address_shows_the_token_of_its_file_or_says_where_it_belongs(cluster: Cluster) -> None:
    join = "from passreid_ray.engines.ray_cluster import *; connect(WorkersConfig()); print('joined', len(ray.nodes()))"
    base = {"RAY_ADDRESS": f"{cluster.hosts.address(HEAD)}:6379", "PYTHONPATH": str(ROOT)}
    elsewhere = {"RAY_AUTH_TOKEN_PATH": str(Path.home() / "moved"), "RAY_AUTH_MODE": "token"}
    cluster.hosts.run(HEAD, "cp ~/.ray/auth_token ~/moved")
    for environment in ({"RAY_AUTH_MODE": "token"}, elsewhere):
        status, said = run_python(cluster, HEAD, join, **base, **environment)
        assert (status, "joined 3" in said) == (0, True), said
    cluster.hosts.run(HEAD, "echo another >~/moved")
    for environment, told in (
        ({"RAY_AUTH_MODE": "disabled"}, "asks for a token, but RAY_AUTH_MODE=disabled; bring the cluster's to"),
        (elsewhere, "refuses the token of this user"),
    ):
        status, said = run_python(cluster, HEAD, join, **base, **environment)
        assert status == 1, said
        assert told in said


def test_a_job_trains_on_several_hosts_stops_and_goes_on_when_submitted_again(cluster: Cluster, preset: Path) -> None:
    folder = preset.parent / "runs" / "pretrain"
    cluster.submit("first", str(preset))
    wait_for(lambda: len(losses(folder)) > 10 and any(folder.glob(f"step_*/{META_FILE}")), JOB_SECONDS)
    cluster.job("stop", "first")
    assert "was stopped" in cluster.job("status", "first")
    stopped_after = max(losses(folder))
    assert stopped_after < STEPS
    cluster.submit("second", str(preset))
    logs = cluster.ended("second", JOB_SECONDS)
    assert "succeeded" in cluster.job("status", "second")
    assert "continuing after step " in logs
    assert sorted(losses(folder)) == list(range(1, STEPS + 1))
    groups = [record["nodes"] for record in read_jsonl(folder / "metrics.jsonl") if "nodes" in record]
    assert len(groups) == 2
    for addresses in groups:
        assert len(addresses) == 3
        assert len(set(addresses)) >= 2
        assert set(addresses) <= set(cluster.nodes())
    assert ", ".join(f"worker {rank} on {address}" for rank, address in enumerate(groups[1])) in logs


def test_a_folder_that_a_node_does_not_share_is_told_before_training(cluster: Cluster, preset: Path) -> None:
    blind = cluster.hosts.workers[-1]
    cluster.hosts.hide(blind, preset.parent)
    try:
        cluster.submit("unshared", str(preset))
        logs = cluster.ended("unshared", JOB_SECONDS)
    finally:
        cluster.hosts.unhide(blind, preset.parent)
    runs = preset.parent / "runs"
    told = (
        f"run.output (run.storage is not set): {runs}: node {cluster.hosts.address(blind)}: does not see what the job"
    )
    assert told in logs
    assert losses(runs / "pretrain") == {}
    assert not list(runs.glob(".seen*"))


def test_an_output_that_would_be_lost_is_refused_when_submitted(cluster: Cluster) -> None:
    cluster.submit("lost")
    logs = cluster.ended("lost", JOB_SECONDS)
    assert "failed" in cluster.job("status", "lost")
    assert "run.output: outputs/pretrain is below the temporary folder that a submitted job runs in" in logs


def test_ray_down_ends_the_head_at_once_and_the_workers_within_two_minutes(cluster: Cluster) -> None:
    cluster.control(f"ray down -y {cluster.config}")

    def num_raylets(number: int) -> int:
        return int(cluster.hosts.run(number, "pgrep -c -x raylet", check=False).stdout)

    wait_for(lambda: num_raylets(HEAD) == 0, 20)
    wait_for(lambda: all(num_raylets(number) == 0 for number in cluster.hosts.workers), 120)
