"""Retrieval accuracy of any checkpoint: features of query and gallery by a pool of Ray actors, then mAP, mINP, CMC.

Reads from top to bottom in the order it runs: settings, ``run`` (driver), features, score.
"""

import json
import time
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import ray
import torch
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from passreid_ray.config import Section, UserPath, build
from passreid_ray.data import JUNK_PERSON_ID, Rows, Source, SyntheticSource, open_rows
from passreid_ray.engines.cluster import WorkersConfig, connect, num_cores
from passreid_ray.engines.embedding import embed, read_images
from passreid_ray.errors import UserError
from passreid_ray.models import load_backbone
from passreid_ray.models.config import ModelConfig
from passreid_ray.models.fusion import Fusion
from passreid_ray.models.part_vit import PartViT
from passreid_ray.retrieval import RankingResult, evaluate_ranking
from passreid_ray.train.state_files import find_checkpoint, load_state
from passreid_ray.views import PixelStatistics


class RetrievalConfig(Section):
    """How features are made and compared: the Market-1501 protocol."""

    query: str = "query"
    """Split whose rows are searched for."""
    gallery: str = "gallery"
    """Split that is searched."""
    fusion: Fusion = "cat"
    """Feature: cls, parts (mean of part tokens), cat (both side by side) or mean (of both)."""
    batch_size: int = Field(default=64, ge=1)
    """Images per forward pass of one process."""
    max_rank: int = Field(default=50, ge=1)
    """Length of the CMC curve."""


class EvaluateConfig(Section):
    """Everything an evaluation is made of."""

    output: UserPath = Path("outputs/evaluate")
    """Folder for metrics.json."""
    checkpoint: UserPath | None = None
    """A run or checkpoint folder of this project, or any public file; none: random weights."""
    weights: Literal["teacher", "student"] = "teacher"
    """Which network of a checkpoint of this project."""
    seed: int = Field(default=0, ge=0)
    """Decides random weights."""
    data: Source = SyntheticSource()
    """Labelled rows with a query and a gallery split."""
    retrieval: RetrievalConfig = RetrievalConfig()
    model: ModelConfig = ModelConfig()
    """Model of a public checkpoint or of random weights; a checkpoint of this project brings its own."""
    image_size_px: tuple[int, int] | None = None
    """Height and width that images are resized to; none: the checkpoint's, or 256 x 128."""
    num_parts: int = Field(default=3, ge=0)
    """Part tokens of a public checkpoint or of random weights."""
    pixels: PixelStatistics | None = None
    """Pixel mean and standard deviation; none: the checkpoint's, or ImageNet's."""
    num_actors: int | None = Field(default=None, ge=1)
    """Processes that compute features; none: one per GPU, or one per core."""
    gpus_per_actor: float = Field(default=1.0, gt=0)
    """Share of a GPU that an actor takes where the cluster has one; 0.5 puts two on one."""


def run(config: EvaluateConfig, console: Console | None = None) -> RankingResult:
    """Evaluate ``config.checkpoint`` on ``config.data``; writes ``metrics.json`` into ``config.output``."""
    console = console or Console(highlight=False, soft_wrap=True)
    rows = labelled_rows(config.data, config.retrieval)
    model, size_px, pixels, notes = load_model(config)
    try:
        config.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output: {config.output} cannot be created: {error.strerror or error}") from None
    connect(WorkersConfig())
    console.print(f"{len(rows)} images; {notes}")
    start = time.perf_counter()
    features_ND, bad = extract(config, rows, model, size_px, pixels, console)
    seconds = time.perf_counter() - start
    result = score(features_ND, rows, config.retrieval, bad)
    metrics = {
        **as_metrics(result),
        "cmc": [float(value) for value in result.cmc],
        "num_queries": result.num_valid_queries,
        "images_per_second": len(rows) / seconds,
        "checkpoint": str(config.checkpoint) if config.checkpoint else None,
        "unusable_images": [{"image_id": image_id, "reason": reason} for image_id, reason in bad],
    }
    path = config.output / "metrics.json"
    path.write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    table = Table("mAP", "mINP", "rank-1", "rank-5", "rank-10", "queries")
    ranks = [f"{result.cmc[min(rank, len(result.cmc)) - 1]:.2%}" for rank in (1, 5, 10)]
    table.add_row(f"{result.mAP:.2%}", f"{result.mINP:.2%}", *ranks, str(result.num_valid_queries))
    console.print(table)
    console.print(f"{len(rows) / seconds:.0f} images/s; written to {path}")
    return result


def labelled_rows(data: Source, retrieval: RetrievalConfig) -> Rows:
    """Query and gallery rows of ``data``; raises ``UserError`` when a split or the identities are missing."""
    rows = open_rows(data).with_split(retrieval.query, retrieval.gallery)
    unknown = int(np.sum([person_id is None for person_id in rows.person_ids]))
    if unknown:
        raise UserError(f"{unknown} of {len(rows)} query and gallery images have no person_id; evaluation needs them")
    return rows


