"""Supervised tuning: labelled crops -> P x K batches -> part-token ViT -> necks -> sum of weighted losses.

The driver: ``run`` and its checks. Settings are in ``finetune_config``, what the workers do in ``finetune_worker``.
Sources: PASS (arXiv:2203.03931), section 4.1; the second stage: Almazan et al., arXiv:1801.05339.
"""

from pathlib import Path

import numpy as np
import ray
from rich.console import Console

from passreid_ray.data.known_sets import check_known_set
from passreid_ray.engines.board import Listener
from passreid_ray.engines.finetune_config import FinetuneConfig
from passreid_ray.engines.finetune_worker import build_losses, image_input, steps_per_epoch, train_worker
from passreid_ray.engines.fit import fit_and_watch
from passreid_ray.engines.labelled_task import LabelledTask, open_labelled_task
from passreid_ray.engines.precheck import check_readable
from passreid_ray.engines.ranking_stage import Mining, MiningTask
from passreid_ray.engines.ray_cluster import connect
from passreid_ray.engines.run_folder import prepare
from passreid_ray.engines.summary import print_summary
from passreid_ray.engines.tuning_config import build_model, check_shares, start_notes, with_start
from passreid_ray.errors import UserError
from passreid_ray.models import ReidModel
from passreid_ray.train.shares import check_shared


def run(config: FinetuneConfig, console: Console | None = None, listener: Listener | None = None) -> Path:
    """Tune as ``config`` says, or continue the run of that name; the folder of the run.

    Every check that needs no cluster comes before Ray starts. ``listener`` is told what is logged.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    config = with_start(config)
    task = open_labelled_task(config.data)
    eval_rows, eval_notes = config.evaluation.open()
    check_settings(config, task)
    model, notes = build_model(config)
    _, dropped = build_losses(config, task, model)
    check_readable(task.rows, config.max_bad_share)
    fingerprint = task.rows.fingerprint()
    for note in prepare(config.run, config, config.must_agree, fingerprint):
        console.print(note)
    connect(config.workers)
    stages = [f"{config.epochs} epochs of {steps_per_epoch(config, task)} steps of {config.batch_size} images"]
    if config.ranking.steps:
        stages.append(f"{config.ranking.steps} steps of {config.ranking.triplets_per_step} triplets")
    console.print(
        f"{len(task.rows)} images of {task.num_persons} people, {', then '.join(stages)}, "
        f"{config.workers.described}, run folder {config.run.folder}"
    )
    console.print(f"losses: {', '.join(f'{weight:g} {name}' for name, weight in config.losses.in_use.items())}")
    console.print(f"start: {notes}{dropped}")
    notes_of_data = task.notes(config.batch_size, config.images_per_identity)
    for note in [*notes_of_data, *check_known_set(task.rows, config.data.kind), *notes_of(config), *eval_notes]:
        console.print(note)
    loop_config = {
        "config": config,
        "task": ray.put(task),
        "rows": ray.put(task.rows),
        "fingerprint": fingerprint,
        "eval_rows": ray.put(eval_rows),
        "checkpoints": config.run.checkpoints,  # made here, where a relative path means what the user meant
        "best": config.best_store,
        "mining": start_mining(config, task, model),
    }
    fit_and_watch(
        train_worker,
        loop_config,
        config.run,
        config.workers,
        console,
        num_rows=len(task.rows),
        max_bad_share=config.max_bad_share,
        job_name="finetune",
        listener=listener,
    )
    print_summary(config.run.folder, console)
    console.print(
        f"checkpoints (best by mAP in best/), metrics.jsonl and TensorBoard events are in {config.run.folder}"
    )
    return config.run.folder


def check_settings(config: FinetuneConfig, task: LabelledTask) -> None:
    """Raise ``UserError`` for settings that do not fit each other or the data."""
    check_shares(config)
    if config.epochs and not config.losses.in_use:
        raise UserError("losses: all weights are 0; give at least one of them a weight, or set epochs=0")
    if not config.epochs and not config.ranking.steps:
        raise UserError("epochs: 0, and ranking.steps too; there is nothing to do")
    if config.losses.average_k.weight and config.losses.average_k.k >= task.num_persons:
        raise UserError(
            f"losses.average_k.k: {config.losses.average_k.k} candidates of {task.num_persons} people; give fewer"
        )
    ranking = config.ranking
    if ranking.steps:
        key, own = "ranking.triplets_per_step", {"micro_batches": ranking.micro_batches}
        check_shared(key, "triplets", ranking.triplets_per_step, config.workers.sizes, **own)
    if ranking.steps and config.feature == "after":
        raise UserError(
            "feature: after the neck, but the ranking loss trains what is before it and leaves the neck as it was; set "
            "feature=before or ranking.steps=0"
        )
    if config.undistorted is not None and config.model is not None and config.model.stem == "ics":
        raise UserError("undistorted: the convolutional stem mixes padding into images; set model.stem=patch")
    if ranking.steps and not (np.bincount(task.labels_N) > 1).any():
        raise UserError("ranking: nobody has two images, so there are no triplets; set ranking.steps=0")


def notes_of(config: FinetuneConfig) -> list[str]:
    """What a user should know of the settings and the start."""
    notes = start_notes(config)
    warmup = config.optimizer.warmup_epochs
    if config.epochs and warmup >= config.epochs:
        notes.append(
            f"the warm-up of {warmup:g} epochs is not shorter than the {config.epochs} of the run, so the learning "
            "rate never falls; set optimizer.warmup_epochs lower"
        )
    return notes


def start_mining(config: FinetuneConfig, task: LabelledTask, model: ReidModel) -> Mining | None:
    """The actor that mines triplets and what it works with; None when there is no stage that needs it."""
    if not config.ranking.steps:
        return None
    mining_task = MiningTask(
        ray.put(task.rows),
        ray.put(task.labels_N),
        ray.put(model),
        image_input(config, model),
        config.ranking,
        config.seed,
        config.evaluation.retrieval.batch_size,
        config.workers.threads_per_worker(),
    )
    return Mining.start(mining_task, config.workers)
