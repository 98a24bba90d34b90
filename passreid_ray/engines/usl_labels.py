"""The first half of a round: features of all rows, clusters, and what the second half learns from.

Features are written in shards and labels as a whole, so that a run that is killed goes on with what is there.
"""

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from passreid_ray import distributed
from passreid_ray.data import Rows
from passreid_ray.data.feature_files import FeatureFiles
from passreid_ray.data.storage import below
from passreid_ray.engines.clustering import PseudoLabels, centroids, cluster_features
from passreid_ray.engines.embedding import ImageInput, embed_numbers
from passreid_ray.engines.usl_config import USLConfig
from passreid_ray.retrieval.dbscan import OUTLIER
from passreid_ray.retrieval.health import ClusterHealth
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.pulse import LABELS, LABELS_OF_RANK_0, pulse
from passreid_ray.train.state_files import (
    DamagedCheckpoint,
    checkpoint_name,
    load_state,
    save_state,
)
from passreid_ray.train.usl_state import USLState
from passreid_ray.train.worker import WorkerContext

WAIT_SECONDS = 0.5


@dataclass(frozen=True)
class Task:
    """The rows that are learnt from: those to cluster, and those whose identities are known."""

    rows: Rows
    """Rows of ``data``, and of ``source`` if there is one."""
    source_N: NDArray[np.int64]
    """Identity of each row of ``source``, counted from 0; -1 for rows of ``data``."""

    @property
    def target(self) -> NDArray[np.int64]:
        """Numbers of the rows to cluster."""
        return np.flatnonzero(self.source_N < 0)


@dataclass(frozen=True)
class RoundLabels:
    """What a round learns from."""

    labels_N: NDArray[np.int64]
    """Cluster, or identity of ``source`` after them, of every row; -1 for outliers."""
    centroids_KD: NDArray[np.float32]
    found: PseudoLabels
    """The clustering itself, of the usable rows of ``data``."""

    def as_metrics(self) -> dict[str, float]:
        """Health and settings of the clustering, by name."""
        recall = {} if self.found.recall is None else {"neighbour_recall": self.found.recall}
        known = self.found.health.as_metrics() | {"eps": self.found.eps} | recall
        return {f"cluster/{name}": value for name, value in known.items()}


@pulse.doing(LABELS)
def round_labels(
    state: USLState, config: USLConfig, task: Task, rounds: CheckpointStore, worker: WorkerContext
) -> RoundLabels:
    """Labels of the round that ``state`` is in: made by all workers together, or read when they were made before."""
    name = checkpoint_name(state.round)
    if state.memory is None:  # else they are those that the round began with, and cannot be made again
        set_damaged_labels_aside(rounds, state.round, worker)
    # One answer for all: a worker that still saw labels which rank 0 has set aside would not come to the barrier.
    if not distributed.agreed(lambda: name in rounds.names())[0]:
        files = FeatureFiles(below(rounds.address, f"features_{state.round:04d}"), len(task.rows))
        write_features(state, config, task.rows, files, worker)
        distributed.barrier()  # every shard is there
        if worker.rank == 0:
            labels = make_labels(state, config, task, files, last_labels(rounds, state.round, task), worker)
            rounds.write(state.round, partial(_save_labels, labels))
            files.delete()
        with pulse.doing(LABELS_OF_RANK_0):
            while name not in rounds.names():  # not a barrier: clustering may take longer than a collective waits
                worker.stop_if_told()
                time.sleep(WAIT_SECONDS)
    return _read_round(rounds, name)


def set_damaged_labels_aside(rounds: CheckpointStore, round_index: int, worker: WorkerContext) -> None:
    """Set labels of this round and the one before aside where they are damaged; every worker must call this.

    Those of this round are then made again, by the weights that it begins with.
    """

    def decide() -> None:
        known = {checkpoint_name(index) for index in (round_index - 1, round_index)} & set(rounds.names())
        for name in known if worker.rank == 0 else ():
            try:
                _read_round(rounds, name)
            except DamagedCheckpoint as error:
                worker.post("say", text=f"{error.reason}; set aside as {rounds.set_aside(name)}")

    distributed.agreed(decide)


