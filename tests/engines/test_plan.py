"""A plan is made by a real worker group; what a model takes is measured as counted by hand."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from passreid_ray.config import build, load_config
from passreid_ray.data import open_rows
from passreid_ray.data.order import EpochOrder
from passreid_ray.engines import plan, plan_probe
from passreid_ray.engines.plan import PlanConfig
from passreid_ray.engines.plan_probe import batch_sizes, is_out_of_memory, probe_model
from passreid_ray.engines.plan_report import ModelProbe
from passreid_ray.errors import UserError
from tests.engines.micro import SETTINGS, STEPS_PER_EPOCH

PRESETS = Path(__file__).parents[2] / "jobs" / "presets"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate of matrix products is of no interest here and takes seconds to measure."""
    monkeypatch.setattr(plan_probe, "matmul_flops_per_second", lambda precision, device: 1e11)


def micro_plan(output: Path, **changes: Any) -> PlanConfig:
    own = {"output": str(output / "plan"), "probe_steps": 5, "cost_per_worker_hour": 3.6, **changes.pop("plan", {})}
    return build(PlanConfig, {**SETTINGS, "run": {"output": str(output / "runs")}, "plan": own, **changes})


def probed(config: PlanConfig) -> ModelProbe:
    order = EpochOrder(10 * config.batch_size, config.batch_size, config.seed)
    probe = probe_model(config, order, CPU, 60.0, find_largest=True)
    assert probe is not None
    return probe


def flops_of_a_step() -> float:
    """By hand, of an image: two operations per weight and token, and two products of tokens with tokens per block."""
    width, hidden, bottleneck, prototypes = 24, 32, 16, 32
    head = width * hidden + hidden * hidden + hidden * bottleneck + bottleneck * prototypes
    # (views, patches, tokens beside them): two global views of 4 x 2 patches, one local view of 2 x 1 for each part.
    kinds = [(2, 8, 4), (3, 2, 2)]
    patches, linear, attention = [], [], []
    for views, num_patches, prefix in kinds:
        tokens = num_patches + prefix
        # Of the last of the two blocks nobody reads the patches: they are keys and values only.
        weights = (12 * tokens + 2 * tokens + 10 * prefix) * width**2 + prefix * head
        patches.append(2 * views * num_patches * 16 * 16 * 3 * width)
        linear.append(2 * views * weights)
        attention.append(2 * views * 2 * (tokens**2 + prefix * tokens) * width)
    teacher = patches[0] + linear[0] + attention[0]
    # Backward takes two products for each one, but pixels have no gradient; fused attention computes one anew.
    student = 2 * sum(patches) + 3 * sum(linear) + 3.5 * sum(attention)
    return teacher + student


@pytest.mark.parametrize("preset", sorted(PRESETS.glob("pretrain_*.toml")), ids=lambda path: path.stem)
def test_every_preset_of_pretrain_can_be_planned(preset: Path) -> None:
    config = load_config(PlanConfig, [str(preset), "plan.cost_per_worker_hour=2.5", "workers.num_workers=4"])
    assert (config.plan.cost_per_worker_hour, config.workers.num_workers) == (2.5, 4)


def test_the_arithmetic_of_a_tiny_model_is_that_of_a_count_by_hand(tmp_path: Path) -> None:
    # How much of the last block is left out and what backward computes again are the model's own affair: a few percent.
    assert probed(micro_plan(tmp_path)).flops_per_image == pytest.approx(flops_of_a_step(), rel=0.05)


def test_the_state_has_the_bytes_of_its_numbers(tmp_path: Path) -> None:
    probe = probed(micro_plan(tmp_path))
    numbers = probe.gradient_bytes // 4
    # AdamW keeps two numbers for each, and a step count of 4 bytes for each tensor.
    assert 0 < probe.optimizer_bytes - 2 * 4 * numbers < 4 * 200
    assert numbers * 4 <= probe.parameter_bytes
    assert abs(probe.teacher_bytes - probe.parameter_bytes) < 0.1 * probe.parameter_bytes


def test_a_patch_head_is_counted_in_bytes_and_arithmetic(tmp_path: Path) -> None:
    plain, with_head = (
        probed(micro_plan(tmp_path)),
        probed(micro_plan(tmp_path, masked_patch={"weight": 1.0, "num_prototypes": 40})),
    )
    width, hidden, bottleneck, prototypes = 24, 32, 16, 40
    learnt = (width + 1) * hidden + (hidden + 1) * hidden + (hidden + 1) * bottleneck + bottleneck * prototypes + width
    assert with_head.gradient_bytes - plain.gradient_bytes == 4 * learnt
    # The teacher has the head, whose prototypes have lengths that are not learnt, and the centers.
    assert with_head.teacher_bytes - plain.teacher_bytes == 4 * (learnt + 2 * prototypes)
    assert plain.flops_per_image < with_head.flops_per_image < 1.5 * plain.flops_per_image


