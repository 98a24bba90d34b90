"""PASS pre-training: unlabelled crops -> part views -> student and teacher -> part distillation loss.

Reads from top to bottom in the order it runs: settings, ``run`` (driver), ``train_worker``; the step itself is
``passreid_ray.train.pass_step.train_step``. Source: PASS (arXiv:2203.03931).
"""

import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import ray
import torch
from pydantic import Field
from rich.console import Console

from passreid_ray.config import Section
from passreid_ray.data import Rows, Source, SyntheticSource, open_rows
from passreid_ray.data.order import EpochwiseOrder, first_step
from passreid_ray.data.stream import EncodedStream
from passreid_ray.data.streamed_order import OrderConfig
from passreid_ray.distributed import gathered, is_sharded
from passreid_ray.engines.board import Listener
from passreid_ray.engines.embedding import FusedViT, ImageInput, read_images
from passreid_ray.engines.fit import fit_and_watch, refusal
from passreid_ray.engines.precheck import check_patches, check_readable
from passreid_ray.engines.ray_cluster import WorkersConfig, connect, data_share
from passreid_ray.engines.run_folder import RunConfig, check_same_data, prepare
from passreid_ray.engines.scoring import LabelledData, measure
from passreid_ray.engines.summary import print_summary
from passreid_ray.engines.warm_start import WarmStartConfig, warm_start
from passreid_ray.errors import UserError
from passreid_ray.losses import collapse
from passreid_ray.models import load_backbone
from passreid_ray.models.config import HeadConfig, ModelConfig, build_pass_model
from passreid_ray.models.part_vit import PartViT
from passreid_ray.models.pass_model import PassModel
from passreid_ray.train.compiled import Compile, TrunkCall, compile_blocks
from passreid_ray.train.ema import TeacherConfig
from passreid_ray.train.meter import Meter
from passreid_ray.train.optimizer import OptimizerConfig
from passreid_ray.train.orders import Orders
from passreid_ray.train.pass_rates import PassRates, PassSchedule
from passreid_ray.train.pass_state import PassState, new_state
from passreid_ray.train.pass_step import StepSettings, Views, train_step
from passreid_ray.train.patch_masks import MaskedPatchConfig
from passreid_ray.train.precision import Precision
from passreid_ray.train.sharded_files import save_pieces
from passreid_ray.train.shares import check_shared, num_pieces
from passreid_ray.train.sharing import SharingConfig, average_gradients, check_sharing
from passreid_ray.train.state_files import load_state, save_state, tensors_below
from passreid_ray.train.view_loader import LoaderConfig, ViewBatch, ViewMaker
from passreid_ray.train.worker import WorkerContext
from passreid_ray.views import PixelStatistics, ViewsConfig, normalize
from passreid_ray.viz.attention import attention_picture

NUM_PICTURED = 8
NonNegative = Annotated[float, Field(ge=0)]


class EvaluationConfig(LabelledData):
    """Retrieval on a labelled data set during training, with the teacher."""

    every_epochs: int = Field(default=10, ge=1)
    """Epochs between evaluations; the start and the end are always evaluated."""


