"""Unsupervised ReID: rounds of features -> neighbours -> Jaccard distance -> pseudo-labels -> training -> evaluation.

Reads from top to bottom in the order it runs: ``run`` (driver), ``train_worker``, ``train_round``. Settings are in
``usl_config``, the first half of a round in ``usl_labels``, the step is ``passreid_ray.train.usl_step.usl_step``.
Sources: Cluster Contrast (arXiv:2103.11568), as PASS (arXiv:2203.03931) uses it. With ``source`` labelled people are
kept in the memory beside the clusters (joint domain adaptation).
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from passreid_ray.config import build
from passreid_ray.data import JUNK_PERSON_ID, Rows, open_rows
from passreid_ray.data.identity_order import IdentityOrder
from passreid_ray.data.rows import join_rows
from passreid_ray.data.stream import Stream
from passreid_ray.engines.board import Board, Monitor
from passreid_ray.engines.cluster_picture import write_cluster_picture
from passreid_ray.engines.clustering import object_store_bytes
from passreid_ray.engines.embedding import embed_rows
from passreid_ray.engines.evaluate import as_metrics, score
from passreid_ray.engines.fit import fit
from passreid_ray.engines.precheck import check_readable
from passreid_ray.engines.pseudo_labels import LABELS_FILE, health_line, write_labels
from passreid_ray.engines.ray_cluster import connect, data_cpus
from passreid_ray.engines.run_folder import check_same_data, prepare
from passreid_ray.engines.summary import print_summary
from passreid_ray.engines.usl_config import MUST_AGREE, USLConfig
from passreid_ray.engines.usl_labels import RoundLabels, Task, read_labels, round_labels
from passreid_ray.engines.warm_start import read_teacher
from passreid_ray.errors import UserError
from passreid_ray.models import ReidModel, load_backbone, load_reid_model
from passreid_ray.models.config import ModelConfig
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.meter import Meter
from passreid_ray.train.run_log import RunLog
from passreid_ray.train.state_files import (
    find_checkpoint,
    load_state,
    read_meta,
    save_state,
    tensors_below,
)
from passreid_ray.train.usl_state import USLNetwork, USLState
from passreid_ray.train.usl_step import USLStepSettings, usl_step
from passreid_ray.train.worker import WorkerContext
from passreid_ray.views import TrainingView, TrainingViewConfig, normalize, view_rng


@dataclass(frozen=True)
class MakeView:
    """The training view of an image, as uint8: normalised only where it is used."""

    config: TrainingViewConfig
    seed: int

    def __call__(self, image_HWC: np.ndarray, draw: int, image_id: str) -> dict[str, np.ndarray]:
        return {"image": TrainingView(self.config)(image_HWC, view_rng(self.seed, draw, image_id))}


def run(config: USLConfig, console: Console | None = None) -> Path:
    """Tune as ``config`` says, or continue the run of that name; the folder of the run.

    Every check that needs no cluster comes before Ray starts.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    config = with_start(config)
    task = open_task(config)
    eval_rows = config.evaluation.rows()
    check_batches(config, len(task.target))
    model, notes = build_model(config)
    check_readable(task.rows, config.max_bad_share)
    fingerprint = task.rows.fingerprint()
    prepare(config.run, config, MUST_AGREE, fingerprint)
    connect(config.workers, object_store_bytes(len(task.rows), model.feature_width))
    console.print(
        f"{len(task.target)} images to cluster"
        + (f", {len(task.rows) - len(task.target)} of {task.source_N.max() + 1} known people" if config.source else "")
        + f", {config.rounds} rounds of {config.steps_per_round} steps of {config.batch_size} images, "
        f"{config.workers.num_workers} worker(s), run folder {config.run.folder}"
    )
    console.print(f"start: {notes}")
    board = Board.remote()
    loop_config = {
        "config": config,
        "task": ray.put(task),
        "fingerprint": fingerprint,
        "eval_rows": ray.put(eval_rows),
        "board": board,
        "checkpoints": config.run.checkpoints,  # made here, where a relative path means what the user meant
        "rounds": config.rounds_store,
        "best": config.best_store,
    }
    log = RunLog(config.run.folder)
    with Monitor(board, log, console, num_rows=len(task.rows), max_bad_share=config.max_bad_share):
        fit(train_worker, loop_config, config.run, config.workers, board)
    labels_N = read_labels(config.rounds_store)
    write_labels(config.run.folder / LABELS_FILE, task.rows.image_ids[task.target], labels_N[task.target])
    write_cluster_picture(task.rows.select(task.target), labels_N[task.target], config.run.folder / "clusters.png")
    print_summary(config.run.folder, console)
    console.print(
        f"checkpoints (best by mAP in best/), metrics.jsonl, {LABELS_FILE}, clusters.png and TensorBoard events are in "
        f"{config.run.folder}"
    )
    return config.run.folder