def require_labels(rounds: CheckpointStore, round_index: int, checkpoint: str) -> None:
    """Raise ``DamagedCheckpoint`` when the labels are lost of a round in whose middle ``checkpoint`` was taken."""
    name = checkpoint_name(round_index)
    if name not in rounds.names():
        raise DamagedCheckpoint(f"{checkpoint}: the pseudo-labels of its round are gone", checkpoint)
    try:
        _read_round(rounds, name)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(f"{checkpoint}: its round's pseudo-labels: {error.reason}", checkpoint) from None


def write_features(state: USLState, config: USLConfig, rows: Rows, files: FeatureFiles, worker: WorkerContext) -> None:
    """Features of all rows by the present model; each worker writes every W-th of the shards that are missing."""
    shards = files.missing()
    for position, own in enumerate(shards):
        if worker.rank == 0:
            worker.post("phase", phase="features", done=own.start, total=len(rows))
        if position % worker.world_size != worker.rank:
            continue
        worker.stop_if_told()
        numbers = np.arange(own.start, own.stop)
        features_ND, bad = embed_numbers(
            state.network.model,
            rows,
            numbers,
            ImageInput(config.image_size_px, config.views),
            batch_size=config.extract_batch_size,
            device=worker.device,
        )
        if bad:
            worker.post("bad", images=bad)
        reasons = dict(bad)
        image_ids = [str(image_id) for image_id in rows.image_ids[own]]
        files.write(own, image_ids, features_ND.cpu().numpy(), [reasons.get(image_id) for image_id in image_ids])
    if worker.rank == 0:
        worker.post("phase", phase="features", done=len(rows), total=len(rows))


def make_labels(
    state: USLState,
    config: USLConfig,
    task: Task,
    files: FeatureFiles,
    last_N: NDArray[np.int64] | None,
    worker: WorkerContext,
) -> RoundLabels:
    """Clusters of the rows of ``data``, then the identities of ``source``; images that cannot be used are outliers."""
    features = files.read()
    rows, target = task.rows, task.target
    used = target[features.usable_N[target]]

    def progress(phase: str, done: int, total: int) -> None:
        worker.post("phase", phase=phase, done=done, total=total)

    found = cluster_features(
        features.features_ND[used],
        config.cluster,
        progress,
        cameras_N=rows.camera_ids[used],
        persons_N=rows.person_ids[used],
        last_N=None if last_N is None else last_N[used],
        refiner=state.network.refiner,
        refiner_neighbours=config.refine.num_neighbours,
        overwrite=True,  # of a copy
        workers=config.workers,
    )
    labels_N = np.full(len(rows), OUTLIER, np.int64)
    labels_N[used] = found.labels_N
    is_source = (task.source_N >= 0) & features.usable_N
    labels_N[is_source] = found.health.num_clusters + np.unique(task.source_N[is_source], return_inverse=True)[1]
    return RoundLabels(labels_N, centroids(features.features_ND, labels_N), found)


def last_labels(rounds: CheckpointStore, round_index: int, task: Task) -> NDArray[np.int64] | None:
    """Labels of the round before, of the rows of ``data``; identities of ``source`` are taken out."""
    name = checkpoint_name(round_index - 1)
    if round_index == 0 or name not in rounds.names():
        return None
    return np.where(task.source_N < 0, _read_round(rounds, name).labels_N, OUTLIER)


def read_labels(rounds: CheckpointStore) -> NDArray[np.int64]:
    """Labels of the last round."""
    return _read_round(rounds, rounds.names()[-1]).labels_N


def _save_labels(labels: RoundLabels, folder: Path) -> None:
    found = labels.found
    tensors = {
        "labels": torch.from_numpy(labels.labels_N),
        "centroids": torch.from_numpy(labels.centroids_KD),
        "found": torch.from_numpy(found.labels_N),
    }
    meta = {"eps": found.eps, "recall": found.recall, "notes": found.notes, "health": vars(found.health)}
    save_state(folder, tensors, meta)


def _read_round(rounds: CheckpointStore, name: str) -> RoundLabels:
    read: list[RoundLabels] = []

    def load(folder: Path) -> None:
        tensors, meta = load_state(folder)
        health = ClusterHealth(**meta["health"])
        found = PseudoLabels(tensors["found"].numpy(), meta["eps"], health, meta["recall"], tuple(meta["notes"]))
        read.append(RoundLabels(tensors["labels"].numpy(), tensors["centroids"].numpy(), found))

    rounds.read(name, load)
    return read[0]
