"""A pre-training step of PASS, ours against the published structure, on the same batch: speed and memory.

Both take a first step from the same weights without stochastic depth and must agree, then they are timed in turns.
Run from the repository: ``python -m benchmarks.pass_step``; ``--help`` lists the settings.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch

from benchmarks.compare import Row, alternate, rows_of, write_result
from benchmarks.literal_pass import (
    LiteralState,
    Sizes,
    crops_of,
    largest_differences,
    literal_state,
    literal_step,
    load_weights,
)
from benchmarks.machine import describe_machine
from benchmarks.measure import cost, in_own_process
from benchmarks.render import table_of
from passreid_ray.data.order import EpochOrder
from passreid_ray.engines.pretrain import PretrainConfig, build_state
from passreid_ray.train.checkpoints import CheckpointStore
from passreid_ray.train.compute_rate import count_flops
from passreid_ray.train.pass_rates import PassRates
from passreid_ray.train.pass_state import PassState
from passreid_ray.train.pass_step import StepSettings, Views, train_step
from passreid_ray.train.precision import Precision
from passreid_ray.train.sharing import average_gradients
from passreid_ray.train.worker import WorkerContext

SIDES = ("published structure", "passreid_ray")
FP32_TOLERANCE = 1e-5
BF16_LOSS_TOLERANCE = 1e-2
READING = (
    "One optimiser step (teacher and student forward, loss, backward, clipping, AdamW, teacher update) on the same "
    "batch, in turns in one process; medians. Times as fast and times less CPU: this row against the first, repeat by "
    "repeat, with the lowest and highest. Share of matmul rate: operations in matrix products, counted from shapes, "
    "over what the machine does in that time on large ones. Peak GB: in a process of its own, imports left out."
)


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    config: PretrainConfig
    device: torch.device
    threads: int

    def rates(self) -> PassRates:
        """Those after the warm-up and the first epoch, when the prototypes learn too."""
        lr = self.config.optimizer.lr * self.config.batch_size / 256
        return PassRates(lr, 0.04, teacher_momentum=0.996, teacher_temp=0.04, is_last_layer_frozen=False)

    def views(self) -> Views:
        """Noise in the shape of a batch; time does not depend on what views show."""
        generator, views = torch.Generator().manual_seed(1), self.config.views
        batch, local = self.config.batch_size, (views.num_parts, views.local_views_per_part)
        global_BGCHW = torch.randn(batch, 2, 3, *views.global_size_px, generator=generator)
        local_BPLCHW = torch.randn(batch, *local, 3, *views.local_size_px, generator=generator)
        return Views(global_BGCHW.to(self.device), local_BPLCHW.to(self.device))

    def changed(self, *, drop_path: float, precision: Precision) -> "Setting":
        """This one with other stochastic depth and precision."""
        model = self.config.model.model_copy(update={"drop_path": drop_path})
        config = self.config.model_copy(update={"model": model, "precision": precision})
        return Setting(config, self.device, self.threads)

    def wait(self) -> None:
        """Return when all that the device was told is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def our_state(setting: Setting) -> tuple[PassState, StepSettings]:
    """The state and the settings with which a worker of a pre-training run would start."""
    # No run: nothing is told to a driver and nothing saved.
    worker = WorkerContext(0, 1, setting.device, board=None, checkpoints=cast(CheckpointStore, None))
    order = EpochOrder(10 * setting.config.batch_size, setting.config.batch_size, setting.config.seed)
    state, settings = build_state(setting.config, order, worker)
    state.forward = average_gradients(state.forward)
    return state, settings


def both_states(setting: Setting) -> tuple[PassState, StepSettings, LiteralState]:
    """Ours and the literal one with the same weights."""
    state, settings = our_state(setting)
    dtype = next(state.student.parameters()).dtype
    literal = literal_state(Sizes.of(state.student), setting.device, dtype)
    load_weights(literal, state.student.state_dict(), state.teacher.state_dict())
    return state, settings, literal


def check_equal(setting: Setting) -> dict[str, float]:
    """Operations in matrix products of a step, by side, both of which take one and must agree.

    Raises:
        AssertionError: they differ by more than rounding: in fp32 all tensors, in bf16 the loss.
    """
    state, settings, literal = both_states(setting)
    _perturb(state)
    load_weights(literal, state.student.state_dict(), state.teacher.state_dict())
    views, rates, precision = setting.views(), setting.rates(), setting.config.precision
    losses: list[float] = []
    steps: list[Callable[[], float]] = [
        lambda: literal_step(literal, crops_of(views), rates, precision=precision),
        lambda: float(train_step(state, views, rates, settings)["loss"]),
    ]
    flops = [float(count_flops(lambda step=step: losses.append(step()))) for step in steps]
    literal_loss, our_loss = losses
    found = {"loss": abs(our_loss - literal_loss) / abs(literal_loss)}
    tolerance = BF16_LOSS_TOLERANCE
    if precision == "fp32":
        found, tolerance = found | largest_differences(state, literal), FP32_TOLERANCE
    print(f"{precision}, relative differences after a step: " + ", ".join(f"{k} {v:.1e}" for k, v in found.items()))
    for what, difference in found.items():
        if not difference <= tolerance:
            raise AssertionError(f"{what} differs by {difference:.1e}, more than {tolerance}; both took the same step")
    return dict(zip(SIDES, flops, strict=True))


