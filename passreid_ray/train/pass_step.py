"""One optimisation step of PASS: the same for any number of workers and micro-batches."""

# Shape letters: B batch (this worker's), G global views, P parts, L local views per part, T tokens, D width,
# K prototypes, C,H,W image, M views of an image.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from passreid_ray import distributed
from passreid_ray.dtypes import at_least_float32
from passreid_ray.losses import (
    become_centered_targets,
    distillation_diagnostics,
    feature_spread,
    koleo_loss,
    mean_over_pairs,
    sinkhorn_targets,
    updated_centers,
)
from passreid_ray.train.drop_path import drop_path_noise
from passreid_ray.train.ema import Centering, update_teacher
from passreid_ray.train.optimizer import ClipMode, clip_gradients, gradient_norm, gradients_stay_local, set_rates
from passreid_ray.train.pass_rates import PassRates
from passreid_ray.train.pass_state import PassState
from passreid_ray.train.precision import Precision, autocast


@dataclass(frozen=True)
class Views:
    """The views of a batch, normalised, on the device."""

    global_BGCHW: Tensor
    local_BPLCHW: Tensor

    @property
    def per_image(self) -> int:
        """Number of views of an image."""
        return self.global_BGCHW.shape[1] + self.local_BPLCHW.shape[1] * self.local_BPLCHW.shape[2]

    @property
    def pairs_per_token(self) -> list[int]:
        """Pairs of a student view and another, global, teacher view: of CLS, then of each part."""
        num_global, (num_parts, per_part) = self.global_BGCHW.shape[1], self.local_BPLCHW.shape[1:3]
        num_views = [num_global + num_parts * per_part, *[num_global + per_part] * num_parts]
        return [num_global * (views - 1) for views in num_views]

    def __len__(self) -> int:
        return self.global_BGCHW.shape[0]

    def split(self, num: int) -> list["Views"]:
        """``num`` micro-batches of equal size, in order."""
        chunks = zip(self.global_BGCHW.chunk(num), self.local_BPLCHW.chunk(num), strict=True)
        return [Views(*chunk) for chunk in chunks]


@dataclass(frozen=True)
class StepSettings:
    """What is the same in every step."""

    student_temp: float = 0.1
    centering: Centering = "mean"
    token_weights: tuple[float, ...] | None = None
    """Of CLS, then of each part; None: all 1."""
    koleo_weight: float = 0.0
    center_momentum: float = 0.9
    clip_norm: float | None = 3.0
    clip: ClipMode = "per_parameter"
    precision: Precision = "fp32"
    num_micro_batches: int = 1
    seed: int = 0
    head_warmup_steps: int = 0
    """Steps during which only the heads learn: a warm start's backbone waits for them."""


def train_step(
    state: PassState, views: Views, rates: PassRates, settings: StepSettings, *, diagnose: bool = False
) -> dict[str, Tensor]:
    """Do one step on this worker's ``views`` and return its metrics as tensors, averaged over all workers.

    A step whose loss or gradient is not finite changes nothing but the position and the count of such steps.
    ``diagnose`` adds the metrics that cost a pass over all logits. Source: PASS (arXiv:2203.03931), algorithm of
    section 3; the order of operations is the reference code's.
    """
    buffers = [buffer.clone() for buffer in _buffers(state)]
    set_rates(state.optimizer, lr=rates.lr, weight_decay=rates.weight_decay)
    micro_batches = views.split(settings.num_micro_batches)
    teacher = _ask_teacher(state, micro_batches, rates.teacher_temp, settings)
    backbone = state.student.backbone
    noise_L2MB = drop_path_noise(backbone, settings.seed, state.step, len(views), state.device, views.per_image)
    loss_1T, student = _accumulate_gradients(state, micro_batches, teacher.targets, noise_L2MB, settings)

    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state.student.parameters())
    metrics = {"loss": loss_1T[0], "grad_norm": norm, **_named_by_token("loss", loss_1T[1:])}
    if diagnose:
        metrics |= _diagnose(state, student, teacher, settings)
    # The gradient is already the mean over all workers, the loss is not: all must come to the same verdict.
    is_finite = bool(torch.isfinite(metrics["loss"]) & torch.isfinite(norm))
    if is_finite:
        _apply_gradients(state, norm, rates, settings)
        update_teacher(state.teacher, state.student, rates.teacher_momentum)
        state.centers_TK = updated_centers(state.centers_TK, teacher.mean_logits, settings.center_momentum)
    else:
        for buffer, saved in zip(_buffers(state), buffers, strict=True):
            buffer.copy_(saved)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.refused_in_a_row = 0 if is_finite else state.refused_in_a_row + 1
    state.refused_steps += not is_finite
    return metrics


@dataclass(frozen=True)
class _Teacher:
    """What the teacher says of the global views of a batch."""

    targets: list[Tensor]
    """Per token distributions ``(G, B, K)``."""
    mean_logits: list[Tensor]
    """Per token ``(1, 1, K)``, the mean over views and images: what the centers are updated with."""
    features_GBTD: Tensor


