"""The machine that a benchmark runs on: what it is, and how fast it multiplies matrices."""

import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

SIDE = 4096
TRIAL_SIDE = 1024
LONGEST_SECONDS = 2.0
"""Of one product; on a machine that takes longer, smaller matrices are multiplied."""


@dataclass(frozen=True)
class Machine:
    """What a reader needs to know of a machine to judge times taken on it."""

    cpu: str
    cores: int
    """Cores that the process may use."""
    memory_gb: float
    gpu: str | None
    python: str
    torch: str
    threads: int
    """CPU threads that compute."""
    matmul_gflops: dict[str, float]
    """By precision: 10^9 multiplications and additions a second in a product of square matrices."""


def describe_machine(device: torch.device, repeats: int = 3) -> Machine:
    """This machine, with torch's present number of threads; the matrix-multiply rate is that of ``device``."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        matmul_gflops={name: round(matmul_gflops(dtype, device, repeats), 1) for name, dtype in dtypes.items()},
    )


def matmul_gflops(dtype: torch.dtype, device: torch.device, repeats: int = 3) -> float:
    """The best rate of a few products of two square matrices, in GFLOP/s; n x n takes 2 n^3 operations."""
    trial_seconds = _product_seconds(TRIAL_SIDE, dtype, device, repeats)
    side = SIDE
    while side > TRIAL_SIDE and trial_seconds * (side / TRIAL_SIDE) ** 3 > LONGEST_SECONDS:
        side //= 2
    seconds = trial_seconds if side == TRIAL_SIDE else _product_seconds(side, dtype, device, repeats)
    return 2 * side**3 / seconds / 1e9


def _product_seconds(side: int, dtype: torch.dtype, device: torch.device, repeats: int) -> float:
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    out, seconds = torch.empty_like(left), []
    for _ in range(1 + repeats):
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])  # the first call sets the library up


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
