"""Unsupervised ReID: rounds of features -> neighbours -> Jaccard distance -> pseudo-labels -> training -> evaluation.

Reads from top to bottom in the order it runs: ``run`` (driver), ``train_worker``, ``train_round``. Settings are in
``usl_config``, the first half of a round in ``usl_labels``, the step is ``passreid_ray.train.usl_step.usl_step``.
Sources: Cluster Contrast (arXiv:2103.11568), as PASS (arXiv:2203.03931) uses it. With ``source`` labelled people are
kept in the memory beside the clusters (joint domain adaptation).
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from rich.console import Console
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from passreid_ray.data import JUNK_PERSON_ID, Rows, open_rows
from passreid_ray.data.identity_order import IdentityOrder
from passreid_ray.data.rows import join_rows
from passreid_ray.data.stream import Stream, bad_images
from passreid_ray.engines.board import Listener
from passreid_ray.engines.cluster_picture import write_cluster_picture
from passreid_ray.engines.clustering import object_store_bytes
from passreid_ray.engines.embedding import ImageInput
from passreid_ray.engines.fit import fit_and_watch
from passreid_ray.engines.precheck import check_readable
from passreid_ray.engines.pseudo_labels import LABELS_FILE, health_line, write_labels
from passreid_ray.engines.ray_cluster import connect, data_share
from passreid_ray.engines.run_folder import prepare
from passreid_ray.engines.scoring import measure
from passreid_ray.engines.summary import print_summary
from passreid_ray.engines.tuning_config import build_model, check_shares, start_notes, with_start
from passreid_ray.engines.tuning_worker import MakeView, TuningRun
from passreid_ray.engines.usl_config import MUST_AGREE, USLConfig
from passreid_ray.engines.usl_labels import RoundLabels, Task, read_labels, require_labels, round_labels
from passreid_ray.errors import UserError
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.meter import Meter
from passreid_ray.train.orders import Orders
from passreid_ray.train.sharing import average_gradients
from passreid_ray.train.usl_state import USLNetwork, USLState
from passreid_ray.train.usl_step import USLStepSettings, usl_step
from passreid_ray.train.worker import WorkerContext
from passreid_ray.views import normalize


def run(config: USLConfig, console: Console | None = None, listener: Listener | None = None) -> Path:
    """Tune as ``config`` says, or continue the run of that name; the folder of the run.

    Every check that needs no cluster comes before Ray starts. ``listener`` is told what is logged.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    config = with_start(config)
    task = open_task(config)
    eval_rows, eval_notes = config.evaluation.open()
    check_shares(config)
    check_neighbours(config, len(task.target))
    model, notes = build_model(config)
    check_readable(task.rows, config.max_bad_share)
    fingerprint = task.rows.fingerprint()
    for note in prepare(config.run, config, MUST_AGREE, fingerprint):
        console.print(note)
    connect(config.workers, object_store_bytes(len(task.rows), model.feature_width))
    console.print(
        f"{len(task.target)} images to cluster"
        + (f", {len(task.rows) - len(task.target)} of {task.source_N.max() + 1} known people" if config.source else "")
        + f", {config.rounds} rounds of {config.steps_per_round} steps of {config.batch_size} images, "
        f"{config.workers.described}, run folder {config.run.folder}"
    )
    console.print(f"start: {notes}")
    for note in [*start_notes(config), *eval_notes]:
        console.print(note)
    loop_config = {
        "config": config,
        "task": ray.put(task),
        "rows": ray.put(task.rows),
        "fingerprint": fingerprint,
        "eval_rows": ray.put(eval_rows),
        "checkpoints": config.run.checkpoints,  # made here, where a relative path means what the user meant
        "rounds": config.rounds_store,
        "best": config.best_store,
    }
    fit_and_watch(
        train_worker,
        loop_config,
        config.run,
        config.workers,
        console,
        num_rows=len(task.rows),
        max_bad_share=config.max_bad_share,
        job_name="usl",
        listener=listener,
    )
    labels_N = read_labels(config.rounds_store)
    write_labels(config.run.folder / LABELS_FILE, task.rows.image_ids[task.target], labels_N[task.target])
    write_cluster_picture(task.rows.select(task.target), labels_N[task.target], config.run.folder / "clusters.png")
    print_summary(config.run.folder, console)
    console.print(
        f"checkpoints (best by mAP in best/), metrics.jsonl, {LABELS_FILE}, clusters.png and TensorBoard events are in "
        f"{config.run.folder}"
    )
    return config.run.folder


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


def check_neighbours(config: USLConfig, num_rows: int) -> None:
    """Raise ``UserError`` when there are too few images for ``cluster.k1``."""
    if not config.cluster.cameras.enabled and config.cluster.k1 >= num_rows:
        raise UserError(
            f"cluster.k1: {config.cluster.k1} neighbours, but there are {num_rows} images; give a smaller k1"
        )


