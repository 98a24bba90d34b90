"""Whether every node of the cluster reads and writes the same storage: asked before a run trains for hours."""

import contextlib
import time
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import ray
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from passreid_ray.data.storage import below, explained, is_remote, locate, reason, shown
from passreid_ray.engines.ray_cluster import WorkersConfig
from passreid_ray.engines.run_folder import RunConfig
from passreid_ray.errors import UserError

PROBE_PREFIX = ".seen_by_nodes_"
DRIVERS_FILE = "driver"
ANSWER_SECONDS = 120.0
"""How long a node may take to answer: it may fetch the job's files first."""
SEEN_SECONDS = 10.0
"""How long a file may take from one node to another: network file systems remember what was not there."""


@dataclass(frozen=True)
class Node:
    """A node that may get training workers."""

    node_id: str
    address: str


def check_storage_is_shared(run: RunConfig, workers: WorkersConfig) -> None:
    """Raise ``UserError`` with the node and the path when a node does not read and write the run's storage.

    The driver writes a small file there, each node reads it and writes one of its own, which the driver reads. Where
    all work is done on the driver's node, or in its process, there is nothing to ask. Nodes that join later, as those
    of a cluster that grows, are not asked.
    """
    if workers.num_workers == 0:
        return
    nodes = nodes_for_work(ray.nodes())
    if {node.node_id for node in nodes} <= {ray.get_runtime_context().get_node_id()}:
        return
    key = "run.output (run.storage is not set)" if run.storage is None else "run.storage"
    probe = below(run.storage_path, f"{PROBE_PREFIX}{uuid.uuid4().hex}")
    filesystem, path = locate(probe)
    with explained(run.storage_path):
        write(probe, DRIVERS_FILE)
        try:
            for node, complaint in _ask(nodes, probe).items():
                if not complaint and not read(probe, node.node_id):
                    complaint = "what it writes there is not seen by the job"
                if complaint:
                    raise UserError(refusal(key, run.storage_path, node.address, complaint))
        finally:
            with contextlib.suppress(OSError, pa.ArrowException):  # a late node writes: the reason matters more
                filesystem.delete_dir(path)


def nodes_for_work(nodes: list[dict[str, Any]]) -> list[Node]:
    """The living nodes, of ``ray.nodes()``, that have CPUs or GPUs, and so may get workers; in order of address."""
    usable = [
        Node(node["NodeID"], node["NodeManagerAddress"])
        for node in nodes
        if node["Alive"] and {"CPU", "GPU"} & {kind for kind, amount in node["Resources"].items() if amount > 0}
    ]
    return sorted(usable, key=lambda node: (node.address, node.node_id))


def refusal(key: str, path: str, address: str, complaint: str) -> str:
    """What is wrong on a node, and what to do."""
    advice = (
        "check that node's credentials and network"
        if is_remote(path)
        else "a cluster of several nodes needs a folder that all of them share under the same path, such as NFS, or an "
        "s3:// or gs:// address; set run.storage to one"
    )
    return f"{key}: {shown(path)}: node {address}: {complaint}; {advice}"


def answer(probe: str, name: str) -> str:
    """On a node: read the driver's file below ``probe``, write one called ``name``; what does not work, or nothing."""
    try:
        if not read(probe, DRIVERS_FILE):
            return "does not see what the job writes there"
        write(probe, name)
    except (OSError, pa.ArrowException) as error:
        return f"cannot use it ({reason(error)})"
    except UserError as error:
        return str(error)
    return ""


def write(probe: str, name: str) -> None:
    """Write the file ``name`` below ``probe``; it says its own name."""
    filesystem, path = locate(probe)
    filesystem.create_dir(path, recursive=True)
    with filesystem.open_output_stream(f"{path}/{name}") as file:
        file.write(name.encode())


def read(probe: str, name: str, seconds: float | None = None) -> bool:
    """Whether the file ``name`` below ``probe`` is there within ``seconds``, by default ``SEEN_SECONDS``, and whole."""
    filesystem, path = locate(probe)
    deadline = time.monotonic() + (SEEN_SECONDS if seconds is None else seconds)
    while True:
        if filesystem.get_file_info(f"{path}/{name}").type == pafs.FileType.File:
            with filesystem.open_input_stream(f"{path}/{name}") as file:
                if file.read() == name.encode():
                    return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)


def _ask(nodes: list[Node], probe: str) -> dict[Node, str]:
    """The answer of each node; a node that has died meanwhile gives none."""
    task = ray.remote(num_cpus=0, max_retries=0)(answer)
    questions = {
        node: task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)).remote(
            probe, node.node_id
        )
        for node in nodes
    }
    answers: dict[Node, str] = {}
    deadline = time.monotonic() + ANSWER_SECONDS
    for node, question in questions.items():
        try:
            answers[node] = ray.get(question, timeout=max(0.0, deadline - time.monotonic()))
        except GetTimeoutError:
            answers[node] = f"does not answer within {ANSWER_SECONDS:.0f} s"
        except RayError as error:
            if node in nodes_for_work(ray.nodes()):
                answers[node] = f"cannot be asked ({reason(error)})"
    return answers
