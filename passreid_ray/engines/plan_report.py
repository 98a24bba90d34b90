"""From what a probe measured to what a run will cost: numbers, a table, findings; pure functions.

Thresholds are judgements, not measurements: they stand here as constants, each with its reason.
"""

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table

from passreid_ray.engines.data_report import LEVELS, Finding

WARM_UP_STEPS = 3
"""First steps that are not counted: libraries set themselves up, and AdamW makes its state."""
LOADER_WARM_UP_BATCHES = 3
"""First batches of the loader alone that are not counted: some were made while the first one was waited for."""
USABLE_MEMORY_SHARE = 0.9
"""Of the free memory may be used by training: Ray ends processes from 95% of a machine on."""
MIN_HEAD_ROOM = 1.2
"""A loader that is not this much faster than training makes it wait now and then."""
MIN_GPU_SHARE = 0.25
"""Of its own rate of matrix products; a ViT with a full batch reaches more."""
LONG_ON_CPU_SECONDS = 7 * 86400
SECONDS_OF = {"years": 365.25 * 86400, "days": 86400.0, "hours": 3600.0, "minutes": 60.0}


@dataclass(frozen=True)
class WorkerProbe:
    """What one worker measured while it trained, and then while its loader ran alone."""

    rank: int
    node: str
    """Which machine it ran on."""
    device: str
    """Name of its GPU, or "cpu"."""
    step_seconds: tuple[float, ...]
    """Of every step, without waiting for data."""
    wait_seconds: tuple[float, ...]
    """For data, before every step."""
    loader_seconds: tuple[float, ...]
    """For every batch of the loader alone."""
    peak_bytes: int
    """Most memory that it used: of its GPU, or of its process."""
    free_bytes: int
    """Memory that was free on its machine as it began."""
    checkpoint_bytes: int
    num_bad: int
    """Images that could not be used."""


@dataclass(frozen=True)
class ModelProbe:
    """What one process measured with the model alone, on batches of noise."""

    flops_per_image: float
    """Of a step, what backward computes anew included."""
    matmul_flops_per_second: float
    process_bytes: int
    """What the process held before there was a model; 0 on a GPU."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    teacher_bytes: int
    peaks: tuple[tuple[int, int], ...]
    """(images, peak bytes) of every batch that fitted, ascending."""
    too_large: int | None
    """Images of the smallest batch for which memory did not suffice; None: none was met."""


@dataclass(frozen=True)
class Measured:
    """Everything that a plan is made of."""

    num_workers: int
    uses_gpu: bool
    batch_size: int
    micro_batches: int
    precision: str
    loader_threads: int
    epochs: int
    images: int
    """Of the data set."""
    steps: int
    """Of the whole run."""
    probe_steps: int
    """That were asked for."""
    evaluations: int
    checkpoints: int
    cost_per_worker_hour: float | None
    currency: str
    workers: tuple[WorkerProbe, ...]
    """In the order of their ranks; empty when memory ran out."""
    model: ModelProbe | None
    """None when memory ran out for the smallest batch."""
    data_sheet_flops_per_second: float | None
    find_largest_batch: bool

    @property
    def batch_per_worker(self) -> int:
        """Images of a step on each worker."""
        return self.batch_size // self.num_workers


@dataclass(frozen=True)
class Speed:
    """Of the whole worker group."""

    measured_steps: int
    step_seconds: float
    """Waiting for data included."""
    wait_share: float
    """Of a step, waiting for data."""
    images_per_second: float
    training_images_per_second: float
    """Without waiting for data."""
    loader_images_per_second: float | None
    """Of the loader without training; None when no batch was made in time."""


@dataclass(frozen=True)
class Arithmetic:
    """How much of its peak a worker's device does; a share counts waiting for data too."""

    flops_per_image: float
    matmul_flops_per_second: float
    share_of_matmul: float
    data_sheet_flops_per_second: float | None
    share_of_data_sheet: float | None


@dataclass(frozen=True)
class Memory:
    """Of one worker, in bytes."""

    peak_bytes: int
    process_bytes: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    teacher_bytes: int
    activation_bytes: int
    """The rest: activations, views, the loader."""
    bytes_per_image: float | None
    """By how much the peak grows with each image of a batch; None when one batch size was measured."""


@dataclass(frozen=True)
class LargestBatch:
    """The most images a worker can take in one step."""

    images: int
    """0: not even the smallest batch fits."""
    is_extrapolated: bool
    """From the growth of memory between two small batches; else tried."""
    is_limit: bool
    """Whether the next power of two was too large; else nobody asked for more."""


