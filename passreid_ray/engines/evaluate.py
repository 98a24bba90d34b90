"""Retrieval accuracy of any checkpoint on any labelled data: features by a pool of Ray actors, then numbers.

Reads from top to bottom in the order it runs: settings, ``run`` (driver), one evaluation, what is printed and written.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from rich.console import Console
from rich.table import Table

from passreid_ray.config import Section, UserPath
from passreid_ray.data import JUNK_PERSON_ID, Rows, Source, SyntheticSource, open_rows
from passreid_ray.data.known_sets import check_known_set
from passreid_ray.engines.features import FeatureConfig, extract
from passreid_ray.engines.loading import Loaded, load_model
from passreid_ray.engines.progress import PhaseLines
from passreid_ray.engines.ray_cluster import WorkersConfig, connect
from passreid_ray.engines.row_blocks import RowBlocks
from passreid_ray.engines.run_folder import check_writable
from passreid_ray.engines.scoring import RetrievalConfig, RetrievalTask, as_metrics, labelled_rows, retrieval_task
from passreid_ray.errors import UserError
from passreid_ray.retrieval import RankingResult, rerank
from passreid_ray.retrieval.candidate_sets import ScoreOfIdentity, candidate_accuracy, candidate_sets
from passreid_ray.retrieval.expansion import average_query_expansion, database_augmentation
from passreid_ray.retrieval.few_shot import few_shot_accuracies, few_shot_summary

Method = Literal["cosine", "expanded", "reranked"]


class ExpansionConfig(Section):
    """Features averaged with those of their neighbours before they are compared."""

    query_neighbours: int = Field(default=0, ge=0)
    """Average query expansion: gallery images that are averaged with a query; 0: none."""
    gallery_neighbours: int = Field(default=0, ge=0)
    """Database-side augmentation: gallery images that are averaged with each of them; 0: none."""
    alpha: float = Field(default=0.0, ge=0)
    """Neighbours weigh similarity to this power; 0: all alike."""


class RerankConfig(Section):
    """k-reciprocal re-ranking (arXiv:1701.08398)."""

    enabled: bool = False
    """Measure with re-ranking too."""
    k1: int = Field(default=20, ge=1)
    """Neighbours of the sets, the image itself not counted."""
    k2: int = Field(default=6, ge=1)
    """Neighbours of the query expansion."""
    lambda_value: float = Field(default=0.3, ge=0, le=1)
    """Weight of the original distance."""


class CandidatesConfig(Section):
    """Shortlists of gallery people: few for a clear query, many for an ambiguous one."""

    k: int = Field(default=0, ge=0)
    """People on a shortlist, on average over the queries; 0: no shortlists."""
    score: ScoreOfIdentity = "max"
    """A person scores the highest similarity of its images, or the mean."""
    temperature: float = Field(default=0.05, gt=0)
    """Of the softmax over people."""


class FewShotConfig(Section):
    """Few-shot identification (arXiv:1911.06045) on the query and gallery people."""

    episodes: int = Field(default=0, ge=0)
    """Episodes, 10,000 in the literature; 0: none."""
    way: int = Field(default=5, ge=2)
    """People of an episode."""
    shots: tuple[int, ...] = (1, 5)
    """Known images of each; every number is measured."""
    num_queries: int = Field(default=5, ge=1)
    """Images of each to identify."""
    cross_camera: bool = True
    """They are of other cameras than the known ones."""


class CrossConfig(Section):
    """Several checkpoints on several data sets, as a matrix."""

    checkpoints: tuple[UserPath, ...] = ()
    """Rows of the matrix; empty: checkpoint."""
    data: tuple[Source, ...] = ()
    """Columns; empty: data."""


class EvaluateConfig(FeatureConfig):
    """Everything an evaluation is made of."""

    output: UserPath = Path("outputs/evaluate")
    """Folder for metrics.json."""
    data: Source = SyntheticSource()
    """Labelled rows with a query and a gallery split."""
    retrieval: RetrievalConfig = RetrievalConfig()
    false_accept_rates: tuple[float, ...] = (0.001, 0.01)
    """Shares of wrong pairs at which the share of right pairs that a threshold accepts is told."""
    expansion: ExpansionConfig = ExpansionConfig()
    rerank: RerankConfig = RerankConfig()
    candidates: CandidatesConfig = CandidatesConfig()
    few_shot: FewShotConfig = FewShotConfig()
    cross: CrossConfig = CrossConfig()


@dataclass(frozen=True)
class TestSet:
    """Labelled rows to measure on."""

    name: str
    rows: Rows
    """Query and gallery."""
    notes: list[str]
    """Which well-known data set this is, or how it differs from it."""


@dataclass(frozen=True)
class Evaluation:
    """What one checkpoint reaches on one data set."""

    checkpoint: str
    data: str
    methods: dict[Method, RankingResult]
    notes: list[str]
    """What a reader should know of the data."""
    images_per_second: float
    bad: list[tuple[str, str]]
    """(image_id, reason) of images that could not be used."""
    more: dict[str, Any] = field(default_factory=dict)
    """Shortlists and few-shot, where they were asked for."""

    def as_record(self) -> dict[str, Any]:
        """For metrics.json."""
        plain = self.methods["cosine"]
        return {
            **as_metrics(plain),
            "cmc": [float(value) for value in plain.cmc],
            "true_accept_rates": {str(rate): value for rate, value in plain.true_accept_rates.items()},
            "num_queries": plain.num_valid_queries,
            **{name: as_metrics(result) for name, result in self.methods.items() if name != "cosine"},
            **self.more,
            "images_per_second": self.images_per_second,
            "checkpoint": self.checkpoint,
            "data": self.data,
            "notes": self.notes,
            "unusable_images": [{"image_id": image_id, "reason": reason} for image_id, reason in self.bad],
        }


def run(config: EvaluateConfig, console: Console | None = None) -> list[Evaluation]:
    """Evaluate every checkpoint on every data set; writes ``metrics.json`` into ``config.output``.

    Every check that needs no cluster comes before Ray starts.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    sets = open_sets(config)
    checkpoints = config.cross.checkpoints or [config.checkpoint]
    models = [
        load_model(config.model_copy(update={"checkpoint": path}), config.retrieval.fusion) for path in checkpoints
    ]
    check_writable(config.output, "output")
    connect(WorkersConfig())
    found: list[Evaluation] = []
    for path, loaded in zip(checkpoints, models, strict=True):
        console.print(loaded.notes)
        for test_set in sets:
            evaluation = evaluate(config, str(path or "random weights"), test_set, loaded, console)
            for note in evaluation.notes:
                console.print(note)
            print_evaluation(evaluation, console)
            found.append(evaluation)
    if len(found) > 1:
        print_matrix(found, console)
    path = config.output / "metrics.json"
    records = [evaluation.as_record() for evaluation in found]
    path.write_text(json.dumps(records if len(found) > 1 else records[0], indent=1), encoding="utf-8")
    console.print(f"written to {path}")
    return found