def train_worker(loop_config: dict[str, Any]) -> None:
    """What each worker does: resume, then round after round."""
    config: USLConfig = loop_config["config"]
    threads = config.workers.threads_per_worker()
    worker = WorkerContext.from_ray(loop_config["board"], loop_config["checkpoints"], threads)
    task: Task = ray.get(loop_config["task"])
    state = build_state(config, worker)
    tuning = TuningRun(state, config, worker, loop_config["best"], loop_config["fingerprint"], Orders(worker))
    tuning.resume(partial(load_checkpoint, state, config, loop_config["rounds"]))
    state.forward = average_gradients(state.network)
    state.network.model.compute_in_pieces(config.pieces_of(worker.world_size))
    eval_rows: Rows | None = ray.get(loop_config["eval_rows"])
    if worker.rank == 0:
        worker.post("start", step=state.step, end_step=config.steps)
    if state.step == 0 and (metrics := evaluate_model(state, config, eval_rows, worker)):
        worker.post("evaluation", step=0, metrics=metrics)
    meter = Meter(worker, config.batch_size)
    while state.round < config.rounds:
        labels = round_labels(state, config, task, loop_config["rounds"], worker)
        if state.memory is None:  # else the round goes on in the middle
            state.memory = config.memory.build(torch.from_numpy(labels.centroids_KD)).to(state.device)
        order = IdentityOrder(
            labels.labels_N, task.rows.camera_ids, config.batch_size, config.images_per_identity, config.seed
        )
        view = MakeView(config.views, config.seed)
        stream = Stream(loop_config["rows"], order, view, worker.rank, worker.world_size)
        train_round(tuning, state, config, stream, labels, meter)
        finished = state.round
        state.memory, state.round = None, state.round + 1
        is_last = state.round == config.rounds
        is_due = is_last or state.round % config.evaluation.every_rounds == 0
        metrics = evaluate_model(state, config, eval_rows, worker) if is_due else {}
        if worker.rank == 0:
            text = round_line(finished, config.rounds, labels, metrics)
            worker.post("round", step=state.step, text=text, metrics={**labels.as_metrics(), **metrics})
        tuning.keep_best(metrics)
        if is_last or state.round % config.run.checkpoint_every_epochs == 0:
            tuning.save(is_last=is_last)


def build_state(config: USLConfig, worker: WorkerContext) -> USLState:
    """The state before the first round."""
    model, _ = build_model(config)
    model.backbone.use_fused_attention(worker.device.type != "cpu" or config.precision == "fp32")
    network = USLNetwork(model, config.refine.build(model.feature_width), config.refine.num_neighbours)
    network.to(worker.device)
    scaler = GradScaler(worker.device.type, enabled=config.precision == "fp16")
    return USLState(network, network, config.optimizer.build(network), scaler)


def train_round(
    tuning: TuningRun, state: USLState, config: USLConfig, stream: Stream, labels: RoundLabels, meter: Meter
) -> None:
    """The steps of the round that ``state`` is in, or those that are left of them."""
    worker = tuning.worker
    end = (state.round + 1) * config.steps_per_round
    settings = USLStepSettings(config.precision, config.refine.loss_weight, config.seed)
    lr = config.optimizer.lr_at(state.round)
    workers = config.workers
    share = data_share(worker.world_size, workers.cpus_per_worker, is_range=workers.is_range)
    batches = stream.batches(state.step, end, share)
    while state.step < end:
        with meter.waiting():
            batch = next(batches)
        worker.post_bad(bad_images(batch))
        images_BCHW = normalize(torch.from_numpy(batch["image"].copy()).to(worker.device), config.views)
        labels_B = torch.from_numpy(labels.labels_N[batch["row"]]).to(worker.device)
        metrics = usl_step(state, images_BCHW, labels_B, lr, settings)
        meter.count_step(metrics["loss"])
        if state.step == end or state.step % config.log_every_steps == 0:
            tuning.log(metrics, {"lr": lr, "round": state.round}, meter)
        tuning.stop_if_refused()
        every = config.run.checkpoint_every_steps
        asked = tuning.orders.after_step(state.step)
        if asked.save or (every is not None and state.step % every == 0 and state.step < end):
            tuning.save(tell_ray=not asked.ends_group)
        tuning.orders.carry_out(asked)


def evaluate_model(state: USLState, config: USLConfig, rows: Rows | None, worker: WorkerContext) -> dict[str, float]:
    """Retrieval accuracy on the labelled rows, on rank 0; all workers share the features. Nothing without rows."""
    if rows is None:
        return {}
    image_input = ImageInput(config.image_size_px, config.views)
    return measure(state.network.model, rows, image_input, config.evaluation.retrieval, worker.device)


def round_line(finished: int, rounds: int, labels: RoundLabels, metrics: dict[str, float]) -> str:
    """A round in a line."""
    measured = f", mAP {metrics['evaluation/mAP']:.2%}, rank-1 {metrics['evaluation/rank1']:.2%}" if metrics else ""
    notes = "".join(f"\n  {note}" for note in labels.found.notes)
    return f"round {finished + 1} of {rounds}: {health_line(labels.found)}{measured}{notes}"


def load_checkpoint(
    state: USLState,
    config: USLConfig,
    rounds: CheckpointStore,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    source: str,
) -> None:
    """Put a checkpoint back into ``state``, the memory of a round that is under way included.

    Such a round needs its pseudo-labels: without them the checkpoint is as good as damaged.
    """
    centroids_KD = tensors.get("memory.centroids")
    if centroids_KD is not None:
        require_labels(rounds, meta["round"], source)
    state.load(tensors, meta, source)
    if centroids_KD is not None:
        memory = config.memory.build(centroids_KD)
        memory.centroids_KD.copy_(centroids_KD)  # building normalises again, which changes the last bit
        state.memory = memory.to(state.device)
