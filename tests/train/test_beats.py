from dataclasses import replace

import pytest

from passreid_ray.train.beats import Beat, Beats, WorkerProcess
from passreid_ray.train.pulse import STEP


def beat_of(rank: int) -> Beat:
    process = WorkerProcess(rank, f"node{rank}", f"10.0.0.{rank}", 100 + rank, 5.0)
    return Beat(process, STEP, first_step=0, steps=1, still_seconds=2.0, place="", waits_for_others=False)


def test_silence_is_added_to_the_time_without_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    beats = Beats()
    beats.add(beat_of(0))
    now[0] = 13.0
    [heard] = beats.read()
    assert (heard.silent_seconds, heard.still_seconds) == (3.0, 5.0)


def test_workers_that_were_started_again_take_the_place_of_the_old_ones() -> None:
    beats = Beats()
    old = [beat_of(rank) for rank in range(3)]
    for beat in old:
        beats.add(beat)
    assert [heard.beat for heard in beats.read()] == old
    new = replace(old[1], process=replace(old[1].process, pid=7))
    beats.add(new)
    assert [heard.beat for heard in beats.read()] == [new]


def test_a_worker_that_has_ended_is_not_missed_but_its_successor_is() -> None:
    beats = Beats()
    beat = beat_of(0)
    beats.add(beat)
    beats.end(replace(beat.process, pid=7))
    assert [heard.beat for heard in beats.read()] == [beat]
    beats.end(beat.process)
    assert beats.read() == []


def test_forgotten_workers_are_missed_again_once_they_beat() -> None:
    beats = Beats()
    beats.add(beat_of(0))
    beats.forget()
    assert beats.read() == []
    beats.add(beat_of(0))
    assert len(beats.read()) == 1
