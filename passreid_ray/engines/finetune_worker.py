"""What each worker of a supervised run does: resume, the epochs of the weighted losses, then the mined triplets.

Reads from top to bottom in the order it runs: ``train_worker``, ``train_epochs``, ``train_ranking``, then what both
stages use. The steps are in ``passreid_ray.train.finetune_step`` and ``ranking_step``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from passreid_ray.data import Rows
from passreid_ray.data.identity_order import IdentityOrder
from passreid_ray.data.read_ahead import read_ahead
from passreid_ray.data.stream import Stream, bad_images
from passreid_ray.data.triplet_order import TripletOrder
from passreid_ray.engines.embedding import ImageInput, TunedFeatures
from passreid_ray.engines.finetune_config import FinetuneConfig
from passreid_ray.engines.labelled_task import LabelledTask
from passreid_ray.engines.ranking_stage import Mining
from passreid_ray.engines.ray_cluster import data_share
from passreid_ray.engines.scoring import measure
from passreid_ray.engines.tuning_config import build_model, start_classifier
from passreid_ray.engines.tuning_worker import MakeView, TuningRun
from passreid_ray.models import ReidModel
from passreid_ray.train.finetune_state import FinetuneNetwork, FinetuneState, average_of
from passreid_ray.train.finetune_step import FinetuneStepSettings, LabelledBatch, finetune_step
from passreid_ray.train.meter import Meter
from passreid_ray.train.orders import Orders
from passreid_ray.train.ranking_step import RankingNetwork, RankingSettings, ranking_step
from passreid_ray.train.shares import num_pieces
from passreid_ray.train.sharing import average_gradients
from passreid_ray.train.supervised_losses import SupervisedLosses
from passreid_ray.train.worker import WorkerContext
from passreid_ray.views import UndistortedView, crop_to_grids, normalize, view_rng


@dataclass(frozen=True)
class MakeUndistortedView:
    """The training view of an image that keeps its shape, as uint8, and its grid of patches."""

    config: FinetuneConfig
    patch_px: int
    end_of_epochs: int
    """The step at which the mined triplets begin."""

    def __call__(self, image_HWC: np.ndarray, draw: int, image_id: str) -> dict[str, np.ndarray]:
        assert self.config.undistorted is not None
        view = UndistortedView(self.config.undistorted, self.config.views.mean_colour, self.patch_px)
        pixels_3HW, grid = view(image_HWC, view_rng(self.config.seed, draw, image_id), self.progress(draw))
        return {"image": pixels_3HW, "grid": np.asarray(grid)}

    def progress(self, draw: int) -> float:
        """How much of the whole run is done at the step that a draw is of, 0 to 1: the cut-out grows with it."""
        config, step = self.config, draw // self.config.batch_size
        if step >= self.end_of_epochs:
            after = draw - self.end_of_epochs * config.batch_size
            step = self.end_of_epochs + after // (3 * config.ranking.triplets_per_step)
        return min(1.0, step / max(1, self.end_of_epochs + config.ranking.steps - 1))


def train_worker(loop_config: dict[str, Any]) -> None:
    """What each worker does: resume, then the epochs, then the mined triplets."""
    config: FinetuneConfig = loop_config["config"]
    threads = config.workers.threads_per_worker()
    worker = WorkerContext.from_ray(loop_config["board"], loop_config["checkpoints"], threads)
    task: LabelledTask = ray.get(loop_config["task"])
    eval_rows: Rows | None = ray.get(loop_config["eval_rows"])
    end_of_epochs = config.epochs * steps_per_epoch(config, task)
    state = build_state(config, task, worker)
    tuning = TuningRun(state, config, worker, loop_config["best"], loop_config["fingerprint"], Orders(worker))
    tuning.resume(partial(load_checkpoint, state, config, end_of_epochs))
    if worker.rank == 0:
        worker.post("start", step=state.step, end_step=end_of_epochs + config.ranking.steps)
    evaluate = partial(evaluate_model, tuning, state, config, eval_rows)
    if state.step == 0:
        evaluate()
    if state.step < end_of_epochs:
        train_epochs(tuning, state, config, task, loop_config["rows"], evaluate)
    mining: Mining | None = loop_config["mining"]
    if mining is not None and state.step < end_of_epochs + config.ranking.steps:
        train_ranking(tuning, state, config, task, mining, evaluate)


def build_state(config: FinetuneConfig, task: LabelledTask, worker: WorkerContext) -> FinetuneState:
    """The state before the first step, the same on every worker."""
    model, _ = build_model(config)
    losses, _ = build_losses(config, task, model)
    model.backbone.use_fused_attention(worker.device.type != "cpu" or config.precision == "fp32")
    network = FinetuneNetwork(model, losses).to(worker.device)
    scaler = GradScaler(worker.device.type, enabled=config.precision == "fp16")
    average = None if config.average_decay is None else average_of(network.model)
    return FinetuneState(network, network, config.optimizer.build(network, model.backbone), scaler, average=average)


def load_checkpoint(
    state: FinetuneState,
    config: FinetuneConfig,
    end_of_epochs: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    source: str,
) -> None:
    """Put a checkpoint back into ``state``; one of the second stage has the optimiser of that stage."""
    if meta["step"] > end_of_epochs:
        state.optimizer = config.ranking.build_optimizer(state.network.model.backbone)
    state.load(tensors, meta, source)


def train_epochs(
    tuning: TuningRun, state: FinetuneState, config: FinetuneConfig, task: LabelledTask, rows: Any, evaluate: Any
) -> None:
    """The epochs of the weighted losses, or those that are left of them."""
    worker, per_epoch = tuning.worker, steps_per_epoch(config, task)
    end = config.epochs * per_epoch
    state.forward = average_gradients(state.network)
    state.network.model.compute_in_pieces(config.pieces_of(worker.world_size))
    order = IdentityOrder(
        task.labels_N, task.rows.camera_ids, config.batch_size, config.images_per_identity, config.seed
    )
    view = make_view(config, task, state.network.model)
    stream = Stream(rows, order, view, worker.rank, worker.world_size)
    settings = step_settings(config)
    meter = Meter(worker, config.batch_size)
    workers = config.workers
    share = data_share(worker.world_size, workers.cpus_per_worker, is_range=workers.is_range)
    batches = stream.batches(state.step, end, share)
    while state.step < end:
        with meter.waiting():
            batch = next(batches)
        worker.post_bad(bad_images(batch))
        lr = config.optimizer.set_lr(state.optimizer, state.step, per_epoch, config.epochs)
        labelled = to_batch(batch, config, task, state)
        metrics = finetune_step(state, labelled, state.step / per_epoch, settings)
        meter.count_step(metrics["loss"])
        if state.step == end or state.step % config.log_every_steps == 0:
            tuning.log(metrics, {"lr": lr, "epoch": state.step / per_epoch}, meter)
        tuning.stop_if_refused()
        epoch, position = divmod(state.step, per_epoch)
        if position == 0 and (state.step == end or epoch % config.evaluation.every_epochs == 0):
            evaluate()
        asked = tuning.orders.after_step(state.step)
        if state.step == end or asked.save or config.run.is_checkpoint_due(state.step, per_epoch):
            tuning.save(is_last=state.step == end and not config.ranking.steps, tell_ray=not asked.ends_group)
        tuning.orders.carry_out(asked)


def train_ranking(
    tuning: TuningRun,
    state: FinetuneState,
    config: FinetuneConfig,
    task: LabelledTask,
    mining: Mining,
    evaluate: Any,
) -> None:
    """Rounds of mining and steps on what was mined, or those that are left of them.

    Checkpoints are taken between rounds only, because a round's triplets depend on the weights it began with.
    """
    worker, ranking, model = tuning.worker, config.ranking, state.network.model
    first = config.epochs * steps_per_epoch(config, task)
    end = first + ranking.steps
    if state.step == first:
        state.optimizer = ranking.build_optimizer(model.backbone)
    state.forward = average_gradients(RankingNetwork(model))
    settings, threads = step_settings(config), config.workers.threads_per_worker()
    parts = num_pieces(ranking.triplets_per_step, worker.world_size, config.workers.world_size, ranking.micro_batches)
    ranking_settings = RankingSettings(ranking.margin, parts)
    view, meter = make_view(config, task, model), Meter(worker, 3 * ranking.triplets_per_step)
    orders = Orders(worker)  # asked once a mining, which takes longer than a step
    while state.step < end:
        round_index, begin = (state.step - first) // ranking.refresh_steps, state.step
        with meter.waiting():
            triplets_T3, mined = mining.mine(model, round_index)
        if mined is not None:
            if mined.bad:
                worker.post("bad", images=mined.bad)
            found = {"ranking/mined_loss": mined.mean_loss, "ranking/random_loss": mined.random_loss}
            worker.post("record", step=state.step + 1, metrics=found)
        first_draw = first * config.batch_size + (begin - first) * 3 * ranking.triplets_per_step
        order = TripletOrder(triplets_T3, task.labels_N, ranking.triplets_per_step, begin, first_draw)
        end_of_round = min(begin + ranking.refresh_steps, end)
        share = {"rank": worker.rank, "world_size": worker.world_size, "threads": threads}
        batches = read_ahead(task.rows, order, begin, end_of_round, view, **share)
        while state.step < end_of_round:
            with meter.waiting():
                batch = next(batches)
            worker.post_bad(bad_images(batch))
            lr = ranking.lr_at(state.step - first)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            labelled = to_batch(batch, config, task, state)
            metrics = ranking_step(state, labelled, settings, ranking_settings)
            meter.count_step(metrics["loss"])
            if state.step == end or state.step % config.log_every_steps == 0:
                tuning.log(metrics, {"lr": lr, "ranking/staleness_steps": state.step - begin}, meter)
        tuning.stop_if_refused("ranking.lr")
        every = ranking.evaluate_every_steps
        if state.step == end or (every is not None and (state.step - first) // every > (begin - first) // every):
            evaluate()
        asked = orders.after_step(state.step)
        if state.step == end or asked.save or (round_index + 1) % ranking.checkpoint_every_minings == 0:
            tuning.save(is_last=state.step == end, tell_ray=not asked.ends_group)
        orders.carry_out(asked)


def step_settings(config: FinetuneConfig) -> FinetuneStepSettings:
    """What is the same in every step."""
    return FinetuneStepSettings(config.precision, config.seed, config.optimizer.clip_norm, config.average_decay or 0.0)


def make_view(config: FinetuneConfig, task: LabelledTask, model: ReidModel) -> MakeView | MakeUndistortedView:
    """What makes the training view of an image."""
    if config.undistorted is None:
        return MakeView(config.views, config.seed)
    return MakeUndistortedView(config, model.backbone.patch_size[0], config.epochs * steps_per_epoch(config, task))


def to_batch(
    batch: Mapping[str, np.ndarray], config: FinetuneConfig, task: LabelledTask, state: FinetuneState
) -> LabelledBatch:
    """A streamed batch as tensors on the device."""
    pixels_BCHW, grids_B2 = torch.from_numpy(batch["image"].copy()), None
    if "grid" in batch:
        grids_B2 = torch.from_numpy(batch["grid"].copy())
        pixels_BCHW = crop_to_grids(pixels_BCHW, grids_B2, state.network.model.backbone.patch_size[0])
    ids_B = torch.from_numpy(task.labels_N[batch["row"]])
    return LabelledBatch(normalize(pixels_BCHW.to(state.device), config.views), ids_B.to(state.device), grids_B2)


def evaluate_model(tuning: TuningRun, state: FinetuneState, config: FinetuneConfig, rows: Rows | None) -> None:
    """Measure the published model on the labelled rows, if there are any, and keep it when it is the best."""
    if rows is None:
        return
    model = TunedFeatures(state.published, config.feature)
    read = image_input(config, state.published)
    metrics = measure(model, rows, read, config.evaluation.retrieval, tuning.worker.device)
    if tuning.worker.rank == 0:
        tuning.worker.post("evaluation", step=state.step, metrics=metrics)
    tuning.keep_best(metrics)


def steps_per_epoch(config: FinetuneConfig, task: LabelledTask) -> int:
    """Steps in which about as many images are seen as there are."""
    return max(1, len(task.rows) // config.batch_size)


def image_input(config: FinetuneConfig, model: ReidModel) -> ImageInput:
    """How images of the pool and of the evaluation are read."""
    patch_px = None if config.undistorted is None else model.backbone.patch_size[0]
    return ImageInput(config.image_size_px, config.views, patch_px)


def build_losses(config: FinetuneConfig, task: LabelledTask, model: ReidModel) -> tuple[SupervisedLosses, str]:
    """The losses with their first classifiers, the same on every worker, and what became of the start's classifier."""
    torch.manual_seed(config.seed + 1)
    losses = SupervisedLosses(config.losses, task.num_persons, model.feature_width)
    path = config.start.checkpoint
    if path is None or config.start.necks == "fresh" or "identity" not in losses.classifiers:
        return losses, ""
    known_CD = start_classifier(path)
    if known_CD is None:
        return losses, "; no classifier in it"
    own_CD = losses.classifiers["identity"]
    if known_CD.shape != own_CD.shape:
        return losses, f"; its classifier of {len(known_CD)} people is left out, the data has {task.num_persons}"
    with torch.no_grad():
        own_CD.copy_(known_CD)
    return losses, "; classifier loaded"