@dataclass(frozen=True)
class Plan:
    """What a run will take; None where memory ran out before it could be measured."""

    out_of_memory: bool
    num_workers: int
    batch_per_worker: int
    device: str
    precision: str
    steps: int
    speed: Speed | None
    arithmetic: Arithmetic | None
    memory: Memory | None
    largest_batch: LargestBatch | None
    checkpoint_bytes: int | None
    seconds: float | None
    """Of all steps, without evaluations and checkpoints."""
    hours: float | None
    cost: float | None


def make_plan(measured: Measured) -> Plan:
    """What ``measured`` means for the whole run."""
    speed = speed_of(measured) if measured.workers else None
    seconds = None if speed is None else measured.steps * speed.step_seconds
    hours = None if seconds is None else seconds / 3600
    price = measured.cost_per_worker_hour
    return Plan(
        out_of_memory=speed is None,
        num_workers=measured.num_workers,
        batch_per_worker=measured.batch_per_worker,
        device=measured.workers[0].device if measured.workers else ("GPU" if measured.uses_gpu else "cpu"),
        precision=measured.precision,
        steps=measured.steps,
        speed=speed,
        arithmetic=arithmetic_of(measured, speed.images_per_second) if speed else None,
        memory=memory_of(measured),
        largest_batch=largest_batch(measured),
        checkpoint_bytes=measured.workers[0].checkpoint_bytes if measured.workers else None,
        seconds=seconds,
        hours=hours,
        cost=None if hours is None or price is None else hours * measured.num_workers * price,
    )


def speed_of(measured: Measured) -> Speed:
    """Images per second of the group.

    A step takes the median of its computing time and the mean of its waiting time: the loader's batches come in bursts,
    which a median would hide. A worker that need not wait for data waits for the others inside its step, so the one
    that waited longest for data tells both apart.
    """
    waits = {probe.rank: statistics.fmean(_warm(probe.wait_seconds)) for probe in measured.workers}
    last = max(measured.workers, key=lambda probe: waits[probe.rank])
    steps, wait = _warm(last.step_seconds), waits[last.rank]
    compute = statistics.median(steps)
    loader = None
    if all(probe.loader_seconds for probe in measured.workers):
        slowest = max(
            statistics.fmean(_warm(probe.loader_seconds, LOADER_WARM_UP_BATCHES)) for probe in measured.workers
        )
        loader = measured.batch_size / slowest
    return Speed(
        measured_steps=len(steps),
        step_seconds=compute + wait,
        wait_share=wait / (compute + wait),
        images_per_second=measured.batch_size / (compute + wait),
        training_images_per_second=measured.batch_size / compute,
        loader_images_per_second=loader,
    )


def arithmetic_of(measured: Measured, images_per_second: float) -> Arithmetic | None:
    """Shares of the measured and of the promised peak; None without a measured model."""
    if measured.model is None:
        return None
    peak, promised = measured.model.matmul_flops_per_second, measured.data_sheet_flops_per_second
    flops = measured.model.flops_per_image * images_per_second / measured.num_workers
    return Arithmetic(
        flops_per_image=measured.model.flops_per_image,
        matmul_flops_per_second=peak,
        share_of_matmul=flops / peak,
        data_sheet_flops_per_second=promised,
        share_of_data_sheet=None if promised is None else flops / promised,
    )


def memory_of(measured: Measured) -> Memory | None:
    """The peak of the worker that used most, and what it is made of; None when memory ran out."""
    if not measured.workers or measured.model is None:
        return None
    model, peak = measured.model, max(probe.peak_bytes for probe in measured.workers)
    parts = (
        model.process_bytes,
        model.parameter_bytes,
        model.gradient_bytes,
        model.optimizer_bytes,
        model.teacher_bytes,
    )
    return Memory(
        peak, *parts, activation_bytes=max(0, peak - sum(parts)), bytes_per_image=bytes_per_image(model.peaks)
    )


def bytes_per_image(peaks: Sequence[tuple[int, int]]) -> float | None:
    """By how much memory grows per image, between the two largest batches of (images, bytes); None for fewer than 2."""
    if len(peaks) < 2:
        return None
    (few, low), (many, high) = peaks[-2:]
    return max(0.0, (high - low) / (many - few))


