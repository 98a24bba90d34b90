"""What is measured for a plan: steps and loader in the workers of a group, the model alone in a process of its own."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import psutil
import ray
import torch
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.data.order import EpochwiseOrder
from passreid_ray.data.stream import EncodedStream
from passreid_ray.engines.plan_report import ModelProbe, WorkerProbe
from passreid_ray.engines.pretrain import PretrainConfig, build_state, compile_trunks, to_views
from passreid_ray.engines.ray_cluster import data_share
from passreid_ray.engines.warm_start import WarmStartConfig
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.compute_rate import count_flops, matmul_flops_per_second
from passreid_ray.train.pass_rates import PassRates
from passreid_ray.train.pass_state import PassState
from passreid_ray.train.pass_step import StepSettings, train_step
from passreid_ray.train.sharing import average_gradients
from passreid_ray.train.view_loader import ViewBatch, ViewMaker
from passreid_ray.train.worker import WorkerContext

STEPS_SHARE, LOADER_SHARE, MODEL_SHARE = 0.5, 0.2, 0.3
"""Of the seconds that a probe may take."""
LOADER_BATCHES_PER_STEP = 4
"""The loader is watched for longer than the training: much of its first batches is read before the first one comes."""
SMALL_BATCHES = (4, 8)
"""Images, times the micro-batches, of the two steps from which a CPU's memory is extrapolated."""
MOST_IMAGES = 8192
"""Larger batches are not tried on a GPU."""
CGROUP = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self")


def probe_worker(loop_config: dict[str, Any]) -> None:
    """What each worker of the group does: some steps as a run would do them, then the loader alone.

    Posts a ``WorkerProbe`` on the board, or that memory did not suffice. Nothing is saved.
    """
    config: PretrainConfig = loop_config["config"]
    free_bytes = free_memory_bytes()
    worker = WorkerContext.from_ray(loop_config["board"], config.run.checkpoints, config.workers.threads_per_worker())
    try:
        probe = _probe_group_member(config, loop_config, worker, free_bytes)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Waited for: this process and those of the other workers, which wait for this one, are about to end.
        ray.get(worker.board.post.remote({"kind": "out_of_memory", "rank": worker.rank}))
        raise UserError(f"worker {worker.rank} is out of memory") from error
    ray.get(worker.board.post.remote({"kind": "probe", **asdict(probe)}))


def _probe_group_member(
    config: PretrainConfig, loop_config: dict[str, Any], worker: WorkerContext, free_bytes: int
) -> WorkerProbe:
    order: EpochwiseOrder = loop_config["order"]
    num_steps, max_seconds = loop_config["probe_steps"], loop_config["max_seconds"]
    state, settings, rates = _usual(config, order, worker)
    compiled = compile_trunks(state, config, worker.world_size)
    if compiled and worker.rank == 0:
        worker.post("say", text=compiled)
    state.forward = average_gradients(state.forward, config.sharing)
    stream = EncodedStream(loop_config["rows"], order, worker.rank, worker.world_size)
    maker = ViewMaker(ray.get(loop_config["rows"]), order, config.views, config.seed, worker.device)
    share, threads = data_share(worker.world_size, config.workers.cpus_per_worker), config.loader.threads
    step_seconds, wait_seconds, num_bad = [], [], 0
    start = time.perf_counter()
    encoded = stream.batches(0, num_steps, share)
    for wait, batch in _with_waits(maker.batches(encoded, threads)):
        begin = time.perf_counter()
        is_logged = (state.step + 1) % config.log_every_steps == 0
        train_step(state, to_views(batch, config.views), rates, settings, diagnose=is_logged)
        _finish(worker.device)
        step_seconds.append(time.perf_counter() - begin)
        wait_seconds.append(wait)
        num_bad += len(batch.bad)
        if _is_over(start, STEPS_SHARE * max_seconds, worker.device):
            break
    peak_bytes = worker.peak_memory_bytes()
    # Other rows than those of the steps, which the machine may still have in its memory.
    encoded = stream.batches(num_steps, (1 + LOADER_BATCHES_PER_STEP) * num_steps, share)
    loader_seconds, start = [], time.perf_counter()
    for wait, batch in _with_waits(maker.batches(encoded, threads)):
        loader_seconds.append(wait)
        num_bad += len(batch.bad)
        if time.perf_counter() - start > LOADER_SHARE * max_seconds:
            break
    is_cuda = worker.device.type == "cuda"
    return WorkerProbe(
        rank=worker.rank,
        node=ray.get_runtime_context().get_node_id(),
        device=torch.cuda.get_device_name(worker.device) if is_cuda else "cpu",
        step_seconds=tuple(step_seconds),
        wait_seconds=tuple(wait_seconds),
        loader_seconds=tuple(loader_seconds),
        peak_bytes=peak_bytes,
        free_bytes=free_bytes,
        checkpoint_bytes=tensor_bytes(state.tensors().values()),
        num_bad=num_bad,
    )