class PretrainConfig(Section):
    """Everything a pre-training run is made of."""

    run: RunConfig = RunConfig()
    seed: int = Field(default=0, ge=0)
    """Decides views, order, initial weights, stochastic depth and masks."""
    epochs: int = Field(default=100, ge=1)
    """Passes over the data."""
    batch_size: int = Field(default=64, ge=1)
    """Images per step, over all workers together."""
    micro_batches: int = Field(default=1, ge=1)
    """Gradient accumulation: parts in which each worker computes its share of a batch, to save memory."""
    checkpoint_activations: bool = False
    """Keep only each block's input for backward, to save memory; the student's blocks are then computed twice."""
    compile: Compile = "off"
    """Compile the blocks of student and teacher when a run starts: "blocks", or "cuda_graphs" to replay them as CUDA
    graphs too. Without a compiler, or a GPU for CUDA graphs, the run says why and goes on as with "off"."""
    precision: Precision = "fp32"
    """Type in which models compute; weights stay fp32."""
    student_temp: float = Field(default=0.1, gt=0)
    """Temperature of the student."""
    token_weights: list[NonNegative] | None = None
    """Weights of the loss of each token, CLS first, then the parts; none: all 1, as in PASS."""
    koleo_weight: float = Field(default=0.0, ge=0)
    """Weight of the KoLeo loss, which spreads the student's CLS features (DINOv2); PASS has none."""
    masked_patch: MaskedPatchConfig = MaskedPatchConfig()
    log_every_steps: int = Field(default=10, ge=1)
    """Steps between records in metrics.jsonl and TensorBoard."""
    max_refused_in_a_row: int = Field(default=20, ge=1)
    """Stop after this many steps in a row whose loss or gradient was not finite."""
    data: Source = SyntheticSource()
    """Crops to learn from; labels are not used."""
    max_bad_share: float = Field(default=0.05, ge=0, le=1)
    """Stop when more than this share of the images cannot be used."""
    order: OrderConfig = OrderConfig()
    loader: LoaderConfig = LoaderConfig()
    sharing: SharingConfig = SharingConfig()
    views: ViewsConfig = ViewsConfig()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    teacher: TeacherConfig = TeacherConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    workers: WorkersConfig = WorkersConfig()

    def epoch_order(self, rows: Rows) -> EpochwiseOrder:
        """The order of ``rows``; raises ``UserError`` when batches cannot be shared out or filled."""
        sizes = self.workers.sizes
        check_shared("batch_size", "images", self.batch_size, sizes, micro_batches=self.micro_batches)
        if len(sizes) > 1 and self.micro_batches > 1 and (what := self.looks_at_micro_batches) is not None:
            raise UserError(
                f"micro_batches: {self.micro_batches}, and {what} looks at all images of a micro-batch together, so "
                f"the result would depend on how many of {self.workers.described} there are; set micro_batches=1, or "
                "one number for workers.num_workers"
            )
        sharing = {"batch_size": self.batch_size, "seed": self.seed}
        orders = [self.order.build(rows.group_starts, len(rows), **sharing, num_workers=size) for size in sizes]
        return orders[0]  # the same for every number

    @property
    def looks_at_micro_batches(self) -> str | None:
        """The setting whose result depends on which images are computed together; None where there is none."""
        if self.koleo_weight > 0:
            return "koleo_weight"
        return "model.stem=ics" if self.model.stem == "ics" else None

    def micro_batches_of(self, world_size: int) -> int:
        """Parts in which each of ``world_size`` workers computes its share: of fewer than the most workers more, so
        that memory does not grow; but not where the result would depend on it."""
        if len(self.workers.sizes) == 1 or self.looks_at_micro_batches is not None:
            return self.micro_batches
        return num_pieces(self.batch_size, world_size, self.workers.world_size, self.micro_batches)

    def weight_of_each_token(self) -> tuple[float, ...] | None:
        """``token_weights``; raises ``UserError`` unless there is one of each token and one above 0."""
        num_tokens = 1 + self.views.num_parts
        weights = self.token_weights
        if weights is not None and (len(weights) != num_tokens or not any(weights)):
            raise UserError(
                f"token_weights: expected {num_tokens} weights, of CLS and {self.views.num_parts} parts, one of them "
                f"above 0; got {weights}"
            )
        return None if weights is None else tuple(weights)

    def schedule(self, order: EpochwiseOrder) -> PassSchedule:
        """The schedules of this run."""
        return PassSchedule(self.optimizer, self.teacher, self.batch_size, self.epochs, order.steps_per_epoch)


# Settings that decide what the steps so far have done to the weights' shapes and to the order of the data.
MUST_AGREE = ("seed", "batch_size", "order.", "views.", "model.", "head.", "masked_patch.")