def with_start(config: USLConfig) -> USLConfig:
    """``config`` with the model that its checkpoint brings; a checkpoint of this project knows its own."""
    path = config.start.checkpoint
    if path is not None and not path.exists():
        raise UserError(f"start.checkpoint: {path} does not exist")
    known: dict[str, Any] = {}
    if path is not None and path.is_dir():
        known = read_meta(find_checkpoint(path))["config"]
    num_parts = known.get("num_parts", known.get("views", {}).get("num_parts", 3))
    model = config.model or (build(ModelConfig, known["model"]) if known else ModelConfig())
    absolute = None if path is None else path.absolute()  # workers run in another folder
    return config.model_copy(
        update={
            "model": model.model_copy(update={"drop_path": config.drop_path}),
            "num_parts": num_parts if config.num_parts is None else config.num_parts,
            "start": config.start.model_copy(update={"checkpoint": absolute}),
        }
    )


def open_task(config: USLConfig) -> Task:
    """The rows of ``config``; raises ``UserError`` when people of ``source`` are unknown."""
    target = open_rows(config.data)
    if config.source is None:
        return Task(target, np.full(len(target), -1, np.int64))
    source = open_rows(config.source)
    unknown = int(np.sum([person_id is None for person_id in source.person_ids]))
    if unknown:
        raise UserError(f"source: {unknown} of {len(source)} images have no person_id; they must all be known people")
    source = source.select(source.person_ids != JUNK_PERSON_ID)
    rows = join_rows([target, source])
    is_source = np.array([image_id.startswith("1:") for image_id in rows.image_ids])
    source_N = np.full(len(rows), -1, np.int64)
    source_N[is_source] = np.unique(rows.person_ids[is_source].astype(str), return_inverse=True)[1]
    return Task(rows, source_N)


def check_batches(config: USLConfig, num_rows: int) -> None:
    """Raise ``UserError`` when a batch cannot be made of whole identities, or not shared out, or k1 is too large."""
    for unit, name in ((config.images_per_identity, "images_per_identity"), (config.workers.num_workers, "workers")):
        if config.batch_size % unit:
            raise UserError(f"batch_size: {config.batch_size} images cannot be divided by {unit} ({name})")
    if not config.cluster.cameras.enabled and config.cluster.k1 >= num_rows:
        raise UserError(
            f"cluster.k1: {config.cluster.k1} neighbours, but there are {num_rows} images; give a smaller k1"
        )


def build_model(config: USLConfig) -> tuple[ReidModel, str]:
    """The model with its first weights, the same on every worker, and what was loaded."""
    assert config.model is not None
    assert config.num_parts is not None
    torch.manual_seed(config.seed)
    backbone = config.model.build(config.views.image_size_px, config.num_parts)
    model = config.neck.build(backbone)
    path = config.start.checkpoint
    if path is None:
        return model, "random weights"
    source: Any = path
    if path.is_dir():
        tensors, _ = load_state(find_checkpoint(path))
        source = tensors_below(tensors, "model.") or read_teacher(path)[0]
    try:
        report = load_reid_model(model, source) if config.start.necks == "loaded" else load_backbone(backbone, source)
    except UserError as error:
        raise UserError(f"start.checkpoint: {path}: {str(error).removeprefix('checkpoint: ')}") from None
    return model, f"{path}: {report}"


