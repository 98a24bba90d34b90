"""How much arithmetic a step is, and how fast a device does arithmetic: together they say how well it is used."""

import math
import re
import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from passreid_ray.products import HAS_ONEDNN, product_with_transposed
from passreid_ray.train.precision import Precision

SIDES = {"cpu": 4096, "cuda": 8192}
"""Of the square matrices that are multiplied; a GPU needs larger ones to be busy."""
TRIAL_SIDE = 1024
LONGEST_SECONDS = 0.5
"""Of one product; on a device that takes longer, smaller matrices are multiplied."""
REPEATS = 3
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# TFLOP/s of dense matrices: (fp16 and bf16, fp32). The makers print figures "with sparsity", which are twice these.
# fp32 is the TF32 figure, or on V100, which has no TF32, that of plain fp32. V100 has no bf16.
# NVIDIA's data sheets: H100 Tensor Core GPU, H200 Tensor Core GPU, A100 Tensor Core GPU, L4 Tensor Core GPU,
# V100 Tensor Core GPU. The first pattern that fits a name counts; a name without a form is that of the SXM module.
_DATA_SHEETS: tuple[tuple[str, float, float], ...] = (
    (r"\bH200 NVL\b", 835.5, 417.5),
    (r"\bH200\b", 989.5, 494.5),
    (r"\bH100 PCIe\b", 756.0, 378.0),
    (r"\bH100 NVL\b", 835.5, 417.5),
    (r"\bH100\b", 989.5, 494.5),
    (r"\bA100\b", 312.0, 156.0),
    (r"\bL4\b", 121.0, 60.0),
    (r"\bV100-PCIE\b", 112.0, 14.0),
    (r"\bV100\b", 125.0, 15.7),
)


def count_flops(function: Callable[[], object]) -> int:
    """Floating-point operations in the matrix products of one call, counted from shapes: forward and backward.

    A multiplication and an addition are two operations. Whatever is no matrix product, convolution or attention is left
    out, as is usual where a share of a device's peak is meant.
    """
    # torch's own counter does not know the products that are added in place, and not oneDNN's.
    unknown: dict[Any, Callable[..., int]] = {
        torch.ops.aten.addmm_: _addmm_flops,
        torch.ops.aten.baddbmm_: _addmm_flops,
    }
    if HAS_ONEDNN:
        unknown[torch.ops.mkldnn._linear_pointwise] = _linear_flops
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        function()
    return int(counter.get_total_flops())


def matmul_flops_per_second(precision: Precision, device: torch.device) -> float:
    """The best rate of a few products of two square matrices on ``device``, with torch's present number of threads."""
    dtype = DTYPES[precision]
    trial_seconds = _product_seconds(TRIAL_SIDE, dtype, device)
    side = SIDES.get(device.type, TRIAL_SIDE)
    while side > TRIAL_SIDE and trial_seconds * (side / TRIAL_SIDE) ** 3 > LONGEST_SECONDS:
        side //= 2
    seconds = trial_seconds if side == TRIAL_SIDE else _product_seconds(side, dtype, device)
    return 2 * side**3 / seconds


def data_sheet_flops_per_second(device_name: str, precision: Precision) -> float | None:
    """What the maker's data sheet promises for dense matrices; None for a part of a device or an unknown one."""
    if "MIG" in device_name:
        return None
    for pattern, half_tflops, full_tflops in _DATA_SHEETS:
        if re.search(pattern, device_name):
            if precision == "bf16" and "V100" in device_name:
                return None
            return 1e12 * (full_tflops if precision == "fp32" else half_tflops)
    return None


def _addmm_flops(_: torch.Size, left: torch.Size, right: torch.Size, **__: object) -> int:
    """Of one product of matrices, or of a batch of them, from the shapes of both sides."""
    return 2 * math.prod(left) * right[-1]


def _linear_flops(left: torch.Size, right: torch.Size, *_: object, **__: object) -> int:
    """Of the product of one side with the other transposed."""
    return 2 * math.prod(left) * right[0]


def _product_seconds(side: int, dtype: torch.dtype, device: torch.device) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(1 + REPEATS):
        start = time.perf_counter()
        product_with_transposed(left, right)  # by the library that the models use
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])  # the first call sets the library up
