"""The benchmark of many workers: its rows say what the marks say, every size shares the batch, lines fit."""

import math
import os
import time
from pathlib import Path

import pytest

from benchmarks.worker_marks import Marks, Span, read_marks, timed
from benchmarks.worker_scale import (
    BATCH_SIZE,
    STEPS,
    STEPS_PER_EPOCH,
    Line,
    Run,
    Sampler,
    growth,
    merged,
    proportional_bytes,
    row_of,
    toy_config,
)
from passreid_ray.data import open_rows

RUN = Run(
    num_workers=2,
    load_before=0.5,
    fit_start=100.0,
    fit_end=140.0,
    driver_bytes=3 * 10**9,
    driver_bytes_before=2 * 10**9,
    controller_bytes=10**9,
    cpu_seconds=55.0,
    memory_bytes=5 * 10**9,
    num_left=0,
)
MARKS = [
    Marks(
        0,
        Span(110.0, 136.0),
        [Span(114.0, 115.0), Span(116.0, 117.0), Span(124.0, 125.0)],
        [Span(125.0, 125.5)],
        [Span(115.0, 115.1)],
    ),
    Marks(
        1,
        Span(112.0, 138.0),
        [Span(114.0, 116.0), Span(116.0, 118.0), Span(124.0, 126.0)],
        [Span(125.0, 127.0)],
        [Span(116.0, 116.3)],
    ),
]


def test_a_row_takes_times_from_the_worker_that_comes_last_and_reports_from_rank_0() -> None:
    row = row_of(RUN, MARKS)
    assert row["start s"] == 16.0
    assert (row["group s"], row["first step s"]) == (12.0, 4.0)
    assert row["s per step"] == 5.0
    assert row["report s"] == row["report s, highest"] == 0.5
    assert math.isclose(float(row["ask s"] or 0), 0.2, abs_tol=1e-6)
    assert row["stop s"] == 2.0
    assert row["driver GB, of the run"] == 1.0


def test_marks_are_read_back_as_written_by_rank(tmp_path: Path) -> None:
    for marks in reversed(MARKS):
        marks.write(tmp_path)
    assert read_marks(tmp_path) == MARKS


def test_a_timed_call_does_what_it_did_and_leaves_its_span() -> None:
    spans: list[Span] = []
    before = time.time()
    assert timed(divmod, spans)(7, 2) == (3, 1)
    (span,) = spans
    assert before <= span.start <= span.end <= time.time()


@pytest.mark.parametrize("num_workers", [2, 4, 8, 16])
def test_every_number_of_workers_takes_the_same_steps_on_the_same_cpus(num_workers: int, tmp_path: Path) -> None:
    config = toy_config(tmp_path, num_workers)
    order = config.epoch_order(open_rows(config.data))
    assert order.steps_per_epoch == STEPS_PER_EPOCH
    assert config.epochs * order.steps_per_epoch == STEPS
    assert config.batch_size == BATCH_SIZE
    assert config.workers.cpus == 2


def test_a_line_goes_through_points_that_lie_on_one() -> None:
    rows = [{"workers": workers, "start s": 3.0 + 0.5 * workers} for workers in (2, 4, 16)] + [{"workers": 8}]
    line = growth(rows, "start s")
    assert math.isclose(line.a, 3.0)
    assert math.isclose(line.b, 0.5)
    assert math.isclose(line.at(64), 35.0)
    assert Line(1.0, 2.0).at(3) == 7.0


def test_a_size_measured_again_takes_the_place_of_its_old_row() -> None:
    rows = merged([{"workers": 8, "start s": 9.0}, {"workers": 2, "start s": 5.0}], [{"workers": 8, "start s": 7.0}])
    assert rows == [{"workers": 2, "start s": 5.0}, {"workers": 8, "start s": 7.0}]


def test_processor_time_is_counted_from_when_sampling_began() -> None:
    def burn(seconds: float) -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    burn(0.3)
    with Sampler() as sampler:
        burn(0.2)
    assert 0.15 < sampler.cpu_seconds < time.process_time() - 0.25
    assert sampler.memory_bytes > proportional_bytes(os.getpid()) / 2
