"""A run on a cluster of its own whose object store is too small: ``python -m tests.engines.under_pressure FOLDER``.

Beside the run somebody else's objects, half as large again as the store, are read in turn, so that all who need room
push others out to disk. Prints the bytes that were spilled and read back while the run went on.
"""

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from passreid_ray.engines import finetune
from passreid_ray.engines.finetune_config import FinetuneConfig
from passreid_ray.engines.ray_cluster import NODE_ADDRESS
from passreid_ray.engines.spill_disk import LIMIT
from tests.engines.finetune_micro import finetune_config
from tests.engines.micro import IN_PROCESS

STORE_BYTES = 80 * 2**20
BALLAST_BYTES = 8 * 2**20
NUM_BALLAST = 15


def large_batches(output: Path) -> FinetuneConfig:
    """A run whose batches, made in tasks, take 4.7 MB of the object store each."""
    views = {"image_size_px": (256, 128), "pad_px": 2}
    settings: dict[str, Any] = {"views": views, "batch_size": 48, "epochs": 8, "ranking": {"steps": 0}}
    return finetune_config(output, **settings, evaluation={}, workers=IN_PROCESS)


def spilled_and_restored_bytes() -> tuple[int, int]:
    """So far, on the whole cluster."""
    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return stats.spilled_bytes_total, stats.restored_bytes_total


def main(output: Path) -> None:
    """Run, and print what happened as JSON in the last line."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ[LIMIT] = "1"  # it is 60 MB; of a large and rather full disk Ray would take nothing
    ray.init(
        "local",
        num_cpus=2,
        object_store_memory=STORE_BYTES,
        include_dashboard=False,
        _node_ip_address=NODE_ADDRESS,
        log_to_driver=False,
    )
    generator = np.random.default_rng(0)
    ballast = [ray.put(generator.integers(0, 255, BALLAST_BYTES, np.uint8)) for _ in range(NUM_BALLAST)]
    done = threading.Event()

    def churn() -> None:
        while not done.is_set():
            for one in ballast:
                ray.get(one)
                done.wait(0.05)

    thread = threading.Thread(target=churn, daemon=True)
    before = spilled_and_restored_bytes()
    thread.start()
    finetune.run(large_batches(output))
    done.set()
    thread.join()
    spilled, restored = (now - then for now, then in zip(spilled_and_restored_bytes(), before, strict=True))
    print(json.dumps({"spilled": spilled, "restored": restored}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
