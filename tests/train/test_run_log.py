import errno
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from passreid_ray.train.run_log import RunLog, read_jsonl
from tests.train.full_disk import FullDisk, full_disk

__all__ = ["full_disk"]  # a fixture


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


def test_what_a_full_disk_refuses_is_written_later_and_once(full_disk: FullDisk) -> None:
    log, path = RunLog(full_disk.folder), full_disk.folder / "metrics.jsonl"
    log.write(1, {"loss": 1.0})
    with full_disk.full():
        log.note(2, text="x" * 2**20)
        log.write(3, {"loss": 3.0})
        error = log.catch_up()
        assert error is not None
        assert error.errno in (errno.ENOSPC, errno.EFBIG)
        assert log.num_waiting == 3
        assert path.read_text() == '{"step": 1, "loss": 1.0}\n'  # and no beginning of the next
    assert log.catch_up() is None
    log.close()
    assert [record["step"] for record in read_jsonl(path)] == [1, 2, 3]


def test_a_restart_on_a_full_disk_keeps_the_records_before_it(full_disk: FullDisk) -> None:
    log, path = RunLog(full_disk.folder), full_disk.folder / "metrics.jsonl"
    for step in (1, 2):
        log.note(step, text="x" * 2**20)
    with full_disk.full():
        log.restart_at(1)
        assert log.num_waiting == 1
        assert [record["step"] for record in read_jsonl(path)] == [1, 2]
    assert log.catch_up() is None
    assert [record["step"] for record in read_jsonl(path)] == [1]
    log.close()


def test_curves_go_on_in_another_file_after_one_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_room(self: EventFileWriter) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    log = RunLog(tmp_path)
    log.write(1, {"loss": 1.0})
    with monkeypatch.context() as patch:
        patch.setattr(EventFileWriter, "flush", no_room)
        log.write(2, {"loss": 2.0})
    assert log.num_waiting == 1
    assert log.catch_up() is None
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {(event.step, event.value) for event in events.Scalars("loss")} >= {(1, 1.0), (2, 2.0)}


def test_a_note_is_a_record_but_no_curve(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.note(3, nodes=["10.0.0.1"])
    log.write(4, {"loss": 1.0})
    log.close()
    assert read_jsonl(tmp_path / "metrics.jsonl") == [{"step": 3, "nodes": ["10.0.0.1"]}, {"step": 4, "loss": 1.0}]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["loss"]