def train_worker(loop_config: dict[str, Any]) -> None:
    """What each worker does: resume, then round after round."""
    config: USLConfig = loop_config["config"]
    threads = config.workers.threads_per_worker()
    worker = WorkerContext.from_ray(loop_config["board"], loop_config["checkpoints"], threads)
    task: Task = ray.get(loop_config["task"])
    state = build_state(config, worker)
    worker.resume(partial(load_checkpoint, state, config, loop_config["fingerprint"]))
    state.forward = worker.share(state.network)
    rows_ref = ray.put(task.rows)
    if worker.rank == 0:
        worker.post("start", step=state.step, end_step=config.steps)
    evaluate = partial(evaluate_model, state, config, ray.get(loop_config["eval_rows"]), worker)
    save = partial(save_checkpoint, state, config, loop_config["fingerprint"])
    if state.step == 0 and (metrics := evaluate()):
        worker.post("evaluation", step=0, metrics=metrics)
    meter = Meter(worker, config.batch_size)
    while state.round < config.rounds:
        labels = round_labels(state, config, task, loop_config["rounds"], worker)
        if state.memory is None:  # else the round goes on in the middle
            state.memory = config.memory.build(torch.from_numpy(labels.centroids_KD)).to(state.device)
        train_round(state, config, task, rows_ref, labels.labels_N, meter, save, worker)
        finished = state.round
        state.memory, state.round = None, state.round + 1
        is_last = state.round == config.rounds
        metrics = evaluate() if is_last or state.round % config.evaluation.every_rounds == 0 else {}
        if worker.rank == 0:
            text = round_line(finished, config.rounds, labels, metrics)
            worker.post("round", step=state.step, text=text, metrics={**labels.as_metrics(), **metrics})
        keep_best(state, metrics, save, loop_config["best"], worker)
        if is_last or state.round % config.run.checkpoint_every_epochs == 0:
            worker.report(state.step, save, config.run.keep)


def build_state(config: USLConfig, worker: WorkerContext) -> USLState:
    """The state before the first round."""
    model, _ = build_model(config)
    model.backbone.use_fused_attention(worker.device.type != "cpu" or config.precision == "fp32")
    network = USLNetwork(model, config.refine.build(model.feature_width), config.refine.num_neighbours)
    network.to(worker.device)
    scaler = GradScaler(worker.device.type, enabled=config.precision == "fp16")
    return USLState(network, network, config.optimizer.build(network), scaler)


def train_round(
    state: USLState,
    config: USLConfig,
    task: Task,
    rows_ref: Any,
    labels_N: NDArray[np.int64],
    meter: Meter,
    save: Any,
    worker: WorkerContext,
) -> None:
    """The steps of the round that ``state`` is in, or those that are left of them."""
    order = IdentityOrder(labels_N, task.rows.camera_ids, config.batch_size, config.images_per_identity, config.seed)
    stream = Stream(rows_ref, order, MakeView(config.views, config.seed), worker.rank, worker.world_size)
    end = (state.round + 1) * config.steps_per_round
    settings = USLStepSettings(config.precision, config.refine.loss_weight, config.seed)
    lr = config.optimizer.lr_at(state.round)
    batches = stream.batches(state.step, end, num_cpus=data_cpus(worker.world_size))
    while state.step < end:
        with meter.waiting():
            batch = next(batches)
        worker.post_bad(batch["bad"])
        images_BCHW = normalize(torch.from_numpy(batch["image"].copy()).to(worker.device), config.views)
        labels_B = torch.from_numpy(labels_N[batch["row"]]).to(worker.device)
        metrics = usl_step(state, images_BCHW, labels_B, lr, settings)
        meter.count_step(metrics["loss"])
        if state.step == end or state.step % config.log_every_steps == 0:
            log_step(state, metrics, lr, meter, worker)
        if state.refused_in_a_row >= config.max_refused_in_a_row:
            worker.report(state.step, save, config.run.keep)
            raise UserError(
                f"stopped after step {state.step}: loss or gradient was not finite {state.refused_in_a_row} times in a "
                f"row. The weights before that are in {config.run.folder}; lower optimizer.lr or set precision=fp32"
            )
        every = config.run.checkpoint_every_steps
        if every is not None and state.step % every == 0 and state.step < end:
            worker.report(state.step, save, config.run.keep)