def open_sets(config: EvaluateConfig) -> list[TestSet]:
    """The data sets of ``config``; raises ``UserError`` when a split or the identities of one are missing."""
    sources = config.cross.data or [config.data]
    sets = []
    for index, source in enumerate(sources):
        every, where = open_rows(source), f"cross.data.{index}" if config.cross.data else "data"
        rows = labelled_rows(every, config.retrieval, where)
        sets.append(TestSet(_name(source), rows, check_known_set(every, source.kind)))
    return sets


def evaluate(
    config: EvaluateConfig, checkpoint: str, test_set: TestSet, loaded: Loaded, console: Console
) -> Evaluation:
    """All that is asked for, of one model on one data set."""
    rows = test_set.rows
    console.print(f"{test_set.name}: {len(rows)} query and gallery images")
    with PhaseLines(console) as progress:
        start = time.perf_counter()
        features_ND, bad = extract(config, rows, loaded, config.retrieval.batch_size, progress)
        seconds = time.perf_counter() - start
        task = retrieval_task(features_ND, rows, config.retrieval, bad)
        methods: dict[Method, RankingResult] = {
            "cosine": task.rank(config.retrieval.max_rank, false_accept_rates=config.false_accept_rates)
        }
        notes = [*protocol_notes(task, rows, config.retrieval, methods["cosine"]), *test_set.notes]
        expanded = expand(task, config.expansion)
        if expanded is not task:
            methods["expanded"] = expanded.rank(config.retrieval.max_rank)
        if config.rerank.enabled:
            own = config.rerank
            distance_QG = rerank(expanded.query_QD, expanded.gallery_GD, own.k1, own.k2, own.lambda_value)
            methods["reranked"] = expanded.rank(config.retrieval.max_rank, distance_QG=distance_QG)
        more: dict[str, Any] = {}
        if config.candidates.k:
            more["candidates"] = shortlists(task, config.candidates)
        if config.few_shot.episodes:
            more["few_shot"] = few_shot(task, config.few_shot, config.seed, progress)
    return Evaluation(checkpoint, test_set.name, methods, notes, len(rows) / seconds, bad, more)


