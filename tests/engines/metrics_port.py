"""What Ray exports on the metrics port of the first node of the cluster."""

import urllib.request
from typing import Any

import ray
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def exported() -> list[Sample]:
    """All samples, as Prometheus' own client reads the text format."""
    node: dict[str, Any] = ray.nodes()[0]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=30) as answer:
        families: list[Metric] = list(text_string_to_metric_families(answer.read().decode()))
    return [sample for family in families for sample in family.samples]
