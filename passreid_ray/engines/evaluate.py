"""Retrieval accuracy of any checkpoint: features of query and gallery by a pool of Ray actors, then mAP, mINP, CMC.

Reads from top to bottom in the order it runs: settings, ``run`` (driver), features, score.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table

from passreid_ray import distributed
from passreid_ray.config import Section, UserPath
from passreid_ray.data import JUNK_PERSON_ID, Rows, Source, SyntheticSource, open_rows
from passreid_ray.engines.embedding import Embedder, ImageInput, embed_rows
from passreid_ray.engines.features import FeatureConfig, extract, load_model
from passreid_ray.engines.progress import PhaseLines
from passreid_ray.engines.ray_cluster import WorkersConfig, connect
from passreid_ray.engines.run_folder import check_writable
from passreid_ray.errors import UserError
from passreid_ray.models.fusion import Fusion
from passreid_ray.retrieval import RankingResult, evaluate_ranking


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


class LabelledData(Section):
    """Labelled rows that a run is measured on while it trains."""

    data: Source | None = None
    """Labelled rows with a query and a gallery split; none: no evaluation."""
    retrieval: RetrievalConfig = RetrievalConfig()

    def rows(self) -> Rows | None:
        """The labelled rows, if any."""
        return None if self.data is None else labelled_rows(self.data, self.retrieval)


class EvaluateConfig(FeatureConfig):
    """Everything an evaluation is made of."""

    output: UserPath = Path("outputs/evaluate")
    """Folder for metrics.json."""
    data: Source = SyntheticSource()
    """Labelled rows with a query and a gallery split."""
    retrieval: RetrievalConfig = RetrievalConfig()


def run(config: EvaluateConfig, console: Console | None = None) -> RankingResult:
    """Evaluate ``config.checkpoint`` on ``config.data``; writes ``metrics.json`` into ``config.output``."""
    console = console or Console(highlight=False, soft_wrap=True)
    rows = labelled_rows(config.data, config.retrieval)
    loaded = load_model(config, config.retrieval.fusion)
    check_writable(config.output, "output")
    connect(WorkersConfig())
    console.print(f"{len(rows)} images; {loaded.notes}")
    start = time.perf_counter()
    with PhaseLines(console) as progress:
        features_ND, bad = extract(config, rows, loaded, config.retrieval.batch_size, progress)
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


def measure(
    model: Embedder, rows: Rows, image_input: ImageInput, retrieval: RetrievalConfig, device: torch.device
) -> dict[str, float]:
    """``evaluation/*`` of ``model`` on query and gallery ``rows``, on rank 0; all workers share the features."""
    features_ND, bad = embed_rows(model, rows, image_input, batch_size=retrieval.batch_size, device=device)
    if distributed.rank() != 0:
        return {}
    return {f"evaluation/{name}": value for name, value in as_metrics(score(features_ND, rows, retrieval, bad)).items()}


def as_metrics(result: RankingResult) -> dict[str, float]:
    """mAP, mINP and the usual ranks, as fractions."""
    ranks = {f"rank{rank}": float(result.cmc[min(rank, len(result.cmc)) - 1]) for rank in (1, 5, 10)}
    return {"mAP": float(result.mAP), "mINP": float(result.mINP), **ranks}
