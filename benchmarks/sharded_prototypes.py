"""Loss, gradients and update of one token's prototypes on several ranks: shared out over them against a copy on each.

Run from the repository: ``python -m benchmarks.sharded_prototypes`` (2 gloo ranks of one thread on this machine).
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Cost, cost, cpu_seconds
from passreid_ray.distributed import all_reduce_mean, barrier, rank, world_size
from passreid_ray.losses import become_centered_targets, updated_centers
from passreid_ray.losses.prototype_distillation import prototype_cross_entropy
from passreid_ray.losses.sharded_prototypes import (
    shard_rows,
    sharded_centers,
    sharded_cross_entropy,
    sharded_targets,
)
from tests.ranks import run_on_ranks

WIDTH, PROTOTYPES, GLOBAL, VIEWS = 256, 65_536, 2, 11
STUDENT_TEMP, TEACHER_TEMP, MOMENTUM, LEARNING_RATE = 0.1, 0.04, 0.9, 1e-4
BATCH, RANKS, REPEATS = 8, 2, 5


@dataclass
class Layer:
    """Last layers of student and teacher, their optimiser and center: all rows, or those of a rank."""

    student_SD: Tensor
    teacher_SD: Tensor
    center_S: Tensor
    optimizer: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.AdamW([self.student_SD.requires_grad_()], lr=LEARNING_RATE, fused=True)

    @classmethod
    def of_rows(cls, rows: slice) -> "Layer":
        """Rows of layers that are the same on every rank."""

        def own_rows(seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            shape = rows.stop - rows.start, WIDTH
            for _ in range(rows.start // shape[0]):
                torch.randn(shape, generator=generator)
            return torch.randn(shape, generator=generator)

        return cls(own_rows(0), own_rows(1), torch.zeros(rows.stop - rows.start))


def unit_features(batch: int) -> tuple[Tensor, Tensor]:
    """This rank's bottleneck features: of the student's views, which need a gradient, and of the teacher's."""
    generator = torch.Generator().manual_seed(2 + rank())
    views_VBD = F.normalize(torch.randn(VIEWS, batch, WIDTH, generator=generator), dim=-1)
    return views_VBD.requires_grad_(), F.normalize(views_VBD.detach()[:GLOBAL] + 0.1, dim=-1)


def normalised(weight_SD: Tensor) -> Tensor:
    """Rows of length 1, by one kernel, so that no side pays for a slow formula."""
    return torch._weight_norm(weight_SD, weight_SD.new_ones(len(weight_SD), 1))  # pyright: ignore[reportPrivateImportUsage]


def copied_loss(layer: Layer, features_VBD: Tensor, teacher_GBD: Tensor) -> Tensor:
    """Every rank has all prototypes and its own images; their gradient is averaged."""
    with torch.no_grad():
        logits_GBK = (teacher_GBD @ layer.teacher_SD.T).div_(torch.linalg.vector_norm(layer.teacher_SD, dim=1))
        centers_1K = updated_centers(layer.center_S[None], [logits_GBK], MOMENTUM)
        targets_GBK = become_centered_targets(logits_GBK, layer.center_S, TEACHER_TEMP)
        layer.center_S = centers_1K[0]
    loss = prototype_cross_entropy(features_VBD, layer.student_SD, None, targets_GBK, student_temp=STUDENT_TEMP)
    loss.backward()
    assert layer.student_SD.grad is not None
    if world_size() > 1:
        torch.distributed.all_reduce(layer.student_SD.grad)
        layer.student_SD.grad /= world_size()
    return all_reduce_mean(loss.detach())


def sharded_loss(layer: Layer, features_VBD: Tensor, teacher_GBD: Tensor) -> Tensor:
    """Every rank has its share of the prototypes and all images."""
    with torch.no_grad():
        teacher_SD = normalised(layer.teacher_SD)
        targets_GIS = sharded_targets(teacher_GBD, teacher_SD, layer.center_S, TEACHER_TEMP)
        layer.center_S = sharded_centers(layer.center_S, teacher_GBD, teacher_SD, MOMENTUM)
        del teacher_SD
    loss = sharded_cross_entropy(features_VBD, normalised(layer.student_SD), targets_GIS, student_temp=STUDENT_TEMP)
    loss.backward()
    return loss.detach()


