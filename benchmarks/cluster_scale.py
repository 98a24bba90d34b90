"""Time and memory of clustering as the number of features grows, all processes together, and what approximation costs.

Run from the repository: ``python -m benchmarks.cluster_scale 10000 100000 1000000 noise=1.7 index=auto``
"""

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import ray
from numpy.typing import NDArray
from sklearn.metrics import adjusted_rand_score

from passreid_ray.engines.clustering import ClusterConfig, cluster_features, object_store_bytes
from passreid_ray.engines.ray_cluster import WorkersConfig, connect

WIDTH, IMAGES_PER_PERSON = 384, 20
PROBE_SECONDS = 3.0


def people(num_rows: int, noise: float, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Features: unit centres, each with 20 images at ``noise`` * N(0, I / D), in random order; and their identities."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((num_rows // IMAGES_PER_PERSON, WIDTH), np.float32)
    centers /= np.linalg.norm(centers, axis=1, keepdims=True)
    ids = rng.permutation(np.repeat(np.arange(len(centers)), IMAGES_PER_PERSON))
    features = np.empty((len(ids), WIDTH), np.float32)
    for first in range(0, len(ids), 65536):
        own = slice(first, first + 65536)
        features[own] = centers[ids[own]]
        features[own] += np.float32(noise / WIDTH**0.5) * rng.standard_normal((len(ids[own]), WIDTH), np.float32)
    return features, ids


class Phases:
    """Seconds of every phase, from the progress that clustering reports."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = time.perf_counter()

    def __call__(self, phase: str, done: int, total: int) -> None:
        now = time.perf_counter()
        if done == 0:
            self._start = now
        self.seconds[phase] = now - self._start


@contextmanager
def memory_watch() -> Iterator[list[int]]:
    """Peak bytes of this process and all that it started, every shared page counted once: a list of one number."""
    peak, stopped = [0], threading.Event()

    def watch() -> None:
        while True:
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                with suppress(psutil.Error, OSError):
                    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
                    total += sum(int(line.split()[1]) for line in lines if line.startswith("Pss:")) * 1024
            peak[0] = max(peak[0], total)
            if stopped.wait(PROBE_SECONDS):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield peak
    stopped.set()
    thread.join()


def main() -> None:
    """Print a line for every size."""
    sizes = [int(argument) for argument in sys.argv[1:] if "=" not in argument] or [10_000, 100_000]
    settings = dict(argument.split("=") for argument in sys.argv[1:] if "=" in argument)
    noise = float(settings.get("noise", 1.7))
    config = ClusterConfig.model_validate({"index": settings.get("index", "auto")})
    connect(WorkersConfig(), object_store_bytes(max(sizes), WIDTH))
    warm_up = ClusterConfig(block_rows=1000)
    cluster_features(people(2000, noise)[0], warm_up, lambda *_: None)  # compiles, starts workers
    print(f"{WIDTH} numbers each, {IMAGES_PER_PERSON} images per person, noise {noise}, index {config.index}")
    for size in sizes:
        features, ids = people(size, noise)
        phases, start = Phases(), time.perf_counter()
        with memory_watch() as peak:
            found = cluster_features(features, config, phases, overwrite=True)
        seconds = time.perf_counter() - start
        ari = adjusted_rand_score(ids, np.where(found.labels_N >= 0, found.labels_N, -1 - np.arange(size)))
        health = found.health
        recall = "" if found.recall is None else f", recall@30 {found.recall:.4f}"
        print(
            f"{size:>9,} features: {seconds:7.1f} s, peak {peak[0] / 2**30:5.2f} GiB, {health.num_clusters} clusters, "
            f"{health.num_outliers} outliers, ARI {ari:.4f}{recall}; "
            + ", ".join(f"{phase} {taken:.1f}" for phase, taken in phases.seconds.items()),
            flush=True,
        )
    ray.shutdown()


if __name__ == "__main__":
    main()