def protocol_notes(task: RetrievalTask, rows: Rows, retrieval: RetrievalConfig, result: RankingResult) -> list[str]:
    """What of the rows counts, where that is not plain."""
    notes = []
    if task.query_cameras is None:
        unknown = int(np.sum([camera_id is None for camera_id in rows.camera_ids]))
        notes.append(
            f"{unknown} of {len(rows)} images have no camera label, so no image is left out for its camera: "
            "figures are higher than by the usual protocol"
        )
    if junk := int((rows.person_ids == JUNK_PERSON_ID).sum()):
        became = "left out" if retrieval.junk == "leave_out" else "wrong answers to every query"
        notes.append(f"{junk} images of person_id {JUNK_PERSON_ID} are {became} (retrieval.junk)")
    if without := len(task.query_ids) - result.num_valid_queries:
        notes.append(f"{without} of {len(task.query_ids)} queries have no match in the gallery and do not count")
    return notes


def expand(task: RetrievalTask, config: ExpansionConfig) -> RetrievalTask:
    """``task`` with averaged features, or itself when nothing is averaged."""
    if not config.query_neighbours and not config.gallery_neighbours:
        return task
    query_QD, gallery_GD = task.query_QD, task.gallery_GD
    if config.gallery_neighbours:
        gallery_GD = database_augmentation(gallery_GD, config.gallery_neighbours, config.alpha)
    if config.query_neighbours:
        query_QD = average_query_expansion(query_QD, gallery_GD, config.query_neighbours, config.alpha)
    return RetrievalTask(
        query_QD, gallery_GD, task.query_ids, task.gallery_ids, task.query_cameras, task.gallery_cameras
    )


def shortlists(task: RetrievalTask, config: CandidatesConfig) -> dict[str, float]:
    """How often the query's person is on its shortlist, beside lists of one length for all queries."""
    sets = candidate_sets(
        task.query_QD,
        task.gallery_GD,
        task.gallery_ids,
        config.k,
        score=config.score,
        temperature=config.temperature,
        query_ids=task.query_ids,
        query_cameras=task.query_cameras,
        gallery_cameras=task.gallery_cameras,
    )
    accuracy = candidate_accuracy(sets, task.query_ids)
    return {
        "k": config.k,
        "average_k_accuracy": accuracy.average_k,
        "top_k_accuracy": accuracy.top_k,
        "mean_size": accuracy.mean_size,
    }