def run(config: PretrainConfig, console: Console | None = None, listener: Listener | None = None) -> Path:
    """Pre-train as ``config`` says, or continue the run of that name; the folder of the run.

    Every check that needs no cluster comes before Ray starts. ``listener`` is told what is logged.
    """
    console = console or Console(highlight=False, soft_wrap=True)
    rows = open_rows(config.data)
    eval_rows, eval_notes = config.evaluation.open()
    order = config.epoch_order(rows)
    config.weight_of_each_token()
    check_model(config)
    check_readable(rows, config.max_bad_share)
    fingerprint = rows.fingerprint()
    for note in prepare(config.run, config, MUST_AGREE, fingerprint):
        console.print(note)
    connect(config.workers)
    console.print(
        f"{len(rows)} images, {config.epochs} epochs of {float(order.steps_per_epoch):.10g} steps of "
        f"{config.batch_size} images, {config.workers.described}, run folder {config.run.folder}"
    )
    for note in [*eval_notes, *memory_notes(config)]:
        console.print(note)
    loop_config = {
        "config": config,
        "rows": ray.put(rows),
        "order": order,
        "fingerprint": fingerprint,
        "eval_rows": ray.put(eval_rows),
        "checkpoints": config.run.checkpoints,  # made here, where a relative path means what the user meant
    }
    fit_and_watch(
        train_worker,
        loop_config,
        config.run,
        config.workers,
        console,
        num_rows=len(rows),
        max_bad_share=config.max_bad_share,
        job_name="pretrain",
        listener=listener,
    )
    write_pictures(config, eval_rows or rows)
    print_summary(config.run.folder, console)
    console.print(f"checkpoints, metrics.jsonl, attention.png and TensorBoard events are in {config.run.folder}")
    return config.run.folder


def check_model(config: PretrainConfig) -> None:
    """Build a student with its first weights: what cannot be built, shared or loaded is told before Ray starts."""
    hides_patches = config.masked_patch.weight > 0
    for num_workers in config.workers.sizes:
        check_sharing(
            config.sharing.strategy,
            config.head.num_prototypes,
            num_workers,
            config.precision,
            hides_patches=hides_patches,
        )
    student = build_network(config)
    check_patches(student.backbone.patch_size, {"views.local_size_px": config.views.local_size_px})
    check_compile(config)
    warm_start(student, config.warm_start)


def memory_notes(config: PretrainConfig) -> list[str]:
    """Where fewer workers of a range need more memory each, in words."""
    what, sizes = config.looks_at_micro_batches, config.workers.sizes
    if what is None or len(sizes) == 1:
        return []
    return [
        f"{what} looks at all images of a batch together: {sizes[0]} worker(s) compute {config.batch_size // sizes[0]} "
        f"images at once and need the memory for them, {sizes[-1]} workers {config.batch_size // sizes[-1]} each"
    ]


def check_compile(config: PretrainConfig) -> None:
    """Raise ``UserError`` when the settings rule out what ``compile`` asks for."""
    if config.compile != "off" and config.sharing.strategy == "fsdp" and config.workers.world_size > 1:
        # The trial runs of blocks would gather their pieces: a rank that fails would leave the others waiting.
        raise UserError(
            f'compile: "{config.compile}" does not go with sharing.strategy = "fsdp"; set compile=off, or '
            "sharing.strategy=sharded_prototypes"
        )
    if config.compile != "cuda_graphs":
        return
    if config.workers.use_gpu is False:
        raise UserError('compile: "cuda_graphs" needs GPUs and workers.use_gpu is false; take "blocks", or give GPUs')
    if config.checkpoint_activations:
        # pytorch issue 154306: memory that is freed while a graph is recorded is still in use when it is replayed.
        raise UserError('compile: "cuda_graphs" does not go with checkpoint_activations=true; take "blocks"')


def build_network(config: PretrainConfig, *, is_teacher: bool = False) -> PassModel:
    """A randomly initialised student or teacher of this run."""
    return build_pass_model(
        config.model,
        config.head,
        config.views.global_size_px,
        config.views.num_parts,
        patch_prototypes=config.masked_patch.head_prototypes,
        is_teacher=is_teacher,
    )


