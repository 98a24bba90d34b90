"""Retrieval accuracy of features: which rows are query and gallery, and the Market-1501 protocol over them."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from passreid_ray import distributed
from passreid_ray.config import Section
from passreid_ray.data import JUNK_PERSON_ID, Rows, Source, open_rows
from passreid_ray.data.known_sets import check_known_set
from passreid_ray.engines.embedding import Embedder, ImageInput, embed_rows
from passreid_ray.errors import UserError
from passreid_ray.models.fusion import Fusion
from passreid_ray.retrieval import RankingResult, evaluate_ranking
from passreid_ray.train.pulse import EVALUATION, pulse


class RetrievalConfig(Section):
    """How features are made and compared: the Market-1501 protocol."""

    query: str = "query"
    """Split whose rows are searched for."""
    gallery: str = "gallery"
    """Split that is searched."""
    fusion: Fusion = "cat"
    """Feature: cls, parts (mean of part tokens), cat (both side by side) or mean (of both); if tuned, its own."""
    batch_size: int = Field(default=64, ge=1)
    """Images per forward pass of one process."""
    max_rank: int = Field(default=50, ge=1)
    """Length of the CMC curve."""
    junk: Literal["leave_out", "distractors"] = "leave_out"
    """Gallery images of person_id -1 do not count (Market-1501), or are wrong answers to every query."""


class LabelledData(Section):
    """Labelled rows that a run is measured on while it trains."""

    data: Source | None = None
    """Labelled rows with a query and a gallery split; none: no evaluation."""
    retrieval: RetrievalConfig = RetrievalConfig()

    def open(self) -> tuple[Rows | None, list[str]]:
        """The labelled rows, if any, and what a reader of their figures should know of them."""
        if self.data is None:
            return None, []
        every = open_rows(self.data)
        rows = labelled_rows(every, self.retrieval, "evaluation.data")
        notes = [*protocol_notes(every, self.retrieval), *check_known_set(every, self.data.kind)]
        return rows, [f"evaluation: {note}" for note in notes]


@dataclass(frozen=True)
class RetrievalTask:
    """Features of query and gallery, and who and which camera they show."""

    query_QD: NDArray[np.float32]
    gallery_GD: NDArray[np.float32]
    query_ids: NDArray[np.str_]
    gallery_ids: NDArray[np.str_]
    query_cameras: NDArray[np.str_] | None
    """None, for both, when some row's camera is unknown: then there is no camera rule."""
    gallery_cameras: NDArray[np.str_] | None

    def rank(
        self,
        max_rank: int,
        *,
        distance_QG: NDArray[np.float32] | None = None,
        false_accept_rates: tuple[float, ...] = (),
    ) -> RankingResult:
        """Accuracy by cosine distance, or by ``distance_QG``."""
        return evaluate_ranking(
            self.query_QD if distance_QG is None else None,
            self.gallery_GD if distance_QG is None else None,
            self.query_ids,
            self.gallery_ids,
            self.query_cameras,
            self.gallery_cameras,
            distance=distance_QG,
            max_rank=max_rank,
            false_accept_rates=false_accept_rates,
        )


def labelled_rows(rows: Rows, retrieval: RetrievalConfig, where: str = "data") -> Rows:
    """Query and gallery rows of a data set that count; ``UserError`` when a split or the identities are missing."""
    rows = rows.with_split(retrieval.query, retrieval.gallery, where=where)
    unknown = int(np.sum([person_id is None for person_id in rows.person_ids]))
    if unknown:
        raise UserError(
            f"{where}: {unknown} of {len(rows)} query and gallery images have no person_id; evaluation needs them"
        )
    is_junk = rows.person_ids == JUNK_PERSON_ID
    counts = ~is_junk if retrieval.junk == "leave_out" else ~is_junk | (rows.splits == retrieval.gallery)
    return rows if counts.all() else rows.select(counts)


def protocol_notes(rows: Rows, retrieval: RetrievalConfig) -> list[str]:
    """What of a data set's query and gallery rows counts, where that is not plain."""
    rows = rows.with_split(retrieval.query, retrieval.gallery)
    notes = []
    unknown = int(np.sum([camera_id is None for camera_id in rows.camera_ids]))
    if unknown:
        notes.append(
            f"{unknown} of {len(rows)} images have no camera label, so no image is left out for its camera: "
            "figures are higher than by the usual protocol"
        )
    if junk := int((rows.person_ids == JUNK_PERSON_ID).sum()):
        became = "left out" if retrieval.junk == "leave_out" else "wrong answers to every query"
        notes.append(f"{junk} images of person_id {JUNK_PERSON_ID} are {became} (retrieval.junk)")
    return notes


def retrieval_task(
    features_ND: NDArray[np.float32], rows: Rows, retrieval: RetrievalConfig, is_usable_N: NDArray[np.bool_]
) -> RetrievalTask:
    """Features of ``labelled_rows``, but for those whose image could not be used."""
    has_cameras = all(camera_id is not None for camera_id in rows.camera_ids)
    cameras, persons = rows.camera_ids.astype(str), rows.person_ids.astype(str)
    query = is_usable_N & (rows.splits == retrieval.query)
    gallery = is_usable_N & (rows.splits == retrieval.gallery)
    return RetrievalTask(
        features_ND[query],
        features_ND[gallery],
        persons[query],
        persons[gallery],
        cameras[query] if has_cameras else None,
        cameras[gallery] if has_cameras else None,
    )


@pulse.doing(EVALUATION)
def measure(
    model: Embedder, rows: Rows, image_input: ImageInput, retrieval: RetrievalConfig, device: torch.device
) -> dict[str, float]:
    """``evaluation/*`` of ``model`` on query and gallery ``rows``, on rank 0; all workers share the features."""
    features_ND, is_usable_N = embed_rows(model, rows, image_input, batch_size=retrieval.batch_size, device=device)
    if distributed.rank() != 0:
        return {}
    metrics = as_metrics(retrieval_task(features_ND, rows, retrieval, is_usable_N).rank(retrieval.max_rank))
    if num_bad := int((~is_usable_N).sum()):
        metrics["unusable_images"] = float(num_bad)
    return {f"evaluation/{name}": value for name, value in metrics.items()}


def as_metrics(result: RankingResult) -> dict[str, float]:
    """mAP, mINP and the usual ranks, as fractions."""
    ranks = {f"rank{rank}": float(result.cmc[min(rank, len(result.cmc)) - 1]) for rank in (1, 5, 10)}
    return {"mAP": float(result.mAP), "mINP": float(result.mINP), **ranks}
