"""Workers of the benchmark of parallel steps do the same work, and its rows are the ratios that they claim to be."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.compare import Timing
from benchmarks.parallel_step import (
    APART,
    ONE,
    PLAIN,
    RAY_TRAIN,
    SENDING,
    TOGETHER,
    CpuUse,
    Training,
    Turn,
    ask,
    cpu_rows,
    gradient_bytes,
    job_config,
    plain_workers,
    scaling,
    scaling_rows,
    steps_between,
    take_steps,
)
from benchmarks.pass_step import Setting
from passreid_ray.data import open_rows
from passreid_ray.engines.pretrain import PretrainConfig


def tiny_setting(*, drop_path: float, compress_gradients: bool = False) -> Setting:
    config = PretrainConfig.model_validate(
        {
            "batch_size": 2,
            "views": {"global_size_px": (64, 32), "local_size_px": (32, 16)},
            "model": {
                "trunk": "vit_tiny_patch16_224",
                "embed_dim": 24,
                "depth": 2,
                "num_heads": 2,
                "drop_path": drop_path,
            },
            "head": {"num_prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 16},
            "sharing": {"compress_gradients": compress_gradients},
        }
    )
    return Setting(config, torch.device("cpu"), threads=1)


def two_steps(training: Training) -> tuple[float, torch.Tensor]:
    """Task: the loss of the second step, and the weights after it."""
    turn = take_steps(training, 2)
    assert len(turn.steps) == 2
    assert turn.cpu_seconds > 0
    return turn.loss, torch.cat([own.detach().flatten() for own in training.state.student.parameters()])


def averaged_bytes(training: Training) -> tuple[int, int, int]:
    """Task: bytes of gradients as fp32 and as bf16, and numbers that the optimiser changes."""
    groups: Sequence[dict[str, Any]] = training.state.optimizer.param_groups
    numbers = sum(own.numel() for group in groups for own in group["params"])
    return gradient_bytes(training, compress=False), gradient_bytes(training, compress=True), numbers


def fail(training: Training) -> None:
    raise ValueError("as a test")


def turn(*cpu_seconds: float) -> Turn:
    return Turn([Timing(2 * seconds, seconds) for seconds in cpu_seconds], loss=0.0)


def test_two_of_one_run_on_the_same_batch_take_the_steps_of_one_worker() -> None:
    setting = tiny_setting(drop_path=0.0)
    with plain_workers(setting, 1) as one, plain_workers(setting, 2, of_one_run=True) as together:
        (alone,), pair = ask(one, two_steps), ask(together, two_steps)
        fp32, bf16, numbers = ask(together, averaged_bytes)[0]
    for loss, weights in pair:
        assert loss == pytest.approx(alone[0], rel=1e-5)
        torch.testing.assert_close(weights, alone[1], rtol=1e-4, atol=1e-5)
    assert (fp32, bf16) == (4 * numbers, 2 * numbers)


@pytest.mark.parametrize("compress_gradients", [False, True])
def test_two_of_one_run_share_gradients_and_two_apart_do_not(compress_gradients: bool) -> None:
    setting = tiny_setting(drop_path=0.5, compress_gradients=compress_gradients)
    with plain_workers(setting, 1) as one, plain_workers(setting, 2, of_one_run=True) as together:
        (_, alone), (_, first), (_, second) = *ask(one, two_steps), *ask(together, two_steps)
    assert torch.equal(first, second)  # though their images meet different noise
    assert not torch.allclose(first, alone, rtol=1e-5, atol=1e-6)


def test_a_worker_that_fails_ends_the_benchmark() -> None:
    with plain_workers(tiny_setting(drop_path=0.0), 1) as one, pytest.raises(EOFError):
        ask(one, fail)


def test_all_sides_are_measured() -> None:
    rows = scaling(tiny_setting(drop_path=0.1), repeats=1, steps=1)
    assert [row["side"] for row in rows] == [ONE, APART, TOGETHER, SENDING]
    for row in rows:
        assert isinstance(row["s per step"], float)
        assert row["s per step"] > 0


def test_scaling_is_against_twice_one_worker_of_the_same_turn() -> None:
    walls = {ONE: [2.0, 4.0, 3.0], APART: [2.0, 5.0, 4.0], TOGETHER: [4.0, 5.0, 4.0]}
    one, apart, together = scaling_rows(walls, dict.fromkeys(walls, 1.5), batch=8)
    assert (one["images/s"], one["of twice one worker"]) == (8 / 3, 0.5)
    assert (apart["images/s"], apart["of twice one worker"]) == (4, 0.8)
    assert (together["of twice one worker"], together["lowest"], together["highest"]) == (0.75, 0.5, 0.8)
    assert (together["s more than apart"], together["CPU s per step"]) == (0, 1.5)


def test_cpu_is_against_the_plain_process_of_the_same_turn() -> None:
    plain, in_ray = cpu_rows(
        {PLAIN: [turn(1, 1), turn(4, 4), turn(2, 2)], RAY_TRAIN: [turn(2, 2), turn(4, 4), turn(1, 4)]}
    )
    assert (plain["CPU s per step"], plain["s per step"], plain["CPU against plain"]) == (2, 4, 1)
    assert (in_ray["CPU s per step"], in_ray["CPU s, lowest"], in_ray["CPU s, highest"]) == (3, 1, 4)
    assert (in_ray["CPU against plain"], in_ray["lowest"], in_ray["highest"]) == (1.25, 1, 2)


def test_a_step_of_a_job_reaches_to_the_next_and_the_first_is_a_warm_up() -> None:
    assert steps_between([(0, 0), (9, 5), (11, 6), (14, 8)]) == [Timing(2, 1), Timing(3, 2)]


def test_processor_time_of_others_is_seen_and_that_of_some_left_out() -> None:
    before = CpuUse.now()
    code = "import time\nwhile time.process_time() < 0.3: pass\nprint('busy', flush=True)\ninput()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"busy\n"
        after = CpuUse.now()
        process.communicate(b"\n")
    assert 250 < after.since(before).total() - after.since(before, leave_out=[process.pid]).total() < 1000
    assert after.since(after).total() == 0


def test_a_job_has_at_least_the_steps_that_were_asked_for(tmp_path: Path) -> None:
    config = job_config(tiny_setting(drop_path=0.1).config, num_steps=7, folder=tmp_path)
    assert 7 <= config.epoch_order(open_rows(config.data)).steps_per_epoch <= 7 + 12
    assert config.optimizer.frozen_last_layer_epochs == 0