def probe_model(
    config: PretrainConfig, order: EpochwiseOrder, device: torch.device, max_seconds: float, *, find_largest: bool
) -> ModelProbe | None:
    """Arithmetic and memory of a step on one ``device``, without data and without other workers.

    Call it in a process of its own, whose memory nobody else has used. On a GPU with ``find_largest`` batches are
    doubled until memory does not suffice; else two small ones are measured. None when not even the first one fits.
    """
    torch.set_num_threads(config.workers.threads_per_worker())
    max_seconds *= MODEL_SHARE
    start = time.perf_counter()
    process_bytes = 0 if device.type == "cuda" else _resident_bytes()
    try:
        step = _NoiseSteps(config, order, device)
        first, *more = [config.micro_batches * images for images in batch_sizes(device, find_largest=find_largest)]
        # The first step makes what AdamW keeps: only later ones show all the memory that a run needs.
        flops_per_image = count_flops(lambda: step(first)) / first
        peaks = [(first, step.peak_bytes(first))]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    too_large = None
    for images in more:
        # The next step takes about twice the time of all steps before it.
        if len(peaks) > 1 and 3 * (time.perf_counter() - start) > max_seconds:
            break
        try:
            peaks.append((images, step.peak_bytes(images)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            too_large = images
            break
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what a batch too large has left, for the matrices
    return ModelProbe(
        flops_per_image=flops_per_image,
        matmul_flops_per_second=matmul_flops_per_second(config.precision, device),
        process_bytes=process_bytes,
        **state_bytes(step.state),
        peaks=tuple(peaks),
        too_large=too_large,
    )


def batch_sizes(device: torch.device, *, find_largest: bool) -> Sequence[int]:
    """Images per micro-batch of the batches to try, ascending."""
    if device.type == "cpu" or not find_largest:
        return SMALL_BATCHES
    return [2**power for power in range(1, MOST_IMAGES.bit_length())]


def state_bytes(state: PassState) -> dict[str, int]:
    """Bytes of a state after a step, by what they are for: fields of ``ModelProbe``."""
    student, teacher = state.student, state.teacher
    optimizer = [value for own in state.optimizer.state.values() for value in own.values() if isinstance(value, Tensor)]
    return {
        "parameter_bytes": tensor_bytes([*student.parameters(), *student.buffers()]),
        "gradient_bytes": tensor_bytes(own for own in student.parameters() if own.requires_grad),
        "optimizer_bytes": tensor_bytes(optimizer),
        "teacher_bytes": tensor_bytes([*teacher.parameters(), *teacher.buffers(), *state.centers()]),
    }


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all elements of ``tensors``."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory did not suffice, on a GPU or in this process."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()  # on a CPU torch raises a plain RuntimeError
    return "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text


def free_memory_bytes() -> int:
    """Memory of this machine, or of this container where that is less, that nobody uses."""
    free = psutil.virtual_memory().available
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return free
    return free if limit == "max" else min(free, max(0, int(limit) - int(used)))


class _NoiseSteps:
    """Steps on noise, which take the time and memory of steps on images."""

    def __init__(self, config: PretrainConfig, order: EpochwiseOrder, device: torch.device) -> None:
        # Weights to begin with change nothing here, and no driver listens to what is said of them.
        config = config.model_copy(update={"warm_start": WarmStartConfig()})
        worker = WorkerContext(0, 1, device, board=None, checkpoints=cast(CheckpointStore, None))
        self.state, self._settings, self._rates = _usual(config, order, worker)
        self._config, self._device = config, device

    def __call__(self, images: int) -> None:
        """A step with ``images`` images, while as many views are held as the loader has ready."""
        # Not freed before the step ends: the loader holds its batches while the step computes.
        batches = [self._noise(images) for _ in range(1 + self._config.loader.threads)]
        try:
            train_step(self.state, to_views(batches[0], self._config.views), self._rates, self._settings)
            _finish(self._device)
        except BaseException:
            self.state.optimizer.zero_grad(set_to_none=True)
            raise

    def peak_bytes(self, images: int) -> int:
        """The most memory in use during a step with ``images`` images."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)
            self(images)
            return torch.cuda.max_memory_allocated(self._device)
        (PROCESS / "clear_refs").write_text("5")  # the peak starts from what is resident now
        self(images)
        return _status_bytes("VmHWM")

    def _noise(self, images: int) -> ViewBatch:
        views = self._config.views
        local = (images, views.num_parts, views.local_views_per_part, 3, *views.local_size_px)
        global_BGCHW, local_BPLCHW = (
            torch.randint(0, 256, shape, dtype=torch.uint8, device=self._device)
            for shape in ((images, 2, 3, *views.global_size_px), local)
        )
        return ViewBatch(global_BGCHW, local_BPLCHW, [])


def _usual(
    config: PretrainConfig, order: EpochwiseOrder, worker: WorkerContext
) -> tuple[PassState, StepSettings, PassRates]:
    """The state before the first step, and settings and rates of a step of later epochs, when all weights learn."""
    # What does not learn yet has no state in AdamW: memory and checkpoints of the first steps would be too small.
    state, settings = build_state(config, order, worker)
    rates = replace(config.schedule(order).at(0), is_last_layer_frozen=False)
    return state, replace(settings, head_warmup_steps=0), rates


def _with_waits(batches: Iterator[ViewBatch]) -> Iterator[tuple[float, ViewBatch]]:
    """Every batch with the seconds that it was waited for."""
    while True:
        start = time.perf_counter()
        batch = next(batches, None)
        if batch is None:
            return
        yield time.perf_counter() - start, batch


def _is_over(start: float, max_seconds: float, device: torch.device) -> bool:
    """Whether ``max_seconds`` have passed since ``start``: the same answer on every worker."""
    elapsed = torch.tensor(time.perf_counter() - start, device=device)
    return float(distributed.all_reduce_mean(elapsed)) > max_seconds


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss


def _status_bytes(key: str) -> int:
    status = dict(line.split(":", 1) for line in (PROCESS / "status").read_text().splitlines())
    return 1024 * int(status[key].split()[0])
