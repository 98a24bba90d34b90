from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import ray
from rich.console import Console

from passreid_ray.engines import board as board_module
from passreid_ray.engines import log_patience
from passreid_ray.engines.board import Board, Monitor
from passreid_ray.train.run_log import RunLog, read_jsonl
from tests.waiting import wait_for

METRICS = {"loss": 2.0, "images_per_second": 50.0, "data_wait_share": 0.5}


@pytest.fixture
def board(cluster: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(board_module, "POLL_SECONDS", 0.05)
    return Board.remote()


def watched(board: Any, folder: Path, *records: dict[str, Any]) -> str:
    """What the driver prints when workers post ``records``; of 100 images 5 may be unusable."""
    console = Console(file=StringIO(), soft_wrap=True)
    with Monitor(board, RunLog(folder), console, num_rows=100, max_bad_share=0.05):
        for record in records:
            ray.get(board.post.remote({"rank": 0, **record}))
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def test_posts_are_taken_once_and_in_order(board: Any) -> None:
    for number in range(3):
        board.post.remote({"number": number})
    assert [record["number"] for record in ray.get(board.take.remote())] == [0, 1, 2]
    assert ray.get(board.take.remote()) == []


def test_a_checkpoint_does_not_wait_for_posts_of_steps(board: Any) -> None:
    for kind in ("step", "metrics", "step"):
        board.post.remote({"kind": kind, "step": 1})
    assert ray.get(board.num_waiting.remote()) == 1


def test_the_first_reason_to_stop_is_kept(board: Any) -> None:
    assert ray.get(board.stop_reason.remote()) is None
    for reason in ("first", "second"):
        ray.get(board.stop.remote(reason))
    assert ray.get(board.stop_reason.remote()) == "first"


def test_metrics_are_logged_and_waiting_for_data_is_told(board: Any, tmp_path: Path) -> None:
    text = watched(
        board,
        tmp_path,
        {"kind": "start", "step": 4, "end_step": 5},
        {"kind": "say", "text": "warm start: [x]"},
        {"kind": "metrics", "step": 5, "metrics": METRICS},
        {"kind": "evaluation", "step": 5, "metrics": {"evaluation/mAP": 0.25, "evaluation/rank1": 0.5}},
    )
    assert text.splitlines() == [
        "continuing after step 4 of 5",
        "warm start: [x]",
        "step 5 of 5  loss 2.000  50.0 images/s  waits 50% for data  0:00:00 left",
        "step 5: mAP 25.00%  rank-1 50.00%",
    ]
    assert read_jsonl(tmp_path / "metrics.jsonl") == [
        {"step": 5, **METRICS},
        {"step": 5, "evaluation/mAP": 0.25, "evaluation/rank1": 0.5},
    ]


def test_the_nodes_of_the_workers_are_told_and_logged_at_the_step_where_they_start(board: Any, tmp_path: Path) -> None:
    text = watched(
        board,
        tmp_path,
        {"kind": "worker", "rank": 0, "world_size": 2, "address": "10.0.0.1"},
        {"kind": "start", "step": 4, "end_step": 5},
        {"kind": "worker", "rank": 1, "world_size": 2, "address": "10.0.0.2"},
    )
    assert text.splitlines() == ["continuing after step 4 of 5", "worker 0 on 10.0.0.1, worker 1 on 10.0.0.2"]
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 4, "nodes": ["10.0.0.1", "10.0.0.2"]}]


def test_a_listener_hears_what_is_measured_and_its_answer_stops_the_run(board: Any, tmp_path: Path) -> None:
    heard: list[Any] = []

    def listener(step: int, end_step: int, metrics: Mapping[str, float]) -> str | None:
        heard.append((step, end_step, dict(metrics)))
        return "enough" if "evaluation/mAP" in metrics else None

    scores = {"evaluation/mAP": 0.25, "evaluation/rank1": 0.5}
    with Monitor(board, RunLog(tmp_path), Console(file=StringIO()), num_rows=1, max_bad_share=0, listener=listener):
        for record in (
            {"kind": "start", "step": 0, "end_step": 8},
            {"kind": "metrics", "step": 2, "metrics": METRICS},
            {"kind": "say", "text": "hello"},
            {"kind": "evaluation", "step": 2, "metrics": scores},
            {"kind": "record", "step": 3, "metrics": {"ranking/mined_loss": 0.1}},
            {"kind": "round", "step": 4, "text": "round 1", "metrics": {"cluster/eps": 0.5}},
        ):
            ray.get(board.post.remote({"rank": 0, **record}))
    others = [(3, 8, {"ranking/mined_loss": 0.1}), (4, 8, {"cluster/eps": 0.5})]
    assert heard == [(2, 8, METRICS), (2, 8, scores), *others]
    assert ray.get(board.stop_reason.remote()) == "enough"