def measured_rows(setting: Setting, repeats: int) -> tuple[list[Row], Sizes]:
    """The timings as rows, and the model's sizes."""
    state, settings, literal = both_states(setting)
    views, rates = setting.views(), setting.rates()
    steps = _literal_call(literal, views, setting), lambda: train_step(state, views, rates, settings)
    timings = alternate(dict(zip(SIDES, steps, strict=True)), repeats, wait=setting.wait)
    return rows_of(timings, setting.config.batch_size), Sizes.of(state.student)


def peak_bytes(setting: Setting, side: str, sizes: Sizes) -> int:
    """The most memory that building ``side`` and two steps take, of the device. For a process of its own."""
    torch.set_num_threads(setting.threads)

    def two_steps() -> None:
        views, rates = setting.views(), setting.rates()
        if side == SIDES[0]:
            call = _literal_call(literal_state(sizes, setting.device), views, setting)
        else:
            state, settings = our_state(setting)

            def call() -> object:
                return train_step(state, views, rates, settings)

        call()
        call()  # the first one ends with more than it began with: what AdamW keeps

    if setting.device.type == "cuda":
        two_steps()
        return torch.cuda.max_memory_allocated(setting.device)
    return cost(two_steps)[0].peak_bytes


def main(arguments: list[str] | None = None) -> None:
    """Check, measure, print and keep the result."""
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    config = PretrainConfig.model_validate(
        {
            "batch_size": options.batch,
            "precision": options.precision,
            "checkpoint_activations": options.checkpoint_activations,
            # As published: positions are resampled at every size.
            "model": {"trunk": options.trunk, "drop_path": options.drop_path, "official_pos_resize": True},
            "head": {"num_prototypes": options.prototypes},
        }
    )
    setting = Setting(config, device, options.threads)
    operations = check_equal(setting.changed(drop_path=0.0, precision="fp32"))
    if config.precision != "fp32":
        check_equal(setting.changed(drop_path=0.0, precision=config.precision))
    rows, sizes = measured_rows(setting, options.repeats)
    machine = describe_machine(device)
    print(machine)
    for row, side in zip(rows, SIDES, strict=True):
        gflop = operations[side] / 1e9
        rate = machine.matmul_gflops[config.precision]
        row["GFLOP/image"] = gflop / options.batch
        row["share of matmul rate"] = gflop / cast(float, row["wall s"]) / rate
        if device.type == "cpu":  # the better measure where other processes run too
            row["... by CPU time"] = gflop / cast(float, row["CPU s"]) / (rate / options.threads)
        row["peak GB"] = None
        if not options.no_memory:
            row["peak GB"] = in_own_process(peak_bytes, setting, side, sizes) / 1e9
    print(table_of(rows))
    name = options.name or f"pass_step_{device.type}_{config.precision}"
    kept = (
        "batch",
        "trunk",
        "prototypes",
        "drop_path",
        "precision",
        "checkpoint_activations",
        "device",
        "threads",
        "repeats",
    )
    path = write_result(name, machine, {own: getattr(options, own) for own in kept}, rows, reading=READING)
    print(f"wrote {path}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--batch", type=int, default=8, help="images of a step")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads that compute")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--trunk", default="vit_small_patch16_224", help="name of a timm ViT")
    parser.add_argument("--prototypes", type=int, default=65536)
    parser.add_argument("--drop-path", type=float, default=0.1)
    parser.add_argument("--checkpoint-activations", action="store_true", help="on our side: less memory, more time")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each side")
    parser.add_argument("--no-memory", action="store_true", help="leave peak memory out, which needs four more steps")
    parser.add_argument("--name", help="of the result; by default from device and precision")
    return parser.parse_args(arguments)


def _literal_call(literal: LiteralState, views: Views, setting: Setting) -> Callable[[], object]:
    crops, rates, precision = crops_of(views), setting.rates(), setting.config.precision
    return lambda: literal_step(literal, crops, rates, precision=precision)


@torch.no_grad()
def _perturb(state: PassState) -> None:
    # A fresh teacher equals its student, and a bias of zero is all step: AdamW's first one is the learning rate times
    # the gradient's sign, so where a gradient is zero but for rounding two equal computations part.
    generator = torch.Generator().manual_seed(2)
    for model in (state.student, state.teacher):
        for name, own in model.named_parameters():
            if not name.endswith("weight_g"):
                own.add_(0.02 * torch.randn(own.shape, generator=generator).to(own))


if __name__ == "__main__":
    main()
