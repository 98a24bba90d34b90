"""What a pre-training run will cost, measured before it starts: a few of its steps -> images/s, memory, hours, price.

Reads from top to bottom in the order it runs: settings, ``run`` (driver), the probes. What workers do is in
``plan_probe``, what the numbers mean in ``plan_report``.
"""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
import ray
import torch
from pydantic import Field
from ray.exceptions import OutOfMemoryError, WorkerCrashedError
from rich.console import Console

from passreid_ray.config import Section, UserPath, to_toml
from passreid_ray.data import Rows, open_rows
from passreid_ray.data.order import EpochwiseOrder
from passreid_ray.engines.board import new_board
from passreid_ray.engines.data_report import Finding
from passreid_ray.engines.fit import fit
from passreid_ray.engines.inspect_data import STYLES
from passreid_ray.engines.plan_probe import probe_model, probe_worker
from passreid_ray.engines.plan_report import (
    Measured,
    ModelProbe,
    Plan,
    WorkerProbe,
    findings,
    make_plan,
    plan_table,
)
from passreid_ray.engines.precheck import check_readable
from passreid_ray.engines.pretrain import PretrainConfig, check_model
from passreid_ray.engines.ray_cluster import connect
from passreid_ray.engines.run_folder import CONFIG_FILE, RunConfig, check_writable
from passreid_ray.errors import UserError
from passreid_ray.train.compute_rate import data_sheet_flops_per_second

PLAN_FILE = "plan.json"
MEMORY_SIGNS = ("OutOfMemoryError", "out of memory", "SIGKILL", "node running low on memory")
"""In what Ray tells of a worker that the machine or Ray ended because memory ran out."""


class PlanSettings(Section):
    """What is measured, and what it costs."""

    output: UserPath = Path("outputs/plan")
    """Folder for plan.json."""
    probe_steps: int = Field(default=20, ge=2)
    """Steps that are done; the first three are not counted."""
    max_probe_seconds: float = Field(default=120.0, gt=0)
    """About how long measuring may take, beside starting the workers; fewer steps are done then. At least one is."""
    find_largest_batch: bool = True
    """Find out how many images of a step a worker's memory has room for."""
    cost_per_worker_hour: float | None = Field(default=None, ge=0)
    """Price of one worker (its GPU, or its share of a machine) for an hour; none: no price is told."""
    currency: str = "USD"
    """Of the price; only printed."""


class PlanConfig(PretrainConfig):
    """The settings of the run that is planned, and those of the plan."""

    plan: PlanSettings = PlanSettings()


def run(config: PlanConfig, console: Console | None = None) -> Plan:
    """Measure the run that ``config`` describes; its plan, also printed and in plan.json of ``plan.output``.

    Nothing is written into the run's folder. Memory that does not suffice is a result.

    Raises:
        UserError: what would stop the run before it starts, or a worker while it is probed.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    if config.workers.is_range:
        console.print(f"planned for the most of {config.workers.described} (workers.num_workers)")
        workers = config.workers.model_copy(update={"num_workers": config.workers.world_size})
        config = config.model_copy(update={"workers": workers})
    rows = open_rows(config.data)
    eval_rows, _ = config.evaluation.open()
    order = config.epoch_order(rows)
    check_model(config)
    check_readable(rows, config.max_bad_share)
    check_writable(config.plan.output, "plan.output")
    (config.plan.output / CONFIG_FILE).write_text(to_toml(config), encoding="utf-8")
    connect(config.workers)
    scaling = config.workers.to_ray()
    # Without workers of its own the run takes the GPU of its process, which Ray is not asked for.
    uses_gpu = bool(scaling.use_gpu) if config.workers.num_workers else torch.cuda.is_available()
    console.print(
        f"{len(rows):,} images, probing {config.plan.probe_steps} steps of {config.batch_size} images with "
        f"{config.workers.world_size} worker(s), at most about {config.plan.max_probe_seconds:g} s"
    )
    workers = probe_group(config, rows, order)
    model = probe_alone(config, order, uses_gpu=uses_gpu)
    measured = measured_of(config, rows, order, workers, model, uses_gpu=uses_gpu, evaluates=eval_rows is not None)
    plan = make_plan(measured)
    found = findings(plan, measured)
    write_plan(config.plan.output / PLAN_FILE, plan, found, measured, rows)
    console.print(plan_table(plan))
    for finding in found:
        console.print(f"{finding.level}: {finding.text}", style=STYLES[finding.level], markup=False)
    console.print(f"{PLAN_FILE} is in {config.plan.output}")
    return plan


def probe_group(config: PlanConfig, rows: Rows, order: EpochwiseOrder) -> tuple[WorkerProbe, ...]:
    """What the run's group of workers measured, in the order of their ranks; empty when memory did not suffice."""
    # Ray Train wants a folder, which all nodes share where the run's is shared; it is deleted at the end.
    folder = RunConfig(name=f"{config.run.name}.plan", output=config.plan.output, storage=config.run.storage)
    _delete(folder)
    check_writable(folder.folder, "plan.output")
    board = new_board()
    loop_config = {
        "config": config,
        "rows": ray.put(rows),
        "order": order,
        "board": board,
        "probe_steps": config.plan.probe_steps,
        "max_seconds": config.plan.max_probe_seconds,
    }
    failure = None
    try:
        # A worker that crashes would crash again.
        fit(probe_worker, loop_config, folder, config.workers.model_copy(update={"max_failures": 0}), board)
    except UserError as error:
        failure = error
    posts = ray.get(board.take.remote())
    has_told = any(post["kind"] == "out_of_memory" for post in posts)
    log = folder.folder / "error.log"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    if failure is not None and not has_told and not any(sign in text for sign in MEMORY_SIGNS):
        if text:
            raise UserError(f"the probe failed: {text.strip().splitlines()[-1]}. All of it is in {log}") from failure
        raise failure
    _delete(folder)
    if failure is not None:
        return ()
    probes = [WorkerProbe(**_without_kind(post)) for post in posts if post["kind"] == "probe"]
    return tuple(sorted(probes, key=lambda probe: probe.rank))


