from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from passreid_ray.train.run_log import RunLog, read_jsonl


def test_a_resumed_run_replaces_the_records_it_repeats(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.restart_at(0)
    for step in (1, 2, 3):
        log.write(step, {"loss": float(step)})
    log.close()
    resumed = RunLog(tmp_path)
    resumed.restart_at(2)
    resumed.write(3, {"loss": 30.0})
    resumed.close()
    assert [(r["step"], r["loss"]) for r in read_jsonl(tmp_path / "metrics.jsonl")] == [(1, 1.0), (2, 2.0), (3, 30.0)]


def test_a_run_that_starts_again_from_nothing_has_no_old_records(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write(0, {"evaluation/mAP": 0.1})
    log.restart_at(0)
    log.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == []


def test_metrics_reach_tensorboard(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.write(10, {"loss": 2.5})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(10, 2.5)]


def test_a_last_line_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_jsonl(path) == [{"step": 1}]


def test_quarantined_images_are_listed_with_their_reason(tmp_path: Path) -> None:
    RunLog(tmp_path).quarantine([{"image_id": "a.jpg", "reason": "truncated"}])
    assert read_jsonl(tmp_path / "quarantine.jsonl") == [{"image_id": "a.jpg", "reason": "truncated"}]