def train_worker(loop_config: dict[str, Any]) -> None:
    """What each worker does: resume, then step through its slice of every global batch."""
    config: PretrainConfig = loop_config["config"]
    threads = config.workers.threads_per_worker()
    worker = WorkerContext.from_ray(loop_config["board"], loop_config["checkpoints"], threads)
    order: EpochwiseOrder = loop_config["order"]
    schedule = config.schedule(order)
    state, settings = build_state(config, order, worker)
    worker.resume(partial(load_checkpoint, state, loop_config["fingerprint"]))
    compiled = compile_trunks(state, config, worker.world_size)
    if compiled and worker.rank == 0:
        worker.post("say", text=compiled)
    state.forward = average_gradients(state.forward, config.sharing)
    evaluate = partial(evaluate_teacher, state, config, ray.get(loop_config["eval_rows"]), worker)
    save = partial(save_checkpoint, state, config, loop_config["fingerprint"])
    if worker.rank == 0:
        worker.post("start", step=state.step, end_step=schedule.steps)
    if state.step == 0:
        evaluate()
    stream = EncodedStream(loop_config["rows"], order, worker.rank, worker.world_size)
    maker = ViewMaker(ray.get(loop_config["rows"]), order, config.views, config.seed, worker.device)
    workers = config.workers
    share = data_share(worker.world_size, workers.cpus_per_worker, is_range=workers.is_range)
    encoded = stream.batches(state.step, schedule.steps, share)
    batches = maker.batches(encoded, config.loader.threads)
    meter, orders = Meter(worker, config.batch_size), Orders(worker)
    while state.step < schedule.steps:
        with meter.waiting():
            batch = next(batches)
        worker.post_bad(batch.bad)
        rates = schedule.at(state.step)
        is_last = state.step + 1 == schedule.steps
        is_logged = is_last or (state.step + 1) % config.log_every_steps == 0
        metrics = train_step(state, to_views(batch, config.views), rates, settings, diagnose=is_logged)
        meter.count_step(metrics["loss"])
        if is_logged:
            log_step(state, metrics, rates, meter, config, worker)
        if state.refused_in_a_row >= config.max_refused_in_a_row:
            worker.report(state.step, save, config.run.keep, together=state.is_sharded)
            raise UserError(refusal(state.step, state.refused_in_a_row, config.run.folder))
        epoch = state.step // order.steps_per_epoch
        is_epoch_end = first_step(epoch, order.steps_per_epoch) == state.step
        if is_last or (is_epoch_end and epoch % config.evaluation.every_epochs == 0):
            evaluate()
        asked = orders.after_step(state.step)
        if is_last or asked.save or config.run.is_checkpoint_due(state.step, order.steps_per_epoch):
            worker.report(
                state.step,
                save,
                config.run.keep,
                together=state.is_sharded,
                is_last=is_last,
                tell_ray=not asked.ends_group,
            )
        orders.carry_out(asked)


def build_state(config: PretrainConfig, order: EpochwiseOrder, worker: WorkerContext) -> tuple[PassState, StepSettings]:
    """The state before the first step, the same on every worker, and the settings of all steps."""
    torch.manual_seed(config.seed)
    student, teacher = build_network(config), build_network(config, is_teacher=True)
    # A run that continues brings its own weights, but must know how long its heads were to learn alone.
    head_warmup_epochs, loaded = warm_start(student, config.warm_start)
    if loaded and worker.rank == 0:
        worker.post("say", text=f"warm start: {loaded}")
    settings = StepSettings(
        student_temp=config.student_temp,
        centering=config.teacher.centering,
        token_weights=config.weight_of_each_token(),
        koleo_weight=config.koleo_weight,
        masked_patch=config.masked_patch,
        center_momentum=config.teacher.center_momentum,
        clip_norm=config.optimizer.clip_norm,
        clip=config.optimizer.clip,
        precision=config.precision,
        num_micro_batches=config.micro_batches_of(worker.world_size),
        seed=config.seed,
        head_warmup_steps=round(head_warmup_epochs * order.steps_per_epoch),
    )
    for network in (student, teacher):
        network.backbone.use_fused_attention(worker.device.type != "cpu" or config.precision == "fp32")
    student.backbone.use_activation_checkpointing(config.checkpoint_activations)
    fp16 = config.precision == "fp16"
    strategy = config.sharing.strategy
    return new_state(
        student, teacher, config.head.num_prototypes, worker.device, fp16=fp16, strategy=strategy
    ), settings


def compile_trunks(state: PassState, config: PretrainConfig, world_size: int) -> str:
    """Compile student and teacher for the steps of ``config``, before DDP wraps them; what came of it, in words.

    Empty when the settings ask for nothing. Every rank must call this.
    """
    if config.compile == "off":
        return ""
    start, views, student = time.perf_counter(), config.views, state.student.backbone
    images = config.batch_size // (world_size * config.micro_batches_of(world_size))
    num_local = views.num_parts * views.local_views_per_part
    calls = (
        TrunkCall.of_views(student, 2 * images, views.global_size_px, student.num_tokens),
        TrunkCall.of_views(student, num_local * images, views.local_size_px, 2),
    )
    reason = compile_blocks(student, state.teacher.backbone, *calls, config.compile, config.precision)
    if reason is None:
        return f"compiled the blocks of student and teacher in {time.perf_counter() - start:.0f} s"
    return f"compile={config.compile} cannot be had, going on without: {reason}"