def probe_alone(config: PlanConfig, order: EpochwiseOrder, *, uses_gpu: bool) -> ModelProbe | None:
    """What one process with a worker's share of a machine measured; None when memory did not suffice."""
    # A process of its own, ended afterwards: its memory is that of the model, and batches too large harm nobody.
    in_own_process: Any = ray.remote(num_cpus=1, num_gpus=int(uses_gpu), max_retries=0, max_calls=1)
    task = in_own_process(probe_model)
    device = torch.device("cuda" if uses_gpu else "cpu")
    settings = config.plan
    try:
        return ray.get(
            task.remote(config, order, device, settings.max_probe_seconds, find_largest=settings.find_largest_batch)
        )
    except (OutOfMemoryError, WorkerCrashedError):
        return None


def measured_of(
    config: PlanConfig,
    rows: Rows,
    order: EpochwiseOrder,
    workers: tuple[WorkerProbe, ...],
    model: ModelProbe | None,
    *,
    uses_gpu: bool,
    evaluates: bool,
) -> Measured:
    """What was measured, beside what the settings say."""
    steps, every_steps = config.schedule(order).steps, config.run.checkpoint_every_steps
    return Measured(
        num_workers=config.workers.world_size,
        uses_gpu=uses_gpu,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        precision=config.precision,
        loader_threads=config.loader.threads,
        epochs=config.epochs,
        images=len(rows),
        steps=steps,
        probe_steps=config.plan.probe_steps,
        evaluations=1 + math.ceil(config.epochs / config.evaluation.every_epochs) if evaluates else 0,
        checkpoints=math.ceil(config.epochs / config.run.checkpoint_every_epochs)
        + (steps // every_steps if every_steps else 0),
        cost_per_worker_hour=config.plan.cost_per_worker_hour,
        currency=config.plan.currency,
        workers=workers,
        model=model,
        data_sheet_flops_per_second=data_sheet_flops_per_second(workers[0].device, config.precision)
        if workers
        else None,
        find_largest_batch=config.plan.find_largest_batch,
    )


def write_plan(path: Path, plan: Plan, found: list[Finding], measured: Measured, rows: Rows) -> None:
    """The plan, its findings and what was measured, for programs; there whole or not at all."""
    content = {
        **asdict(plan),
        "findings": [asdict(finding) for finding in found],
        "measured": asdict(measured),
        "fingerprint": rows.fingerprint(),
    }
    draft = path.with_name(f"{path.name}.part")
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    draft.replace(path)


def _delete(run: RunConfig) -> None:
    """Delete what Ray Train and ``fit`` wrote for the probe."""
    for address in {str(run.folder.resolve()), run.checkpoints.address}:
        filesystem, path = type(run.checkpoints)(address).location()
        if filesystem.get_file_info(path).type == pafs.FileType.Directory:
            filesystem.delete_dir(path)


def _without_kind(post: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in post.items() if key != "kind"}