@torch.no_grad()
def _ask_teacher(
    state: PassState, micro_batches: Sequence[Views], teacher_temp: float, settings: StepSettings
) -> _Teacher:
    outputs = []
    for views in micro_batches:
        with autocast(settings.precision, state.device):
            outputs.append(state.teacher.bottlenecks(views.global_BGCHW.transpose(0, 1)))
    bottlenecks = [torch.cat(own, dim=1) for own in zip(*(own for own, _ in outputs), strict=True)]
    targets, mean_logits = [], []
    # Token by token, and targets in the memory of their logits: both are as large as a layer of prototypes.
    for own_GBD, prototypes, center_K in zip(
        bottlenecks, state.teacher.head.prototypes(), state.centers_TK, strict=True
    ):
        with autocast(settings.precision, state.device):
            logits_GBK = at_least_float32(prototypes(own_GBD))
        mean_logits.append(logits_GBK.mean(dim=(0, 1), keepdim=True))
        match settings.centering:
            case "mean":
                targets.append(become_centered_targets(logits_GBK, center_K, teacher_temp))
            case "sinkhorn":
                targets += sinkhorn_targets([logits_GBK], teacher_temp)
    return _Teacher(targets, mean_logits, torch.cat([features_GBTD for _, features_GBTD in outputs], dim=1))


def _accumulate_gradients(
    state: PassState,
    micro_batches: Sequence[Views],
    targets: Sequence[Tensor],
    noise_L2MB: Tensor | None,
    settings: StepSettings,
) -> tuple[Tensor, list[Tensor]]:
    """Backward over all micro-batches: ``(1 + T,)`` loss and loss of each token over all workers.

    And the student's bottlenecks of the global views, per token ``(G, B, D)``.
    """
    num = len(micro_batches)
    noises = [None] * num if noise_L2MB is None else noise_L2MB.chunk(num, dim=-1)
    micro_targets = zip(*(target_GBK.chunk(num, dim=1) for target_GBK in targets), strict=True)
    losses, bottlenecks = [], []
    for index, (views, own_targets, noise) in enumerate(zip(micro_batches, micro_targets, noises, strict=True)):
        global_GBCHW, local_PLBCHW = views.global_BGCHW.transpose(0, 1), views.local_BPLCHW.permute(1, 2, 0, 3, 4, 5)
        with gradients_stay_local(state.forward, index < num - 1):
            with autocast(settings.precision, state.device):
                loss_T, features_GBTD, own_bottlenecks = state.forward(
                    global_GBCHW, local_PLBCHW, own_targets, noise, settings.student_temp
                )
            loss = mean_over_pairs(loss_T, _weights_of_tokens(views, settings))
            total = loss
            if settings.koleo_weight > 0:
                koleo = torch.stack([koleo_loss(cls_BD) for cls_BD in features_GBTD[:, :, 0]]).mean()
                total = loss + settings.koleo_weight * koleo
            state.scaler.scale(total / num).backward()
        losses.append(torch.cat([loss[None], loss_T]).detach())
        bottlenecks.append(own_bottlenecks)
    student = [torch.cat(own, dim=1) for own in zip(*bottlenecks, strict=True)]
    return distributed.all_reduce_mean(torch.stack(losses).mean(0)), student


def _weights_of_tokens(views: Views, settings: StepSettings) -> list[float]:
    """What each token's loss counts in the mean: its pairs of views times its own weight."""
    weights = settings.token_weights or (1.0,) * len(views.pairs_per_token)
    return [pairs * weight for pairs, weight in zip(views.pairs_per_token, weights, strict=True)]


def _apply_gradients(state: PassState, norm: Tensor, rates: PassRates, settings: StepSettings) -> None:
    if settings.clip_norm is not None:
        clip_gradients(state.student.parameters(), settings.clip_norm, settings.clip, norm)
    if rates.is_last_layer_frozen:
        _drop_gradients(state.student.head.last_layer_parameters())
    if state.step < settings.head_warmup_steps:
        _drop_gradients(state.student.backbone.parameters())
    state.scaler.step(state.optimizer)


@torch.no_grad()
def _diagnose(
    state: PassState, student: Sequence[Tensor], teacher: _Teacher, settings: StepSettings
) -> dict[str, Tensor]:
    with autocast(settings.precision, state.device):
        rows = zip(state.student.head.prototypes(), student, strict=True)
        logits = [prototypes(own_GBD) for prototypes, own_GBD in rows]
    diagnostics = distillation_diagnostics(logits, teacher.targets, student_temp=settings.student_temp)
    tokens = teacher.features_GBTD.unbind(2)
    std_T = torch.stack([feature_spread(tokens_GBD.flatten(0, 1)) for tokens_GBD in tokens])
    return {
        **_named_by_token("teacher_entropy", diagnostics.teacher_entropy_T),
        **_named_by_token("kl", diagnostics.divergence_T),
        **_named_by_token("feature_std", std_T),
    }


def _named_by_token(name: str, values_T: Tensor) -> dict[str, Tensor]:
    tokens = ["cls", *(f"part{part}" for part in range(len(values_T) - 1))]
    return {f"{name}/{token}": value for token, value in zip(tokens, values_T, strict=True)}


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _buffers(state: PassState) -> list[Tensor]:
    return [*state.student.buffers(), *state.teacher.buffers()]