def test_what_a_restart_cost_is_said_and_logged(board: Any, tmp_path: Path) -> None:
    text = watched(
        board,
        tmp_path,
        {"kind": "group", "num_workers": 2},
        {"kind": "start", "step": 0, "end_step": 9},
        {"kind": "metrics", "step": 2, "metrics": METRICS},
        {"kind": "step", "step": 5},
        {"kind": "interruption", "cause": "failed", "why": "rank 1 on 127.0.0.3: its process died"},
        {"kind": "group", "num_workers": 1},
        {"kind": "start", "step": 3, "end_step": 9},
    )
    line = text.splitlines()[-1]
    assert line.startswith(
        "workers failed at step 5 (rank 1 on 127.0.0.3: its process died); going on after step 3 on 1 w"
    )
    assert ": 2 steps and " in line
    *_, record = read_jsonl(tmp_path / "metrics.jsonl")
    assert (record["step"], record["failures/count"], record["failures/lost_steps"]) == (3, 1, 2)


def test_a_run_that_is_past_its_end_is_told_so(board: Any, tmp_path: Path) -> None:
    text = watched(board, tmp_path, {"kind": "start", "step": 45, "end_step": 15})
    assert text == "nothing to do: the run is at step 45, these settings end at step 15\n"


def test_a_collapse_is_told_once(board: Any, tmp_path: Path) -> None:
    records = [{"kind": "collapse", "step": step, "text": "all alike"} for step in (1, 2)]
    assert watched(board, tmp_path, *records) == "step 1: the teacher has collapsed: all alike\n"


def test_an_unusable_image_is_quarantined_once(board: Any, tmp_path: Path) -> None:
    images = [("a.jpg", "empty"), ("b\tc\n.jpg", "odd name")]
    watched(board, tmp_path, *[{"kind": "bad", "images": images}] * 2)
    assert read_jsonl(tmp_path / "quarantine.jsonl") == [
        {"image_id": "a.jpg", "reason": "empty"},
        {"image_id": "b\tc\n.jpg", "reason": "odd name"},
    ]
    assert ray.get(board.stop_reason.remote()) is None


def test_too_many_unusable_images_stop_the_run(board: Any, tmp_path: Path) -> None:
    images = [(f"{number}.jpg", "empty") for number in range(6)]
    watched(board, tmp_path, {"kind": "bad", "images": images})
    reason = str(ray.get(board.stop_reason.remote()))
    assert reason.startswith("6 of 100 images cannot be used, more than max_bad_share allows; the last: 5.jpg: empty")
    assert reason.endswith("quarantine.jsonl")


def test_logs_that_cannot_be_written_do_not_stop_the_run_at_once(board: Any, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    start, told = {"kind": "start", "step": 0, "end_step": 5}, []
    record = {"kind": "metrics", "step": 1, "metrics": METRICS}
    console, log = Console(file=StringIO(), soft_wrap=True), RunLog(tmp_path)
    listener = lambda step, end_step, metrics: told.append(step)  # noqa: E731
    with Monitor(board, log, console, num_rows=1, max_bad_share=0, listener=listener) as monitor:
        for post in (start, record):
            ray.get(board.post.remote({"rank": 0, **post}))
        wait_for(lambda: told == [1])
        assert monitor._thread.is_alive()
        (tmp_path / "metrics.jsonl").rmdir()
    assert ray.get(board.stop_reason.remote()) is None
    assert [own["step"] for own in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def test_logs_that_cannot_be_written_for_long_stop_the_run(
    board: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RETRY_SECONDS", "PATIENCE_SECONDS"):
        monkeypatch.setattr(log_patience, name, 0.0)
    (tmp_path / "metrics.jsonl").mkdir()
    console = Console(file=StringIO(), soft_wrap=True)
    with Monitor(board, RunLog(tmp_path), console, num_rows=1, max_bad_share=0):
        ray.get(board.post.remote({"rank": 0, "kind": "start", "step": 0, "end_step": 5}))
        wait_for(lambda: ray.get(board.stop_reason.remote()) is not None)
    reason = ray.get(board.stop_reason.remote())
    assert str(reason).startswith(f"{tmp_path}: the logs cannot be written: Is a directory, for ")


def test_a_cluster_that_is_gone_ends_the_watch_quietly(
    board: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console = Console(file=StringIO())
    with Monitor(board, RunLog(tmp_path), console, num_rows=1, max_bad_share=0) as monitor:
        ray.kill(board)
        wait_for(lambda: not monitor._thread.is_alive())
    assert "Traceback" not in capsys.readouterr().err
