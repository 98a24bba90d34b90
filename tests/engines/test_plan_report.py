"""Times, prices and memory of a run against numbers worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from passreid_ray.engines.plan_report import (
    Measured,
    ModelProbe,
    WorkerProbe,
    bytes_per_image,
    duration_in_words,
    extrapolated_images,
    findings,
    largest_batch,
    make_plan,
    memory_of,
    plan_table,
    power_of_two_times,
    speed_of,
)

GB = 10**9


def worker(**changes: Any) -> WorkerProbe:
    """Steps of 2 s after three slow ones, waiting 0.5 s for data; the loader alone makes a batch in 1 s."""
    values: dict[str, Any] = {
        "rank": 0,
        "node": "a",
        "device": "cpu",
        "step_seconds": (9.0, 8.0, 7.0, 2.0, 2.0, 2.0, 2.0),
        "wait_seconds": (9.0, 0.0, 0.0, 0.0, 2.0, 0.0, 0.0),
        "loader_seconds": (5.0, 0.0, 0.0, 1.0, 1.0),
        "peak_bytes": 4 * GB,
        "free_bytes": 20 * GB,
        "checkpoint_bytes": 300_000_000,
        "num_bad": 0,
    }
    return WorkerProbe(**{**values, **changes})


MODEL = ModelProbe(
    flops_per_image=4e9,
    matmul_flops_per_second=1e12,
    process_bytes=1 * GB,
    parameter_bytes=100_000_000,
    gradient_bytes=90_000_000,
    optimizer_bytes=180_000_000,
    teacher_bytes=100_000_000,
    peaks=((4, 2 * GB), (8, int(2.4 * GB))),
    too_large=None,
)


def measured(**changes: Any) -> Measured:
    """A run of one worker and 50 images a step."""
    values: dict[str, Any] = {
        "num_workers": 1,
        "uses_gpu": False,
        "batch_size": 50,
        "micro_batches": 1,
        "precision": "fp32",
        "loader_threads": 1,
        "epochs": 100,
        "images": 7200,
        "steps": 14_400,
        "probe_steps": 7,
        "evaluations": 0,
        "checkpoints": 100,
        "cost_per_worker_hour": None,
        "currency": "",
        "workers": (worker(),),
        "model": MODEL,
        "data_sheet_flops_per_second": None,
        "find_largest_batch": True,
    }
    return Measured(**{**values, **changes})


def on_gpus(num: int, **changes: Any) -> Measured:
    """The same on ``num`` H100s, each with a share of the batch."""
    workers = tuple(worker(rank=rank, device="NVIDIA H100 80GB HBM3") for rank in range(num))
    values = {"uses_gpu": True, "num_workers": num, "workers": workers, "model": replace(MODEL, process_bytes=0)}
    return measured(**{**values, **changes})


def texts(given: Measured) -> list[str]:
    return [f"{finding.level}: {finding.text}" for finding in findings(make_plan(given), given)]


def test_speed_is_that_of_the_steps_after_the_first_three_and_of_the_mean_wait() -> None:
    speed = speed_of(measured())
    assert speed.measured_steps == 4
    assert speed.step_seconds == pytest.approx(2.5)
    assert speed.wait_share == pytest.approx(0.2)
    assert speed.images_per_second == pytest.approx(20)
    assert speed.training_images_per_second == pytest.approx(25)
    assert speed.loader_images_per_second == pytest.approx(50)


def test_a_worker_that_waits_for_the_data_of_another_does_not_count_that_as_computing() -> None:
    late = worker(rank=1, wait_seconds=(0.0,) * 3 + (1.0,) * 4)
    early = worker(rank=0, wait_seconds=(0.0,) * 7, step_seconds=(3.0,) * 7)
    speed = speed_of(measured(num_workers=2, workers=(early, late)))
    assert (speed.step_seconds, speed.training_images_per_second) == (pytest.approx(3), pytest.approx(25))


def test_of_fewer_steps_than_are_left_out_the_last_one_counts() -> None:
    speed = speed_of(measured(workers=(worker(step_seconds=(8.0, 4.0), wait_seconds=(1.0, 1.0)),)))
    assert (speed.measured_steps, speed.step_seconds) == (1, 5)


def test_hours_and_cost_are_those_of_all_steps_and_workers() -> None:
    plan = make_plan(on_gpus(4, cost_per_worker_hour=2.5))
    assert plan.hours == pytest.approx(10)  # 14,400 steps of 2.5 s
    assert plan.cost == pytest.approx(100)
    assert make_plan(on_gpus(4)).cost is None


def test_the_share_of_peak_is_arithmetic_per_worker_over_its_rate() -> None:
    # 20 images/s on 2 workers: 10 images/s x 4 GFLOP = 40 GFLOP/s of 1 TFLOP/s, and of 2 TFLOP/s.
    arithmetic = make_plan(on_gpus(2, data_sheet_flops_per_second=2e12)).arithmetic
    assert arithmetic is not None
    assert arithmetic.share_of_matmul == pytest.approx(0.04)
    assert arithmetic.share_of_data_sheet == pytest.approx(0.02)


def test_the_parts_of_the_memory_are_its_peak() -> None:
    memory = memory_of(measured())
    assert memory is not None
    assert memory.activation_bytes == 4 * GB - 1 * GB - 470_000_000
    assert memory.bytes_per_image == pytest.approx(100_000_000)  # 0.4 GB for four images


def test_one_batch_size_says_nothing_about_growth() -> None:
    assert bytes_per_image([(4, GB)]) is None


def test_growth_is_taken_between_the_two_largest_batches() -> None:
    assert bytes_per_image([(1, 5), (2, 100), (4, 300)]) == 100


def test_a_cpu_worker_takes_as_many_images_as_the_growth_of_memory_lets_it() -> None:
    # 1 GB of the process and 90% of 20 GB: 19 GB, 15 GB more than 50 images take, at 0.1 GB each: 200, so 128.
    found = largest_batch(measured())
    assert found is not None
    assert (found.images, found.is_extrapolated) == (128, True)


def test_workers_of_one_machine_share_its_memory() -> None:
    # 50 images are 25 for each of two: 1 + 9 GB, 6 GB more than their peak: 85, so 64; on two machines 175, so 128.
    workers = [worker(rank=rank) for rank in range(2)]
    together = largest_batch(measured(num_workers=2, workers=tuple(workers)))
    apart = largest_batch(measured(num_workers=2, workers=(workers[0], replace(workers[1], node="b"))))
    assert together is not None
    assert apart is not None
    assert (together.images, apart.images) == (64, 128)


@pytest.mark.parametrize(("budget", "images"), [(10, 10), (14, 12), (15, 12), (2, 6), (-100, 0)])
def test_memory_is_extrapolated_evenly(budget: float, images: int) -> None:
    assert extrapolated_images(10, 10, 2, budget) == images


@pytest.mark.parametrize(("factor", "limit", "expected"), [(1, 200, 128), (1, 128, 128), (3, 100, 96), (5, 4, 5)])
def test_batches_are_micro_batches_times_a_power_of_two(factor: int, limit: int, expected: int) -> None:
    assert power_of_two_times(factor, limit) == expected


def test_on_a_gpu_the_largest_batch_is_one_that_was_tried() -> None:
    given = on_gpus(1)
    assert given.model is not None
    met = largest_batch(replace(given, model=replace(given.model, peaks=((64, 1), (128, 2)), too_large=256)))
    unmet = largest_batch(replace(given, model=replace(given.model, peaks=((64, 1), (128, 2)))))
    assert met is not None
    assert unmet is not None
    assert (met.images, met.is_extrapolated, met.is_limit) == (128, False, True)
    assert (unmet.images, unmet.is_limit) == (128, False)


def test_nobody_is_told_a_largest_batch_who_did_not_ask() -> None:
    assert make_plan(measured(find_largest_batch=False)).largest_batch is None


def test_a_slow_loader_is_told_with_both_rates() -> None:
    slow = worker(loader_seconds=(2.5,) * 5)
    assert any(
        text.startswith("warning: the loader gives 20 images/s, training could take 25: raise loader.threads (now 1)")
        for text in texts(measured(workers=(slow,)))
    )


def test_a_fast_loader_is_a_note_with_its_head_room() -> None:
    assert any(text.startswith("note: the loader gives 50 images/s, 2 times what") for text in texts(measured()))


def test_a_loader_that_made_no_batch_is_told() -> None:
    assert any("made no batch" in text for text in texts(measured(workers=(worker(loader_seconds=()),))))


def test_a_long_run_without_a_gpu_is_a_warning_in_years() -> None:
    # 4.2 M images x 100 epochs / 50 = 8.4 M steps of 2.5 s.
    given = measured(images=4_200_000, steps=8_400_000)
    assert "warning: these workers have no GPU: 100 epochs of 4,200,000 images take 243 days here" in texts(given)
    given = measured(images=4_200_000, steps=42_000_000)
    assert any("take 3.33 years here" in text for text in texts(given))


def test_what_the_time_leaves_out_and_the_price_are_told() -> None:
    found = texts(on_gpus(2, evaluations=11, cost_per_worker_hour=1.5, currency="EUR"))
    assert any("11 evaluations and about 100 checkpoints of 300 MB each come on top" in text for text in found)
    assert "note: that costs 30.00 EUR for 2 worker(s)" in found


def test_room_for_a_larger_batch_is_told_as_what_it_is() -> None:
    assert any("batch of 128 per worker would fit, 50 are set, an extrapolation" in text for text in texts(measured()))
    given = on_gpus(1)
    assert given.model is not None
    tried = replace(given, model=replace(given.model, peaks=((64, 1), (128, 2)), too_large=256))
    assert "note: a batch of 128 per worker would fit, 50 are set" in texts(tried)


def test_memory_that_does_not_suffice_is_an_error_with_what_would_fit() -> None:
    given = on_gpus(2, batch_size=256, workers=())
    assert given.model is not None
    given = replace(given, model=replace(given.model, peaks=((16, 1), (32, 2)), too_large=64))
    plan = make_plan(given)
    assert (plan.out_of_memory, plan.hours, plan.speed, plan.memory) == (True, None, None, None)
    assert texts(given)[0] == (
        "error: memory does not suffice for 128 images per worker; 32 per worker fit: set batch_size=64, or keep "
        "batch_size and set micro_batches=4"
    )


def test_memory_that_suffices_for_nothing_is_an_error_too() -> None:
    given = on_gpus(1, workers=(), model=None)
    assert texts(given)[0].startswith("error: memory does not suffice for 50 images per worker; set micro_batches")


def test_a_gpu_that_has_little_to_do_is_told_unless_it_waits_for_data() -> None:
    busy = worker(device="NVIDIA H100 80GB HBM3", wait_seconds=(0.0,) * 7)
    assert any("the GPU does 10% of the arithmetic" in text for text in texts(on_gpus(1, workers=(busy,))))
    assert not any("the GPU does" in text for text in texts(on_gpus(1)))


def test_a_probe_that_was_cut_short_is_told() -> None:
    assert any("only 4 of 17 steps fitted" in text for text in texts(measured(probe_steps=20)))


def test_images_that_cannot_be_used_are_told() -> None:
    assert any(
        text.startswith("warning: 3 images of the probe") for text in texts(measured(workers=(worker(num_bad=3),)))
    )


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(20, "20 seconds"), (90, "1.5 minutes"), (5400, "1.5 hours"), (86400 * 3.1, "3.1 days"), (1e8, "3.17 years")],
)
def test_durations_are_told_in_the_largest_unit_that_fits(seconds: float, words: str) -> None:
    assert duration_in_words(seconds) == words


@pytest.mark.parametrize("given", [measured(), on_gpus(2, workers=(), model=None), on_gpus(2)])
def test_the_table_shows_what_is_known(given: Measured) -> None:
    console = Console(width=120, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(plan_table(make_plan(given)))
    assert "14,400" in capture.get()
    assert ("images/s" in capture.get()) == bool(given.workers)