def test_a_cpu_takes_two_small_batches_that_micro_batches_divide(tmp_path: Path) -> None:
    probe = probed(micro_plan(tmp_path, micro_batches=2))
    assert [images for images, _ in probe.peaks] == [8, 16]
    assert probe.process_bytes > 0
    assert all(peak > probe.process_bytes for _, peak in probe.peaks)


def test_a_gpu_is_tried_with_powers_of_two() -> None:
    sizes = batch_sizes(torch.device("cuda"), find_largest=True)
    assert sizes[:3] == [2, 4, 8]
    assert sizes[-1] == plan_probe.MOST_IMAGES
    assert batch_sizes(torch.device("cuda"), find_largest=False) == plan_probe.SMALL_BATCHES


def test_a_batch_that_memory_does_not_suffice_for_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = plan_probe.train_step

    def limited(state: Any, views: Any, *args: Any, **kwargs: Any) -> Any:
        if len(views) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(state, views, *args, **kwargs)

    monkeypatch.setattr(plan_probe, "train_step", limited)
    probe = probed(micro_plan(tmp_path))
    assert ([images for images, _ in probe.peaks], probe.too_large) == ([4], 8)


def test_no_batch_that_fits_is_a_result_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(plan_probe, "train_step", refuse)
    config = micro_plan(tmp_path)
    assert probe_model(config, EpochOrder(80, 8, 0), CPU, 60.0, find_largest=True) is None


def test_another_error_is_not_taken_for_missing_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("shapes do not agree")

    monkeypatch.setattr(plan_probe, "train_step", fail)
    with pytest.raises(RuntimeError, match="shapes do not agree"):
        probed(micro_plan(tmp_path))


def test_torch_says_in_three_ways_that_memory_does_not_suffice() -> None:
    # 4 exabytes, which no machine has.
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_what_would_stop_the_run_stops_the_plan_before_ray_starts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be divided among 3 workers"):
        plan.run(micro_plan(tmp_path, workers={"num_workers": 3}))


def test_a_run_in_the_process_of_its_job_is_planned_as_one_worker(tmp_path: Path) -> None:
    config = micro_plan(tmp_path, workers={"num_workers": 0})
    rows, order = open_rows(config.data), EpochOrder(80, 8, 0)
    measured = plan.measured_of(config, rows, order, (), None, uses_gpu=False, evaluates=False)
    assert (measured.num_workers, measured.batch_per_worker) == (1, config.batch_size)


def test_a_plan_of_two_workers_has_all_numbers_and_leaves_no_run_behind(cluster: None, tmp_path: Path) -> None:
    config = micro_plan(tmp_path, workers={"num_workers": 2})
    made = plan.run(config)
    assert not (tmp_path / "runs").exists()
    assert sorted(path.name for path in config.plan.output.iterdir()) == ["config.toml", "plan.json"]
    written = json.loads((config.plan.output / "plan.json").read_text())
    assert [probe["rank"] for probe in written["measured"]["workers"]] == [0, 1]
    assert all(len(probe["step_seconds"]) == 5 for probe in written["measured"]["workers"])
    assert all(len(probe["loader_seconds"]) == 20 for probe in written["measured"]["workers"])
    assert (written["steps"], written["out_of_memory"]) == (config.epochs * STEPS_PER_EPOCH, False)
    assert made.speed is not None
    assert made.speed.images_per_second > 0
    # 3.6 an hour is a thousandth a second, for each of two workers.
    assert made.cost == pytest.approx(36 * made.speed.step_seconds * 2 / 1000)
    assert made.arithmetic is not None
    assert 0 < made.arithmetic.share_of_matmul < 1
    assert made.memory is not None
    assert written["findings"]
    assert open_rows(config.data).fingerprint() == written["fingerprint"]


def test_a_group_that_runs_out_of_memory_is_a_plan_that_says_so(cluster: None, tmp_path: Path) -> None:
    # 2 ** 40 prototypes of 16 numbers are 70 TB.
    config = micro_plan(tmp_path)
    order = EpochOrder(80, 8, 0)
    head = config.head.model_copy(update={"num_prototypes": 2**40})
    config = config.model_copy(update={"head": head})
    assert plan.probe_group(config, open_rows(config.data), order) == ()
    assert not list(config.plan.output.iterdir())