def to_views(batch: ViewBatch, config: ViewsConfig) -> Views:
    """The uint8 views, normalised."""
    return Views(normalize(batch.global_BGCHW, config), normalize(batch.local_BPLCHW, config))


def log_step(
    state: PassState,
    metrics: dict[str, torch.Tensor],
    rates: PassRates,
    meter: Meter,
    config: PretrainConfig,
    worker: WorkerContext,
) -> None:
    """Send the record of an interval to the driver, and say so when the teacher has collapsed."""
    interval = meter.read()
    if worker.rank != 0:
        return  # one asks for all: the board is one actor, and many askers would wait for it
    worker.stop_if_told()
    values = {name: float(value) for name, value in metrics.items() if name != "loss"} | interval
    rate_values = {name: float(value) for name, value in asdict(rates).items()}
    worker.post("metrics", step=state.step, metrics={**values, **rate_values, "refused_steps": state.refused_steps})
    verdict = collapse(values["teacher_entropy/cls"], config.head.num_prototypes)
    if verdict is not None:
        worker.post("collapse", step=state.step, text=verdict)


def evaluate_teacher(state: PassState, config: PretrainConfig, rows: Rows | None, worker: WorkerContext) -> None:
    """Retrieval accuracy of the teacher on the labelled rows; all workers share the features."""
    if rows is None:
        return
    metrics = measure(
        FusedViT(teacher_backbone(state, config), config.evaluation.retrieval.fusion),
        rows,
        ImageInput(config.views.global_size_px, config.views),
        config.evaluation.retrieval,
        worker.device,
    )
    if worker.rank == 0:
        worker.post("evaluation", step=state.step, metrics=metrics)


def teacher_backbone(state: PassState, config: PretrainConfig) -> PartViT:
    """The teacher's backbone, whole on every worker: of weights in pieces a copy that lives as long as it is used.

    In pieces, every forward would be a collective, and workers have different numbers of images to look at.
    """
    pieces = state.teacher.backbone.state_dict()
    if not any(map(is_sharded, pieces.values())):
        return state.teacher.backbone
    whole = config.model.build(config.views.global_size_px, config.views.num_parts, drop_path=0.0)
    whole.load_state_dict({name: gathered(own) for name, own in pieces.items()})
    return whole.eval().to(state.device)


def save_checkpoint(state: PassState, config: PretrainConfig, fingerprint: str, folder: Path) -> None:
    """Write ``state`` and what is needed to check that a continued run is the same one."""
    meta = {**state.meta(), "config": config.model_dump(mode="json"), "fingerprint": fingerprint}
    (save_pieces if state.is_sharded else save_state)(folder, state.tensors(), meta)


def load_checkpoint(state: PassState, fingerprint: str, folder: Path) -> None:
    """Put the checkpoint in ``folder`` back into ``state``; ``UserError`` when it is of other data or damaged."""
    tensors, meta = load_state(folder)
    check_same_data(meta, fingerprint, str(folder))
    state.load(tensors, meta, str(folder))


def write_pictures(config: PretrainConfig, rows: Rows) -> None:
    """``attention.png``: where the teacher's CLS and part tokens look, on a few crops."""
    model = config.model.build(config.views.global_size_px, config.views.num_parts, drop_path=0.0).eval()
    config.run.checkpoints.read(config.run.checkpoints.names()[-1], lambda folder: load_teacher(model, folder))
    numbers = np.linspace(0, len(rows) - 1, num=min(NUM_PICTURED, len(rows)), dtype=int)
    read = read_images(rows, numbers, ImageInput(config.views.global_size_px, config.views))
    usable = np.flatnonzero(~np.isin(rows.image_ids[numbers].astype(str), [image_id for image_id, _ in read.bad]))
    with torch.inference_mode():
        maps = model.attention_maps(read.images_BCHW[usable])
    pixels = PixelStatistics(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    shown = read_images(rows, numbers[usable], ImageInput(config.views.global_size_px, pixels))
    attention_picture(shown.images_BCHW, maps, config.run.folder / "attention.png")


def load_teacher(model: PartViT, folder: Path) -> None:
    """Copy the teacher's backbone in the checkpoint ``folder`` into ``model``."""
    tensors, _ = load_state(folder)
    load_backbone(model, tensors_below(tensors, "teacher.backbone."))