def load_model(config: EvaluateConfig) -> tuple[PartViT, tuple[int, int], PixelStatistics, str]:
    """(model, image size, pixel statistics, what was loaded) of ``config``'s checkpoint or of random weights."""
    size_px = config.image_size_px or (256, 128)
    pixels = config.pixels or PixelStatistics()
    if config.checkpoint is None:
        torch.manual_seed(config.seed)
        return config.model.build(size_px, config.num_parts), size_px, pixels, "random weights"
    if not config.checkpoint.exists():
        raise UserError(f"checkpoint: {config.checkpoint} does not exist")
    if not config.checkpoint.is_dir():
        model = config.model.build(size_px, config.num_parts)
        return model, size_px, pixels, f"{config.checkpoint}: {load_backbone(model, config.checkpoint)}"
    folder = find_checkpoint(config.checkpoint)
    tensors, meta = load_state(folder)
    views = meta["config"]["views"]
    own_model = build(ModelConfig, meta["config"]["model"])
    size_px = config.image_size_px or tuple(views["global_size_px"])
    pixels = config.pixels or PixelStatistics(mean=views["mean"], std=views["std"])
    model = own_model.build(size_px, views["num_parts"])
    prefix = f"{config.weights}.backbone."
    report = load_backbone(model, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return model, size_px, pixels, f"{config.weights} of {folder}, step {meta['step']}: {report}"


class FeatureActor:
    """A Ray Data actor: built once with the model, called per batch of images."""

    def __init__(self, model: Any, fusion: Fusion, *, threads: int) -> None:
        torch.set_num_threads(threads)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = cast(PartViT, ray.get(model)).to(self._device).eval()
        self._fusion: Fusion = fusion

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images_BCHW = torch.from_numpy(batch.pop("image").copy()).to(self._device)
        return {**batch, "feature": embed(self._model, images_BCHW, self._fusion).cpu().numpy()}


def extract(
    config: EvaluateConfig,
    rows: Rows,
    model: PartViT,
    size_px: tuple[int, int],
    pixels: PixelStatistics,
    console: Console,
) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Features ``(N, D)`` of ``rows`` in their order, NaN for images that could not be used, and those images."""
    rows_ref, model_ref = ray.put(rows), ray.put(model)
    has_gpu = ray.cluster_resources().get("GPU", 0) > 0
    num_actors = config.num_actors or (
        int(ray.cluster_resources()["GPU"] / config.gpus_per_actor) if has_gpu else num_cores()
    )
    batch_size = config.retrieval.batch_size

    def read(batch: Any) -> Any:
        images_BCHW, bad = read_images(ray.get(rows_ref), batch["id"], size_px, pixels)
        reasons = dict(bad)
        ids = ray.get(rows_ref).image_ids[batch["id"]]
        return {
            "id": batch["id"],
            "image": images_BCHW.numpy(),
            "bad": np.array([reasons.get(i, "") for i in ids], object),
        }

    num_blocks = -(-len(rows) // batch_size)
    num_actors = min(num_actors, num_blocks)
    numbers = ray.data.range(len(rows), override_num_blocks=num_blocks)
    features = numbers.map_batches(read, batch_size=batch_size).map_batches(
        FeatureActor,
        fn_constructor_args=(model_ref, config.retrieval.fusion),
        fn_constructor_kwargs={"threads": max(1, num_cores() // num_actors)},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=num_actors),
        num_cpus=0.5,
        num_gpus=config.gpus_per_actor if has_gpu else 0,
    )
    features_ND: np.ndarray | None = None
    bad: list[tuple[str, str]] = []
    columns = TextColumn("features"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(rows))
        for batch in features.iter_batches(batch_format="numpy", batch_size=None):
            if features_ND is None:
                features_ND = np.full((len(rows), batch["feature"].shape[1]), np.nan, np.float32)
            features_ND[batch["id"]] = batch["feature"]
            bad += [
                (str(rows.image_ids[i]), reason) for i, reason in zip(batch["id"], batch["bad"], strict=True) if reason
            ]
            progress.advance(task, len(batch["id"]))
    assert features_ND is not None
    return features_ND, bad


def score(features_ND: np.ndarray, rows: Rows, retrieval: RetrievalConfig, bad: list[tuple[str, str]]) -> RankingResult:
    """Market-1501 protocol over the rows that are not junk and whose image is not among the ``bad`` ones."""
    has_cameras = all(camera_id is not None for camera_id in rows.camera_ids)
    cameras = rows.camera_ids.astype(str)
    usable = ~np.isin(rows.image_ids.astype(str), [image_id for image_id, _ in bad])
    usable &= rows.person_ids != JUNK_PERSON_ID
    persons = rows.person_ids.astype(str)
    query, gallery = usable & (rows.splits == retrieval.query), usable & (rows.splits == retrieval.gallery)
    return evaluate_ranking(
        features_ND[query],
        features_ND[gallery],
        persons[query],
        persons[gallery],
        cameras[query] if has_cameras else None,
        cameras[gallery] if has_cameras else None,
        max_rank=retrieval.max_rank,
    )


def as_metrics(result: RankingResult) -> dict[str, float]:
    """mAP, mINP and the usual ranks, as fractions."""
    ranks = {f"rank{rank}": float(result.cmc[min(rank, len(result.cmc)) - 1]) for rank in (1, 5, 10)}
    return {"mAP": float(result.mAP), "mINP": float(result.mINP), **ranks}