def log_step(state: USLState, metrics: dict[str, Tensor], lr: float, meter: Meter, worker: WorkerContext) -> None:
    """Send the record of an interval to the driver."""
    interval = meter.read()
    worker.stop_if_told()
    if worker.rank == 0:
        values = {name: float(value) for name, value in metrics.items() if name != "loss"} | interval
        more = {"lr": lr, "round": state.round, "refused_steps": state.refused_steps}
        worker.post("metrics", step=state.step, metrics={**values, **more})


def evaluate_model(state: USLState, config: USLConfig, rows: Rows | None, worker: WorkerContext) -> dict[str, float]:
    """Retrieval accuracy on the labelled rows, on rank 0; all workers share the features. Nothing without rows."""
    if rows is None:
        return {}
    features_ND, bad = embed_rows(
        state.network.model,
        rows,
        size_px=config.views.image_size_px,
        pixels=config.views,
        batch_size=config.extract_batch_size,
        device=worker.device,
    )
    if worker.rank != 0:
        return {}
    result = score(features_ND, rows, config.evaluation.retrieval, bad)
    return {f"evaluation/{name}": value for name, value in as_metrics(result).items()}


def round_line(finished: int, rounds: int, labels: RoundLabels, metrics: dict[str, float]) -> str:
    """A round in a line."""
    measured = f", mAP {metrics['evaluation/mAP']:.2%}, rank-1 {metrics['evaluation/rank1']:.2%}" if metrics else ""
    notes = "".join(f"\n  {note}" for note in labels.found.notes)
    return f"round {finished + 1} of {rounds}: {health_line(labels.found)}{measured}{notes}"


def keep_best(
    state: USLState, metrics: dict[str, float], save: Any, best: CheckpointStore, worker: WorkerContext
) -> None:
    """Save the state when its mAP is the highest so far; rank 0 alone knows the metrics and keeps the score."""
    if worker.rank == 0 and metrics.get("evaluation/mAP", -1.0) > state.best_mAP:
        state.best_mAP = metrics["evaluation/mAP"]
        best.write(state.step, save)
        best.prune(1)


def save_checkpoint(state: USLState, config: USLConfig, fingerprint: str, folder: Path) -> None:
    """Write ``state`` and what is needed to check that a continued run is the same one."""
    save_state(
        folder, state.tensors(), {**state.meta(), "config": config.model_dump(mode="json"), "fingerprint": fingerprint}
    )


def load_checkpoint(state: USLState, config: USLConfig, fingerprint: str, folder: Path) -> None:
    """Put the checkpoint in ``folder`` back into ``state``; ``UserError`` when it is of other data or damaged."""
    tensors, meta = load_state(folder)
    check_same_data(meta, fingerprint, str(folder))
    centroids_KD = state.load(tensors, meta, str(folder))
    if centroids_KD is not None:
        memory = config.memory.build(centroids_KD)
        memory.centroids_KD.copy_(centroids_KD)  # building normalises again, which changes the last bit
        state.memory = memory.to(state.device)
