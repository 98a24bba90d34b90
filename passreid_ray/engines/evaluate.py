"""Retrieval accuracy of any checkpoint on any labelled data: features by a pool of Ray actors, then numbers.

Reads from top to bottom in the order it runs: settings, ``run`` (driver), one evaluation, what is printed and written.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from passreid_ray.engines.evaluate_config import CandidatesConfig, EvaluateConfig, ExpansionConfig, FewShotConfig
from passreid_ray.engines.features import extract
from passreid_ray.engines.loading import Loaded, load_model
from passreid_ray.engines.measured_sets import MeasuredSet, open_sets
from passreid_ray.engines.progress import PhaseLines
from passreid_ray.engines.ray_cluster import WorkersConfig, connect
from passreid_ray.engines.row_blocks import RowBlocks
from passreid_ray.engines.run_folder import check_writable
from passreid_ray.engines.scoring import RetrievalTask, as_metrics, retrieval_task
from passreid_ray.retrieval import RankingResult, rerank
from passreid_ray.retrieval.candidate_sets import candidate_accuracy, candidate_sets
from passreid_ray.retrieval.expansion import average_query_expansion, database_augmentation
from passreid_ray.retrieval.few_shot import few_shot_accuracies, few_shot_summary

Method = Literal["cosine", "expanded", "reranked"]


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
    output = config.output / "metrics.json"
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
            write_metrics(found, output)  # each as it is found: a later one may fail
    if len(found) > 1:
        print_matrix(found, console)
    console.print(f"written to {output}")
    return found


def write_metrics(found: list[Evaluation], path: Path) -> None:
    """One record, or a list of several."""
    records = [evaluation.as_record() for evaluation in found]
    path.write_text(json.dumps(records if len(found) > 1 else records[0], indent=1), encoding="utf-8")


def evaluate(
    config: EvaluateConfig, checkpoint: str, test_set: MeasuredSet, loaded: Loaded, console: Console
) -> Evaluation:
    """All that is asked for, of one model on one data set."""
    rows = test_set.rows
    console.print(f"{test_set.name}: {len(rows)} query and gallery images")
    with PhaseLines(console) as progress:
        start = time.perf_counter()
        features_ND, bad = extract(config, rows, loaded, config.retrieval.batch_size, progress)
        seconds = time.perf_counter() - start
        is_usable_N = ~np.isin(rows.image_ids.astype(str), [image_id for image_id, _ in bad])
        task = retrieval_task(features_ND, rows, config.retrieval, is_usable_N)
        del features_ND  # the task has copies of its own
        methods: dict[Method, RankingResult] = {
            "cosine": task.rank(config.retrieval.max_rank, false_accept_rates=config.false_accept_rates)
        }
        notes = list(test_set.notes)
        if without := len(task.query_ids) - methods["cosine"].num_valid_queries:
            notes.append(f"{without} of {len(task.query_ids)} queries have no match in the gallery and do not count")
        expanded = expand(task, config.expansion)
        if expanded is not task:
            methods["expanded"] = expanded.rank(config.retrieval.max_rank)
        if config.rerank.enabled:
            own = config.rerank
            distance_QG = rerank(expanded.query_QD, expanded.gallery_GD, own.k1, own.k2, own.lambda_value)
            methods["reranked"] = expanded.rank(config.retrieval.max_rank, distance_QG=distance_QG)
        more: dict[str, Any] = {}
        people = without_distractors(task, test_set.distractors)
        if config.candidates.k:
            more["candidates"] = shortlists(people, config.candidates)
        if config.few_shot.episodes:
            more["few_shot"] = few_shot(people, config.few_shot, config.seed, progress)
    return Evaluation(checkpoint, test_set.name, methods, notes, len(rows) / seconds, bad, more)


def expand(task: RetrievalTask, config: ExpansionConfig) -> RetrievalTask:
    """``task`` with averaged features, or itself when nothing is averaged."""
    if not config.query_neighbours and not config.gallery_neighbours:
        return task
    query_QD, gallery_GD = task.query_QD, task.gallery_GD
    if config.gallery_neighbours:
        gallery_GD = database_augmentation(gallery_GD, config.gallery_neighbours, config.alpha)
    if config.query_neighbours:
        query_QD = average_query_expansion(query_QD, gallery_GD, config.query_neighbours, config.alpha)
    return replace(task, query_QD=query_QD, gallery_GD=gallery_GD)


def without_distractors(task: RetrievalTask, person_ids: tuple[str, ...]) -> RetrievalTask:
    """``task`` without gallery images of ids that stand for many people, who are no candidates and no class."""
    kept_G = ~np.isin(task.gallery_ids, person_ids)
    if kept_G.all():
        return task
    cameras = None if task.gallery_cameras is None else task.gallery_cameras[kept_G]
    return replace(
        task, gallery_GD=task.gallery_GD[kept_G], gallery_ids=task.gallery_ids[kept_G], gallery_cameras=cameras
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