def largest_batch(measured: Measured) -> LargestBatch | None:
    """Images per worker that fit: tried on a GPU, extrapolated on a CPU; None when unknown or not asked for."""
    if not measured.find_largest_batch:
        return None
    model = measured.model
    if model is None or not model.peaks:
        return LargestBatch(0, is_extrapolated=False, is_limit=True)
    if measured.uses_gpu:
        return LargestBatch(model.peaks[-1][0], is_extrapolated=False, is_limit=model.too_large is not None)
    if not measured.workers:
        return None
    growth = bytes_per_image(model.peaks)
    budget = model.process_bytes + min(_budget_bytes(measured, probe) for probe in measured.workers)
    if not growth:
        return None
    peak = max(probe.peak_bytes for probe in measured.workers)
    fitting = extrapolated_images(measured.batch_per_worker, peak, growth, budget)
    if fitting < measured.micro_batches:
        return LargestBatch(0, is_extrapolated=True, is_limit=True)
    return LargestBatch(power_of_two_times(measured.micro_batches, fitting), is_extrapolated=True, is_limit=True)


def extrapolated_images(images: int, peak_bytes: float, growth_bytes: float, budget_bytes: float) -> int:
    """Images whose peak is within ``budget_bytes``, when that of ``images`` is ``peak_bytes`` and grows evenly."""
    return max(0, int(images + (budget_bytes - peak_bytes) / growth_bytes))


def power_of_two_times(factor: int, limit: int) -> int:
    """The largest ``factor`` times a power of two that is at most ``limit``; ``factor`` is."""
    value = factor
    while 2 * value <= limit:
        value *= 2
    return value


def findings(plan: Plan, measured: Measured) -> list[Finding]:
    """What follows from the numbers, in plain words: errors first, then warnings, then notes."""
    found = [*_memory_findings(plan, measured)]
    if plan.speed is not None:
        found += [*_speed_findings(plan, plan.speed, measured), *_time_findings(plan, measured)]
    return sorted(found, key=lambda finding: LEVELS.index(finding.level))


def plan_table(plan: Plan) -> Table:
    """The numbers, for people."""
    table = Table("", "", show_header=False)
    for name, value in _lines(plan):
        table.add_row(name, value)
    return table


def duration_in_words(seconds: float) -> str:
    """Such as "3.1 years", "45 minutes" or "20 seconds".

    >>> duration_in_words(5400)
    '1.5 hours'
    """
    for name, size in SECONDS_OF.items():
        if seconds >= size:
            return f"{seconds / size:.3g} {name}"
    return f"{seconds:.0f} seconds"