def few_shot(
    task: RetrievalTask, config: FewShotConfig, seed: int, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Accuracy of episodes of query and gallery people, for every number of shots; episodes run as Ray tasks."""
    if config.cross_camera and task.query_cameras is None:
        raise UserError("few_shot.cross_camera: some images have no camera_id; set it to false, or give cameras")
    blocks = RowBlocks(config.episodes, None, progress)
    features_ND = np.concatenate([task.query_QD, task.gallery_GD])
    persons_N = np.concatenate([task.query_ids, task.gallery_ids])
    cameras_N = None
    if task.query_cameras is not None and task.gallery_cameras is not None:
        cameras_N = np.concatenate([task.query_cameras, task.gallery_cameras])
    shared = [blocks.share(value) for value in (features_ND, persons_N, cameras_N)]
    results = {}
    for shot in config.shots:
        accuracies = blocks.collect(f"{shot}-shot episodes", _episodes, *shared, config, shot, seed)
        result = few_shot_summary(np.concatenate(accuracies))
        results[f"{shot}_shot"] = {"accuracy": result.mean, "half_width": result.half_width}
    return {"way": config.way, "episodes": config.episodes, **results}


def _episodes(
    block: slice,
    features_ND: NDArray[np.float32],
    persons_N: NDArray[np.str_],
    cameras_N: NDArray[np.str_] | None,
    config: FewShotConfig,
    shot: int,
    seed: int,
) -> NDArray[np.float64]:
    return few_shot_accuracies(
        features_ND,
        persons_N,
        cameras_N,
        range(block.start, block.stop),
        way=config.way,
        shot=shot,
        num_queries=config.num_queries,
        cross_camera=config.cross_camera,
        seed=seed,
    )


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """The table of one evaluation, and a line for each of the rest."""
    table = Table("", "mAP", "mINP", "rank-1", "rank-5", "rank-10", "queries")
    for name, result in evaluation.methods.items():
        ranks = [f"{result.cmc[min(rank, len(result.cmc)) - 1]:.2%}" for rank in (1, 5, 10)]
        table.add_row(name, f"{result.mAP:.2%}", f"{result.mINP:.2%}", *ranks, str(result.num_valid_queries))
    console.print(table)
    if rates := evaluation.methods["cosine"].true_accept_rates:
        console.print(
            "right pairs accepted: "
            + ", ".join(f"{accepted:.2%} at {rate:.2%} of the wrong ones" for rate, accepted in rates.items())
        )
    if lists := evaluation.more.get("candidates"):
        console.print(
            f"shortlists of {lists['mean_size']:.2f} people on average have the right one for "
            f"{lists['average_k_accuracy']:.2%} of the queries; lists of {lists['k']} each for "
            f"{lists['top_k_accuracy']:.2%}"
        )
    if shots := evaluation.more.get("few_shot"):
        for name, result in shots.items():
            if isinstance(result, dict):
                console.print(
                    f"{shots['way']}-way {name.replace('_', '-')}: {result['accuracy']:.2%} "
                    f"± {result['half_width']:.2%} ({shots['episodes']} episodes)"
                )
    console.print(f"{evaluation.images_per_second:.0f} images/s")


def print_matrix(found: list[Evaluation], console: Console) -> None:
    """mAP and rank-1 of every checkpoint on every data set."""
    columns = list(dict.fromkeys(evaluation.data for evaluation in found))
    table = Table("mAP / rank-1", *columns)
    for checkpoint in dict.fromkeys(evaluation.checkpoint for evaluation in found):
        cells = [
            f"{evaluation.methods['cosine'].mAP:.2%} / {evaluation.methods['cosine'].cmc[0]:.2%}"
            for evaluation in found
            if evaluation.checkpoint == checkpoint
        ]
        table.add_row(checkpoint, *cells)
    console.print(table)


def _name(source: Source) -> str:
    """What a data set is called in tables: its folder's name, or its kind."""
    place = getattr(source, "root", None) or getattr(source, "path", None)
    return source.kind if place is None else Path(str(place)).resolve().name
