"""A run whose cluster grows and shrinks, in a process of its own: nodes of one worker's CPU each come and go.

``python -m tests.engines.elastic_run FOLDER``. Beside the run's own files it leaves rows.jsonl: what every worker
computed in every step.
"""

import json
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray
import torch
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason  # pyright: ignore[reportAttributeAccessIssue]

from passreid_ray import distributed
from passreid_ray.config import build
from passreid_ray.engines import pretrain
from passreid_ray.engines.pretrain import PretrainConfig
from passreid_ray.train.run_log import read_jsonl
from passreid_ray.train.view_loader import ViewBatch, ViewMaker
from tests.engines.micro import SETTINGS

SIZES = (2, 3, 1)
STEPS_OF_A_SIZE = 6
NOTICE_SECONDS = 12
"""Ray looks for notices every 5 s."""
MAX_SECONDS = 400
"""For a size of the group to come about."""
OBJECT_STORE_BYTES = 80 * 2**20
ROWS = "rows.jsonl"
SETTINGS_OF_RUN: dict[str, Any] = {
    **SETTINGS,
    "epochs": 40,
    "batch_size": 12,
    "evaluation": {},
    "optimizer": {"warmup_epochs": 1, "lr": 0.001},
}


def elastic_config(output: Path, **changes: Any) -> PretrainConfig:
    """Settings of the run; whatever shares the batch, the result is the same."""
    return build(
        PretrainConfig, {**SETTINGS_OF_RUN, "run": {"output": str(output), "checkpoint_every_steps": 5}, **changes}
    )


class RecordingMaker(ViewMaker):
    """Remembers the rows of the batch that was given out last."""

    given: list[int]

    def batches(self, encoded: Iterator[pa.Table], threads: int) -> Iterator[ViewBatch]:
        waiting: deque[list[int]] = deque()

        def remembered() -> Iterator[pa.Table]:
            for table in encoded:
                waiting.append(table["row"].to_pylist())
                yield table

        for batch in super().batches(remembered(), threads):
            RecordingMaker.given = waiting.popleft()
            yield batch


def recording_worker(loop_config: dict[str, Any]) -> None:
    """``pretrain.train_worker``, which writes down its rows; slow, once a size of the group was there long enough."""
    train_step, records = pretrain.train_step, loop_config["config"].run.folder / ROWS
    done = 0

    def recording_step(state: Any, *arguments: Any, **options: Any) -> dict[str, torch.Tensor]:
        nonlocal done
        world = distributed.world_size()
        record = {"step": state.step, "rank": distributed.rank(), "world": world, "rows": RecordingMaker.given}
        with records.open("a") as file:
            file.write(json.dumps(record) + "\n")
        done += 1
        if world != SIZES[-1] and done > STEPS_OF_A_SIZE:
            time.sleep(0.5)
        return train_step(state, *arguments, **options)

    setattr(pretrain, "ViewMaker", RecordingMaker)  # noqa: B010 in this process only
    setattr(pretrain, "train_step", recording_step)  # noqa: B010
    pretrain.train_worker(loop_config)  # only the driver's was replaced


def train(config: PretrainConfig, failures: list[BaseException]) -> None:
    """The run; what ends it early goes to ``failures``."""
    try:
        pretrain.run(config)
    except BaseException as error:  # noqa: BLE001 whatever it was, the main thread raises it
        failures.append(error)


def wait_for(folder: Path, world: int) -> None:
    """Until so many workers have begun enough steps."""
    deadline = time.monotonic() + MAX_SECONDS
    while len({own["step"] for own in read_jsonl(folder / ROWS) if own["world"] == world}) < STEPS_OF_A_SIZE:
        assert time.monotonic() < deadline, f"no {world} workers"
        time.sleep(0.1)


def change_nodes(cluster: Cluster, nodes: list[Any], folder: Path) -> None:
    """From two nodes to three to one, whenever there were enough steps."""
    wait_for(folder, 2)
    nodes.append(add_node(cluster, len(nodes)))
    wait_for(folder, 3)
    for node in nodes[:2]:
        announce_end(cluster, node)
    time.sleep(NOTICE_SECONDS)
    for node in nodes[:2]:
        cluster.remove_node(node, allow_graceful=False)


def announce_end(cluster: Cluster, node: Any) -> None:
    """The notice that a cloud gives before it takes a node away, as Ray's autoscaler passes it on."""
    deadline_ms = int((time.time() + NOTICE_SECONDS) * 1000)
    client = ray._raylet.GcsClient(address=cluster.address)  # pyright: ignore[reportAttributeAccessIssue]
    reason = DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    is_accepted, why_not = client.drain_node(node.node_id, reason, "taken away by a test", deadline_ms)
    assert is_accepted, why_not


def add_node(cluster: Cluster, number: int) -> Any:
    """A node with the CPU of one worker and an address of its own."""
    return cluster.add_node(
        num_cpus=1, object_store_memory=OBJECT_STORE_BYTES, node_ip_address=f"127.0.0.{10 + number}"
    )


def main(folder: Path) -> None:
    """The run, from a cluster of two nodes on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    head = {"dashboard_host": "127.0.0.1", "dashboard_port": port, "include_dashboard": True}
    common = {"num_cpus": 0, "object_store_memory": OBJECT_STORE_BYTES, "node_ip_address": "127.0.0.2"}
    cluster = Cluster(initialize_head=True, head_node_args={**common, **head})
    nodes = [add_node(cluster, number) for number in range(SIZES[0])]
    ray.init(cluster.address, log_to_driver=False)
    config = elastic_config(folder, workers={"num_workers": [1, 3], "resize_seconds": 1})
    config.run.folder.mkdir(parents=True)
    setattr(pretrain, "train_worker", recording_worker)  # noqa: B010
    failures: list[BaseException] = []
    run = threading.Thread(target=train, args=(config, failures), daemon=True)
    run.start()
    change_nodes(cluster, nodes, config.run.folder)  # here: a node sets a signal handler
    run.join()
    if failures:
        raise failures[0]
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
