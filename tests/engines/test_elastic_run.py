import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from passreid_ray.data import open_rows
from passreid_ray.engines import pretrain
from passreid_ray.train.run_log import read_jsonl
from tests.engines.elastic_run import ROWS, SIZES, elastic_config
from tests.engines.killing import ROOT, losses
from tests.engines.micro import IN_PROCESS


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_that_goes_from_two_workers_to_three_to_one_equals_a_run_on_one(tmp_path: Path) -> None:
    own = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "RAY_USAGE_STATS_ENABLED": "0", "RAY_ADDRESS": ""}
    command = [sys.executable, "-m", "tests.engines.elastic_run", str(tmp_path / "elastic")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **own}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    config = elastic_config(tmp_path / "alone", workers=IN_PROCESS)
    alone, order = pretrain.run(config), config.epoch_order(open_rows(config.data))
    elastic = tmp_path / "elastic" / config.run.name

    seen: dict[int, set[int]] = {}
    shares: dict[tuple[int, int], dict[int, set[str]]] = {}
    for record in read_jsonl(elastic / ROWS):
        step, world = record["step"], record["world"]
        seen.setdefault(step, set()).add(world)
        shares.setdefault((step, world), {}).setdefault(record["rank"], set()).add(json.dumps(record["rows"]))
    for (step, world), by_rank in shares.items():
        for rank, rows in by_rank.items():
            assert rows == {json.dumps(order.batch(step, rank, world)[1].tolist())}  # whoever did it again, the same
    expected, got = losses(alone), losses(elastic)
    assert sorted(seen) == list(range(len(expected)))
    complete = [step for step in seen if any(len(shares[step, world]) == world for world in seen[step])]
    assert complete == sorted(seen)
    assert set().union(*seen.values()) == set(SIZES)
    assert got.keys() == expected.keys()
    assert max(abs(got[step] / expected[step] - 1) for step in expected) < 1e-5

    grown, shrunk = (line for line in done.stdout.splitlines() if "going on after step" in line)
    assert "workers are resized at step" in grown
    assert "(from 2 to 3); going on after step" in grown
    assert " on 3 worker(s): " in grown
    assert "workers were preempted at step" in shrunk
    assert ": the node is taken away); going on after step" in shrunk
    assert " on 1 worker(s): " in shrunk
    assert "a node of this run is about to be taken away; saving a checkpoint" in done.stdout
    totals = next(record for record in reversed(read_jsonl(elastic / "metrics.jsonl")) if "failures/count" in record)
    assert totals["failures/resizes"] == 1
    assert totals["failures/count"] >= 1
    assert totals["failures/lost_seconds"] > 0
