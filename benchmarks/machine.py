"""The machine that a benchmark runs on: what it is, and how fast it multiplies matrices."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from passreid_ray.train.compute_rate import matmul_flops_per_second


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


def describe_machine(device: torch.device) -> Machine:
    """This machine, with torch's present number of threads; the matrix-multiply rate is that of ``device``."""
    rates = {name: matmul_flops_per_second(name, device) / 1e9 for name in ("fp32", "bf16")}
    return Machine(
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_gb=round(psutil.virtual_memory().total / 1e9, 1),
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        python=platform.python_version(),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
        matmul_gflops={name: round(rate, 1) for name, rate in rates.items()},
    )


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