def bytes_in_words(num_bytes: float) -> str:
    """Such as "1.25 GB" or "340 MB"; a GB is 10^9 bytes."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.3g} MB"


def _lines(plan: Plan) -> Iterator[tuple[str, str]]:
    yield "workers", f"{plan.num_workers} x {plan.device}, {plan.batch_per_worker} images each, {plan.precision}"
    if (speed := plan.speed) is not None:
        yield (
            "images/s",
            f"{speed.images_per_second:,.4g}  ({speed.measured_steps} step(s) of {speed.step_seconds:.3g} s)",
        )
        yield "waiting for data", f"{speed.wait_share:.1%} of a step"
        loader = speed.loader_images_per_second
        yield "loader alone", "no batch in time" if loader is None else f"{loader:,.4g} images/s"
        yield "training without waiting", f"{speed.training_images_per_second:,.4g} images/s"
    if (own := plan.arithmetic) is not None:
        yield "arithmetic per image", f"{own.flops_per_image / 1e9:,.4g} GFLOP"
        rate = f"{own.matmul_flops_per_second / 1e12:.3g} TFLOP/s in {plan.precision}"
        yield "share of peak (MFU)", f"{own.share_of_matmul:.1%} of the measured matrix-product rate, {rate}"
        if own.data_sheet_flops_per_second is not None:
            rate = f"{own.data_sheet_flops_per_second / 1e12:.4g} TFLOP/s"
            yield "", f"{own.share_of_data_sheet:.1%} of the data sheet's, {rate}"
    if (memory := plan.memory) is not None:
        yield "memory per worker, peak", bytes_in_words(memory.peak_bytes)
        if memory.process_bytes:
            yield "  process and libraries", bytes_in_words(memory.process_bytes)
        yield "  parameters", bytes_in_words(memory.parameter_bytes)
        yield "  gradients", bytes_in_words(memory.gradient_bytes)
        yield "  optimizer", bytes_in_words(memory.optimizer_bytes)
        yield "  teacher", bytes_in_words(memory.teacher_bytes)
        growth = memory.bytes_per_image
        each = "" if growth is None else f"  (a step grows by {bytes_in_words(growth)} per image)"
        yield "  activations, views, loader", f"{bytes_in_words(memory.activation_bytes)}{each}"
    if (largest := plan.largest_batch) is not None:
        how = "extrapolated" if largest.is_extrapolated else "tried"
        yield "largest batch per worker", f"{largest.images:,}  ({how})" if largest.images else "none"
    if plan.checkpoint_bytes is not None:
        yield "checkpoint", bytes_in_words(plan.checkpoint_bytes)
    yield "steps of the run", f"{plan.steps:,}"
    if plan.seconds is not None and plan.hours is not None:
        yield "time of the run", f"{plan.hours:,.4g} hours ({duration_in_words(plan.seconds)})"


def _memory_findings(plan: Plan, measured: Measured) -> Iterator[Finding]:
    own, largest = measured.batch_per_worker, plan.largest_batch
    if plan.out_of_memory:
        advice = f"set micro_batches higher than {measured.micro_batches}, or a smaller batch_size"
        if largest is not None and 0 < largest.images < own:
            largest_size = largest.images * measured.num_workers
            advice = (
                f"{largest.images} per worker fit: set batch_size={largest_size}, or keep batch_size and set "
                f"micro_batches={measured.micro_batches * -(-own // largest.images)}"
            )
        yield Finding("error", f"memory does not suffice for {own} images per worker; {advice}")
    elif largest is not None and largest.images >= 2 * own:
        how = ""
        if largest.is_extrapolated:
            how = ", an extrapolation from two small batches against the memory that was free"
        more = "" if largest.is_limit else " or more"
        yield Finding("note", f"a batch of {largest.images:,}{more} per worker would fit, {own} are set{how}")
    elif largest is not None and largest.images < own:
        yield Finding("warning", f"{own} images per worker fitted, but leave little memory free")


def _speed_findings(plan: Plan, speed: Speed, measured: Measured) -> Iterator[Finding]:
    loader, training = speed.loader_images_per_second, speed.training_images_per_second
    if loader is None:
        yield Finding("warning", "the loader alone made no batch in time: raise plan.max_probe_seconds")
    elif loader < MIN_HEAD_ROOM * training:
        yield Finding(
            "warning",
            f"the loader gives {loader:,.4g} images/s, training could take {training:,.4g}: raise loader.threads "
            f"(now {measured.loader_threads}), give the cluster more CPUs, or pack the data with jobs/pack.py",
        )
    else:
        text = f"the loader gives {loader:,.4g} images/s, {loader / training:,.3g} times what training takes"
        if not measured.uses_gpu:
            text += "; both share the CPU, and the loader was measured alone"
        yield Finding("note", text)
    share = None if plan.arithmetic is None else plan.arithmetic.share_of_matmul
    if measured.uses_gpu and share is not None and share < MIN_GPU_SHARE and speed.wait_share < 0.1:
        advice = "set precision=bf16" if measured.precision == "fp32" else "give each worker more images"
        yield Finding("warning", f"the GPU does {share:.0%} of the arithmetic that it could: {advice}")
    asked = max(1, measured.probe_steps - WARM_UP_STEPS)
    if speed.measured_steps < asked:
        yield Finding(
            "warning",
            f"only {speed.measured_steps} of {asked} steps fitted into plan.max_probe_seconds: the times are rough",
        )
    num_bad = sum(probe.num_bad for probe in measured.workers)
    if num_bad:
        yield Finding(
            "warning", f"{num_bad} images of the probe cannot be used: look at them with jobs/inspect_data.py"
        )


def _time_findings(plan: Plan, measured: Measured) -> Iterator[Finding]:
    if plan.seconds is None:
        return
    what = f"{measured.epochs:,} epochs of {measured.images:,} images take {duration_in_words(plan.seconds)}"
    if measured.uses_gpu:
        yield Finding("note", f"{what} with these workers")
    else:
        level = "warning" if plan.seconds > LONG_ON_CPU_SECONDS else "note"
        yield Finding(level, f"these workers have no GPU: {what} here")
    size = bytes_in_words(plan.checkpoint_bytes or 0)
    yield Finding(
        "note",
        f"the time is that of the steps: {measured.evaluations} evaluations and about {measured.checkpoints} "
        f"checkpoints of {size} each come on top",
    )
    if plan.cost is not None:
        yield Finding(
            "note", f"that costs {plan.cost:,.2f} {measured.currency}".rstrip() + f" for {plan.num_workers} worker(s)"
        )


def _warm(seconds: Sequence[float], num_cold: int = WARM_UP_STEPS) -> Sequence[float]:
    """Without the first ones; of a few, the last."""
    return seconds[min(num_cold, len(seconds) - 1) :]


def _budget_bytes(measured: Measured, probe: WorkerProbe) -> float:
    """What ``probe``'s worker may take beside what it held as it began; workers of one machine share alike."""
    neighbours = sum(other.node == probe.node for other in measured.workers)
    return USABLE_MEMORY_SHARE * probe.free_bytes / neighbours
