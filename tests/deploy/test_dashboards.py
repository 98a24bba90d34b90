"""The files for Prometheus and Grafana: they name what the code exports, and a real Prometheus reads it by them."""

import json
import re
import shutil
import socket
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from passreid_ray.engines.live_metrics import GAUGES, OF_RECORDS, RunGauges, SweepGauges
from tests.waiting import wait_for

DEPLOY = Path(__file__).parents[2] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "passreid_ray.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
PROMETHEUS = shutil.which("prometheus")
DISCOVERY = "prom_metrics_service_discovery.json"
ALL = ".*"


def test_the_dashboard_shows_every_gauge_and_no_other() -> None:
    named = set(re.findall(r"ray_(passreid_\w+)", " ".join(QUERIES)))
    assert named == set(GAUGES)


def test_labels_in_queries_and_legends_are_those_of_the_gauges() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            for name in re.findall(r"ray_(passreid_\w+)", target["expr"]):
                by = re.findall(r"by \((.*?)\)", target["expr"])[0].split(", ")
                in_selector = re.findall(r"(\w+)=~", target["expr"])
                in_legend = re.findall(r"{{(\w+)}}", target["legendFormat"])
                assert {*by, *in_selector, *in_legend} <= set(GAUGES[name][1])
                assert set(in_legend) == set(by)


def test_panels_do_not_overlap_and_their_source_can_be_chosen() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in PANELS:
        assert panel["datasource"]["uid"] == "${datasource}"


def test_grafana_is_given_the_dashboard_and_prometheus() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text(encoding="utf-8"))
    assert [source["type"] for source in sources["datasources"]] == ["prometheus"]
    providers = yaml.safe_load((provisioning / "dashboards" / "passreid_ray.yml").read_text(encoding="utf-8"))
    assert [own["options"]["path"] for own in providers["providers"]] == ["${PASSREID_DASHBOARDS}"]
    # Grafana takes every JSON file below that folder for a dashboard.
    assert [path.name for path in (DEPLOY / "grafana").rglob("*.json")] == ["passreid_ray.json"]


class Prometheus:
    """A server that runs."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def query(self, expression: str) -> list[dict[str, Any]]:
        """What an expression gives now."""
        return self._get(f"query?{urllib.parse.urlencode({'query': expression})}")["result"]

    def values_of(self, label: str, selector: str) -> list[str]:
        """The values of a label of the series that ``selector`` finds."""
        return self._get(f"label/{label}/values?{urllib.parse.urlencode({'match[]': selector})}")

    def _get(self, path: str) -> Any:
        with urllib.request.urlopen(f"{self._url}/{path}", timeout=30) as answer:
            return json.load(answer)["data"]


@contextmanager
def prometheus_of(discovery: Path, folder: Path) -> Iterator[Prometheus]:
    """A Prometheus with the configuration of ``deploy/``, but for the cluster and the pace."""
    assert PROMETHEUS is not None
    text = (DEPLOY / "prometheus.yml").read_text(encoding="utf-8")
    text = text.replace(f"/tmp/ray/{DISCOVERY}", str(discovery)).replace(" 10s", " 1s")
    (folder / "prometheus.yml").write_text(text, encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'tsdb'}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(
            [PROMETHEUS, *options, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        wait_for(lambda: is_ready(port))
        yield Prometheus(port)
    finally:
        process.terminate()
        process.wait(30)


def is_ready(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/-/ready", timeout=30).close()
    except OSError:
        return False  # it does not listen yet, or still reads its files
    return True


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian's package prometheus)")
def test_a_real_prometheus_has_data_for_every_panel(cluster: None, tmp_path: Path) -> None:
    node: Any = ray._private.worker._global_node  # pyright: ignore[reportPrivateImportUsage, reportAttributeAccessIssue]
    session = Path(node.get_session_dir_path())
    record = dict.fromkeys(OF_RECORDS, 0.5)
    with (
        prometheus_of(session / DISCOVERY, tmp_path) as prometheus,
        RunGauges("pretrain", "single") as single,
        RunGauges("pretrain", "search", "trial_0007") as trial,
        SweepGauges("pretrain", "search", "loss", num_trials=9) as sweep,
    ):
        single(3, 6, record)
        trial(3, 6, record)
        sweep.show(["running"], 0.25)
        wait_for(lambda: {"single", "search"} <= set(prometheus.values_of("run", "ray_passreid_step")))
        for query in QUERIES:
            query = query.replace("$run", ALL).replace("$trial", ALL)
            prometheus.query(query)  # one that cannot be read is an error
            if "gpus" not in query and "gram" not in query:  # there may be no GPU
                wait_for(lambda query=query: prometheus.query(query))
        runs = {(own["metric"]["run"], own["metric"].get("trial", "")) for own in prometheus.query("ray_passreid_map")}
        assert runs >= {("single", ""), ("search", "trial_0007")}
        assert not any(key.startswith("otel_") for key in prometheus.query("ray_passreid_map")[0]["metric"])
        (status,) = prometheus.query('ray_passreid_sweep_trials{run="search", status="waiting"}')
        assert float(status["value"][1]) == 8


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian's package prometheus)")
@pytest.mark.parametrize("name", ["prometheus.yml", "prometheus_cluster.yml"])
def test_prometheus_takes_its_configuration(name: str) -> None:
    command = ["promtool", "check", "config", "--syntax-only", str(DEPLOY / name)]
    checked = subprocess.run(command, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
