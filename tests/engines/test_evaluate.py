"""The evaluation job beyond the one table: re-ranking, expansion, shortlists, few-shot, matrices, odd data."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from passreid_ray.config import build
from passreid_ray.data import open_rows
from passreid_ray.engines import evaluate
from passreid_ray.engines.embedding import FusedViT, ImageInput
from passreid_ray.engines.evaluate import few_shot, without_distractors
from passreid_ray.engines.evaluate_config import EvaluateConfig, FewShotConfig
from passreid_ray.engines.progress import PhaseLines
from passreid_ray.engines.scoring import RetrievalConfig, labelled_rows, measure, protocol_notes, retrieval_task
from passreid_ray.errors import UserError
from passreid_ray.models.config import ModelConfig
from passreid_ray.retrieval.few_shot import few_shot_accuracies, few_shot_summary
from passreid_ray.views import PixelStatistics
from tests.ranks import run_on_ranks

PEOPLE: dict[str, Any] = {"kind": "synthetic", "num_people": 12, "images_per_person": 8}
MODEL = {"trunk": "vit_tiny_patch16_224", "embed_dim": 24, "depth": 2, "num_heads": 2}
SMALL: dict[str, Any] = {"model": MODEL, "num_parts": 3, "image_size_px": (64, 32), "num_actors": 1, "data": PEOPLE}


def evaluate_config(output: Path, **changes: Any) -> EvaluateConfig:
    return build(EvaluateConfig, {**SMALL, "output": str(output), **changes})


def labelled(folder: Path, rows: list[tuple[str, str, str]]) -> dict[str, Any]:
    """A data set of (person, camera, split), each with a picture."""
    folder.mkdir()
    lines = ["image,person_id,camera_id,split"]
    for index, (person, camera, split) in enumerate(rows):
        Image.new("RGB", (16, 32), (index * 20 % 255, 90, 50)).save(folder / f"{index}.png")
        lines.append(f"{index}.png,{person},{camera},{split}")
    (folder / "labels.csv").write_text("\n".join(lines))
    return {"kind": "labels_csv", "root": str(folder)}


@pytest.fixture(scope="module")
def everything(
    cluster: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[evaluate.Evaluation, dict[str, Any], str]:
    """One evaluation with all that can be asked for: what it returns, what it writes and what it prints."""
    output = tmp_path_factory.mktemp("everything")
    config = evaluate_config(
        output,
        rerank={"enabled": True, "k1": 5, "k2": 2},
        expansion={"query_neighbours": 2, "gallery_neighbours": 2},
        candidates={"k": 3},
        few_shot={"episodes": 40, "shots": [1, 2], "way": 3},
        false_accept_rates=[0.1],
    )
    with (output / "log.txt").open("w") as file:
        console = Console(record=True, file=file, width=200)
        (found,) = evaluate.run(config, console)
    return found, json.loads((output / "metrics.json").read_text()), console.export_text()


def test_everything_that_is_asked_for_is_measured_printed_and_written(
    everything: tuple[evaluate.Evaluation, dict[str, Any], str],
) -> None:
    found, written, text = everything
    assert list(found.methods) == ["cosine", "expanded", "reranked"]
    assert written["mAP"] == pytest.approx(found.methods["cosine"].mAP)
    assert written["reranked"]["mAP"] == pytest.approx(found.methods["reranked"].mAP)
    assert written["candidates"]["k"] == 3
    assert 0 < written["candidates"]["mean_size"] <= 3
    assert set(written["few_shot"]) == {"way", "episodes", "1_shot", "2_shot"}
    assert set(written["true_accept_rates"]) == {"0.1"}
    for part in ("cosine", "expanded", "reranked", "shortlists of", "3-way 1-shot", "right pairs accepted"):
        assert part in text


def test_the_few_shot_accuracy_is_the_same_for_any_division_into_tasks(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    rows = labelled_rows(open_rows(build(EvaluateConfig, {"data": PEOPLE}).data), RetrievalConfig())
    features = rng.standard_normal((len(rows), 16)).astype(np.float32)
    task = retrieval_task(features, rows, RetrievalConfig(), np.ones(len(rows), np.bool_))
    config = FewShotConfig(episodes=50, way=3, shots=(1,))
    with PhaseLines(Console(quiet=True)) as progress:
        here = few_shot(task, config, 0, progress)
        monkeypatch.setattr("passreid_ray.engines.row_blocks.IN_PROCESS_ROWS", 10)
        monkeypatch.setattr("passreid_ray.engines.row_blocks.BLOCK_ROWS", (7, 7))
        assert few_shot(task, config, 0, progress) == here
    persons = np.concatenate([task.query_ids, task.gallery_ids])
    assert task.query_cameras is not None
    assert task.gallery_cameras is not None
    cameras = np.concatenate([task.query_cameras, task.gallery_cameras])
    both = np.concatenate([task.query_QD, task.gallery_GD])
    alone = few_shot_summary(few_shot_accuracies(both, persons, cameras, range(50), way=3, shot=1, num_queries=5))
    assert here["1_shot"] == {"accuracy": alone.mean, "half_width": alone.half_width}


def test_several_checkpoints_on_several_sets_make_a_matrix(cluster: None, tmp_path: Path) -> None:
    other = labelled(tmp_path / "other", [(p, c, s) for p in "abc" for c, s in (("1", "query"), ("2", "gallery"))])
    with (tmp_path / "log.txt").open("w") as file:
        console = Console(record=True, file=file, width=200)
        found = evaluate.run(evaluate_config(tmp_path / "out", cross={"data": [PEOPLE, other]}), console)
    assert [(one.checkpoint, one.data) for one in found] == [
        ("random weights", "synthetic"),
        ("random weights", "other"),
    ]
    written = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [record["mAP"] for record in written] == [one.methods["cosine"].mAP for one in found]
    text = console.export_text()
    assert "mAP / rank-1" in text
    assert f"{found[1].methods['cosine'].mAP:.2%} / {found[1].methods['cosine'].cmc[0]:.2%}" in text


def test_a_given_distance_and_not_the_features_decides_the_ranking() -> None:
    rng = np.random.default_rng(1)
    rows = labelled_rows(open_rows(build(EvaluateConfig, {"data": PEOPLE}).data), RetrievalConfig())
    task = retrieval_task(
        rng.standard_normal((len(rows), 8)).astype(np.float32), rows, RetrievalConfig(), np.ones(len(rows), np.bool_)
    )
    perfect = (task.query_ids[:, None] != task.gallery_ids).astype(np.float32)
    assert task.rank(10).mAP < 1
    assert task.rank(10, distance_QG=perfect).mAP == 1


ODD = [
    ("a", "1", "query"),
    ("a", "2", "gallery"),
    ("b", "1", "query"),
    ("b", "2", "gallery"),
    ("c", "1", "query"),  # in no gallery
    ("-1", "2", "gallery"),
    ("-1", "3", "gallery"),
]


def odd_task(folder: Path, junk: str) -> tuple[Any, list[str]]:
    retrieval = build(RetrievalConfig, {"junk": junk})
    every = open_rows(build(EvaluateConfig, {"data": labelled(folder, ODD)}).data)
    rows = labelled_rows(every, retrieval)
    order = {"0.png": 0, "1.png": 2, "2.png": 1, "3.png": 3, "4.png": 4, "5.png": 0, "6.png": 1}
    features = np.eye(5, dtype=np.float32)[[order[image_id] for image_id in rows.image_ids]]
    return retrieval_task(features, rows, retrieval, np.ones(len(rows), np.bool_)), protocol_notes(every, retrieval)


def test_junk_does_not_count_or_is_a_wrong_answer_and_both_are_said(tmp_path: Path) -> None:
    without, notes = odd_task(tmp_path / "x", "leave_out")
    assert len(without.gallery_ids) == 2
    assert notes == ["2 images of person_id -1 are left out (retrieval.junk)"]
    distracted, notes = odd_task(tmp_path / "y", "distractors")
    assert len(distracted.gallery_ids) == 4
    assert notes == ["2 images of person_id -1 are wrong answers to every query (retrieval.junk)"]
    # The junk images look exactly like the queries a and b, so each stands before the right one.
    assert distracted.rank(5).mAP < without.rank(5).mAP
    assert sorted(without_distractors(distracted, ("-1",)).gallery_ids) == ["a", "b"]


def test_without_camera_labels_there_is_no_camera_rule_and_that_is_said(tmp_path: Path) -> None:
    source = build(EvaluateConfig, {"data": labelled(tmp_path / "x", [("a", "", "query"), ("a", "", "gallery")])}).data
    rows = labelled_rows(open_rows(source), RetrievalConfig())
    task = retrieval_task(np.eye(2, dtype=np.float32), rows, RetrievalConfig(), np.ones(2, np.bool_))
    assert task.query_cameras is None
    (note,) = protocol_notes(rows, RetrievalConfig())
    assert note.startswith("2 of 2 images have no camera label")


PAIRS = [(person, camera, split) for person in "abc" for camera, split in (("1", "query"), ("2", "gallery"))]


@pytest.mark.parametrize(
    ("people", "changes", "message"),
    [
        (
            [("a", "", "query"), ("a", "", "gallery")],
            {"few_shot": {"episodes": 1}},
            r"few_shot\.cross_camera: some images",
        ),
        (
            PAIRS,
            {"few_shot": {"episodes": 1}},
            "few_shot.way: 5 people in an episode, but 3 of data have enough images",
        ),
        (
            PAIRS,
            {"few_shot": {"episodes": 1, "way": 3, "shots": [1, 2]}},
            "but 0 of data have enough images for 2 shots",
        ),
        (PAIRS, {"candidates": {"k": 4}}, "candidates.k: 4 candidates, but the gallery of data has 3 people"),
    ],
)
def test_too_few_people_for_what_is_asked_is_told_before_ray_starts(
    people: list[tuple[str, str, str]], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    config = evaluate_config(tmp_path / "out", data=labelled(tmp_path / "x", people), **changes)
    with pytest.raises(UserError, match=message):
        evaluate.run(config, Console(quiet=True))


@pytest.mark.parametrize(
    "changes", [{"few_shot": {"shots": [0]}}, {"false_accept_rates": [2.0]}, {"rerank": {"k1": 3, "k2": 5}}]
)
def test_settings_that_can_never_work_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        evaluate_config(tmp_path, **changes)


def measured_with_a_bad_image(root: str) -> dict[str, float]:
    source = build(EvaluateConfig, {"data": {"kind": "labels_csv", "root": root}}).data
    rows = labelled_rows(open_rows(source), RetrievalConfig())
    torch.manual_seed(0)
    model = FusedViT(build(ModelConfig, MODEL).build((64, 32), 3), "cat")
    return measure(model, rows, ImageInput((64, 32), PixelStatistics()), RetrievalConfig(), torch.device("cpu"))


def test_an_image_that_cannot_be_read_does_not_count_on_any_number_of_workers(tmp_path: Path) -> None:
    labelled(tmp_path / "x", [*PAIRS, ("a", "3", "gallery"), ("b", "3", "query")])
    (tmp_path / "x" / "7.png").write_bytes(b"no image")
    alone = measured_with_a_bad_image(str(tmp_path / "x"))
    first, second = run_on_ranks(measured_with_a_bad_image, str(tmp_path / "x"))
    assert alone["evaluation/unusable_images"] == 1
    assert first == pytest.approx(alone)
    assert second == {}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([("a", "1", "query")], "data: no image has split 'gallery'; splits found: query"),
        ([("", "1", "query"), ("a", "2", "gallery")], "data: 1 of 2 query and gallery images have no person_id"),
    ],
)
def test_data_that_cannot_be_evaluated_is_told_before_ray_starts(
    rows: list[tuple[str, str, str]], message: str, tmp_path: Path
) -> None:
    config = evaluate_config(tmp_path / "out", data=labelled(tmp_path / "x", rows))
    with pytest.raises(UserError, match=message):
        evaluate.run(config, Console(quiet=True))


def test_no_valid_query_is_told(cluster: None, tmp_path: Path) -> None:
    data = labelled(tmp_path / "x", [("a", "1", "query"), ("b", "2", "gallery")])
    with pytest.raises(UserError, match="none of 1 queries has a match among 1 gallery images of another camera"):
        evaluate.run(evaluate_config(tmp_path / "out", data=data), Console(quiet=True))
