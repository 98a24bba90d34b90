"""Features of any data by any checkpoint: a pool of Ray actors, and files that a stopped job goes on from.

Reads from top to bottom in the order it runs: settings, the actor, ``extract``.
"""

from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import ray
import torch
from pydantic import Field

from passreid_ray.data import Rows
from passreid_ray.data.feature_files import FeatureFiles
from passreid_ray.engines.embedding import FusedViT, TunedFeatures, embed, read_images
from passreid_ray.engines.loading import LoadConfig, Loaded
from passreid_ray.engines.progress import PhaseProgress
from passreid_ray.engines.ray_cluster import num_cores
from passreid_ray.engines.task_errors import telling_people
from passreid_ray.models import ReidModel


class FeatureConfig(LoadConfig):
    """Which weights make features, and on what."""

    num_actors: int | None = Field(default=None, ge=1)
    """Processes that compute features; none: one per GPU, or one per core."""
    gpus_per_actor: float = Field(default=1.0, gt=0)
    """Share of a GPU that an actor takes where the cluster has one; 0.5 puts two on one."""


class FeatureActor:
    """A Ray Data actor: built once with the model, called per batch of images."""

    def __init__(self, model: Any, *, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = cast(FusedViT | ReidModel | TunedFeatures, ray.get(model)).to(self._device).eval()

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images_BCHW = torch.from_numpy(batch.pop("image").copy()).to(self._device)
        grid = batch.pop("grid", None)
        grids_B2 = None if grid is None else torch.from_numpy(grid.copy())
        return {**batch, "feature": embed(self._model, images_BCHW, grids_B2).cpu().numpy()}


def extract(
    config: FeatureConfig,
    rows: Rows,
    loaded: Loaded,
    batch_size: int,
    progress: PhaseProgress,
    files: FeatureFiles | None = None,
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Features ``(N, D)`` of ``rows`` in their order, NaN for images that could not be used, and those images.

    With ``files`` every finished shard is written, and those that are there are not computed again. Raises
    ``UserError`` when a process died or the cluster has no room, retries included.
    """
    shards = [slice(0, len(rows))] if files is None else files.missing()
    numbers = np.concatenate([np.arange(own.start, own.stop) for own in shards] or [np.empty(0, np.int64)])
    done = len(rows) - len(numbers)
    features_ND = np.empty((0, loaded.model.feature_width), np.float32)
    reasons: list[str | None] = []
    if len(numbers):
        progress("features", done, len(rows))
        batches = _feature_batches(config, rows, numbers, loaded, batch_size)
        for own in shards:  # batches come in the order of the rows, so the next ones fill the next shard
            size = own.stop - own.start
            with telling_people():
                features_ND, reasons = _take(batches, features_ND, reasons, size, done, len(rows), progress)
            done += size
            if files is not None:
                image_ids = [str(image_id) for image_id in rows.image_ids[own]]
                files.write(own, image_ids, features_ND[:size], reasons[:size])
                features_ND, reasons = features_ND[size:], reasons[size:]
    if files is not None:
        found = files.read()
        return found.features_ND, list(found.reasons.items())
    image_ids = rows.image_ids
    return features_ND, [(str(image_ids[i]), reason) for i, reason in enumerate(reasons) if reason is not None]


def _take(
    batches: Iterator[tuple[np.ndarray, list[str | None]]],
    features_ND: np.ndarray,
    reasons: list[str | None],
    size: int,
    done: int,
    total: int,
    progress: PhaseProgress,
) -> tuple[np.ndarray, list[str | None]]:
    """What was left over, and as many batches as make ``size`` rows of it."""
    parts = [features_ND]
    while len(reasons) < size:
        part, own = next(batches)
        parts.append(part)
        reasons = reasons + own
        progress("features", min(done + len(reasons), total), total)
    return np.concatenate(parts), reasons


def _feature_batches(
    config: FeatureConfig, rows: Rows, numbers: np.ndarray, loaded: Loaded, batch_size: int
) -> Iterator[tuple[np.ndarray, list[str | None]]]:
    """(features, reasons why an image could not be used) of the rows ``numbers``, batch after batch in their order."""
    rows_ref, model_ref, numbers_ref = ray.put(rows), ray.put(loaded.model), ray.put(numbers)
    num_gpus = ray.cluster_resources().get("GPU", 0)
    num_blocks = -(-len(numbers) // batch_size)
    num_actors = min(
        num_blocks, config.num_actors or (int(num_gpus / config.gpus_per_actor) if num_gpus else num_cores())
    )
    image_input = loaded.image_input

    def read_batch(batch: Any) -> Any:
        own = ray.get(numbers_ref)[batch["id"]]
        read = read_images(ray.get(rows_ref), own, image_input)
        reasons = dict(read.bad)
        ids = ray.get(rows_ref).image_ids[own]
        made = {"image": read.images_BCHW.numpy(), "bad": np.array([reasons.get(i, "") for i in ids], object)}
        return made if read.grids_B2 is None else made | {"grid": read.grids_B2.numpy()}

    features = (
        ray.data.range(len(numbers), override_num_blocks=num_blocks)
        .map_batches(read_batch, batch_size=batch_size)
        .map_batches(
            FeatureActor,
            fn_constructor_args=(model_ref,),
            fn_constructor_kwargs={"threads": max(1, num_cores() // num_actors)},
            batch_size=batch_size,
            compute=ray.data.ActorPoolStrategy(size=num_actors),
            num_cpus=0.5,
            num_gpus=config.gpus_per_actor if num_gpus else 0,
        )
    )
    features.context.execution_options.preserve_order = True
    for batch in features.iter_batches(batch_format="numpy", batch_size=None):
        yield np.asarray(batch["feature"]), [reason or None for reason in batch["bad"]]