LOSSES: dict[str, Callable[[Layer, Tensor, Tensor], Tensor]] = {"copied": copied_loss, "sharded": sharded_loss}


def update(layer: Layer) -> None:
    """AdamW and the teacher's running mean."""
    layer.optimizer.step()
    with torch.no_grad():
        layer.teacher_SD.lerp_(layer.student_SD, 1 - MOMENTUM)


@dataclass(frozen=True)
class Result:
    """Of one rank."""

    first: Cost
    """From nothing to the end of the first step: layers, moments and all that a step needs."""
    loss_seconds: float
    """Processor seconds of loss and gradients, all that is sent included; the median."""
    update_seconds: float
    wall_seconds: float
    losses: list[float]
    feature_gradient: Tensor
    student_SD: Tensor


def measured(kind: str, batch: int, num_prototypes: int, repeats: int) -> Result:
    """A first step and ``repeats`` more."""
    share = 1 if kind == "copied" else world_size()
    rows = shard_rows(num_prototypes, 0 if kind == "copied" else rank(), share)
    features_VBD, teacher_GBD = unit_features(batch)
    losses, loss_seconds, update_seconds, wall_seconds = [], [], [], []

    def step(layer: Layer) -> None:
        layer.student_SD.grad = features_VBD.grad = None
        barrier()
        took, loss = cost(lambda: LOSSES[kind](layer, features_VBD, teacher_GBD))
        losses.append(loss.item())
        loss_seconds.append(took.cpu_seconds)
        seconds, _ = cpu_seconds(lambda: update(layer))
        update_seconds.append(seconds)
        wall_seconds.append(took.wall_seconds)

    def first_step() -> Layer:
        layer = Layer.of_rows(rows)
        layer.student_SD.grad = features_VBD.grad = None
        losses.append(LOSSES[kind](layer, features_VBD, teacher_GBD).item())
        update(layer)
        return layer

    barrier()
    first, layer = cost(first_step)
    assert features_VBD.grad is not None
    gradient = features_VBD.grad.clone()
    for _ in range(repeats):
        step(layer)
    return Result(
        first,
        statistics.median(loss_seconds),
        statistics.median(update_seconds),
        statistics.median(wall_seconds),
        losses,
        gradient,
        layer.student_SD.detach(),
    )


def largest_difference(copied: list[Result], sharded: list[Result]) -> float:
    """Relative, of the losses, of the features' gradients of the first step and of the student's last rows."""
    # A copy's features get the gradient of the mean over its own images: W times that of the mean over all.
    pairs = [(torch.tensor(own.losses), torch.tensor(other.losses)) for own, other in zip(copied, sharded, strict=True)]
    pairs += [(own.feature_gradient, other.feature_gradient) for own, other in zip(copied, sharded, strict=True)]
    pairs.append((copied[0].student_SD, torch.cat([own.student_SD for own in sharded])))
    return max(((own - other).norm() / own.norm()).item() for own, other in pairs)


def main(batch: int = BATCH) -> None:
    """Print whether both come to the same, then the costs of every rank."""
    results = {kind: run_on_ranks(measured, kind, batch, PROTOTYPES, REPEATS, world_size=RANKS) for kind in LOSSES}
    difference = largest_difference(results["copied"], results["sharded"])
    print(f"{RANKS} ranks, batch {batch} each, {VIEWS} views, {PROTOTYPES} prototypes of width {WIDTH}")
    print(f"relative difference after {1 + REPEATS} steps: at most {difference:.1e}")
    if not difference < 1e-4:
        raise SystemExit("the two do not come to the same")
    for kind, ranks in results.items():
        for number, own in enumerate(ranks):
            print(
                f"{kind:8s} rank {number}: loss and gradients {own.loss_seconds:5.2f} s CPU, {own.wall_seconds:5.2f} s "
                f"wall; update {own.update_seconds:6.3f} s CPU; peak {own.first.peak_bytes / 1e6:5.0f} MB"
            )


if __name__ == "__main__":
    main(*(int(batch) for batch in sys.argv[1:]))
