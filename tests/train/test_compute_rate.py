"""Arithmetic is counted as by hand, and peaks are told for the devices that are known."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from passreid_ray.train import compute_rate
from passreid_ray.train.compute_rate import count_flops, data_sheet_flops_per_second, matmul_flops_per_second
from passreid_ray.train.precision import Precision

ROWS, WIDTH, HIDDEN = 6, 10, 4


def test_a_linear_layer_takes_two_operations_per_weight_and_row_forward_and_twice_that_backward() -> None:
    layer, rows_ND = nn.Linear(WIDTH, HIDDEN), torch.randn(ROWS, WIDTH, requires_grad=True)
    forward = 2 * ROWS * WIDTH * HIDDEN
    assert count_flops(lambda: layer(rows_ND)) == forward
    # Gradients of weights and of rows, each a product of the same size.
    assert count_flops(lambda: layer(rows_ND).sum().backward()) == 3 * forward


@pytest.mark.parametrize("fused", [True, False])
def test_attention_takes_two_products_of_tokens_with_tokens(fused: bool) -> None:
    heads, tokens, depth = 3, 8, 16
    query, key, value = (torch.randn(1, heads, tokens, depth) for _ in range(3))

    def attend() -> torch.Tensor:
        if fused:
            return F.scaled_dot_product_attention(query, key, value)
        return (query @ key.transpose(-2, -1)).softmax(-1) @ value

    assert count_flops(attend) == 2 * (2 * heads * tokens * tokens * depth)


def test_a_product_added_in_place_counts_like_any_other() -> None:
    left, right, out = torch.randn(5, 3, 4), torch.randn(5, 4, 6), torch.zeros(5, 3, 6)
    assert (
        count_flops(lambda: out[0].addmm_(left[0], right[0]))
        == count_flops(lambda: left[0] @ right[0])
        == 2 * 3 * 4 * 6
    )
    assert count_flops(lambda: out.baddbmm_(left, right)) == count_flops(lambda: left @ right) == 5 * 2 * 3 * 4 * 6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_measured_rate_is_the_arithmetic_over_the_time(
    monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    seen = []

    def product_seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
        seen.append((side, dtype))
        return 0.002 if side == 1024 else 0.016  # eight times the arithmetic

    monkeypatch.setattr(compute_rate, "_product_seconds", product_seconds)
    monkeypatch.setitem(compute_rate.SIDES, "cpu", 2048)
    assert matmul_flops_per_second(precision, torch.device("cpu")) == pytest.approx(2 * 1024**3 / 0.002)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert seen == [(1024, dtype), (2048, dtype)]


def test_a_slow_device_multiplies_small_matrices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_rate, "_product_seconds", lambda side, dtype, device: {1024: 1.0}[side])
    assert matmul_flops_per_second("fp32", torch.device("cpu")) == 2 * 1024**3


def test_this_machine_multiplies_at_a_rate_that_a_processor_can_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_rate, "TRIAL_SIDE", 256)
    monkeypatch.setitem(compute_rate.SIDES, "cpu", 256)
    assert 1e8 < matmul_flops_per_second("fp32", torch.device("cpu")) < 1e14


@pytest.mark.parametrize(
    ("name", "precision", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA H100 NVL", "bf16", 835.5),
        ("NVIDIA H200", "fp32", 494.5),
        ("NVIDIA H200 NVL", "fp32", 417.5),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-PCIE-40GB", "fp32", 156),
        ("NVIDIA L4", "fp16", 121),
        ("Tesla V100-SXM2-16GB", "fp16", 125),
        ("Tesla V100-PCIE-32GB", "fp32", 14),
    ],
)
def test_the_data_sheet_of_a_known_gpu_is_found_by_its_name(name: str, precision: Precision, tflops: float) -> None:
    assert data_sheet_flops_per_second(name, precision) == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize("name", ["cpu", "NVIDIA L40", "NVIDIA L40S", "NVIDIA GH200 480GB", "NVIDIA H100 MIG 1g.10gb"])
def test_nothing_is_promised_for_another_device(name: str) -> None:
    assert data_sheet_flops_per_second(name, "bf16") is None


def test_a_v100_has_no_bf16() -> None:
    assert data_sheet_flops_per_second("Tesla V100-SXM2-16GB", "bf16") is None
