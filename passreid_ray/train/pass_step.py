"""One optimisation step of PASS: the same for any number of workers and micro-batches."""

# Shape letters: B batch (this worker's), G global views, P parts, L local views per part, T tokens, D width,
# K prototypes, C,H,W image, M views of an image.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from passreid_ray import distributed
from passreid_ray.losses import (
    centered_targets,
    distillation_diagnostics,
    feature_spread,
    koleo_loss,
    mean_over_pairs,
    part_distillation_terms,
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
    teacher, features_GBTD = _teacher_outputs(state, micro_batches, settings.precision)
    match settings.centering:
        case "mean":
            targets = centered_targets(teacher, state.centers_TK, rates.teacher_temp)
        case "sinkhorn":
            targets = sinkhorn_targets(teacher, rates.teacher_temp)
    backbone = state.student.backbone
    noise_L2MB = drop_path_noise(backbone, settings.seed, state.step, len(views), state.device, views.per_image)
    loss_1T, student = _accumulate_gradients(state, micro_batches, targets, noise_L2MB, settings)

    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state.student.parameters())
    metrics = {"loss": loss_1T[0], "grad_norm": norm, **_named_by_token("loss", loss_1T[1:])}
    if diagnose:
        metrics |= _diagnose(student, targets, features_GBTD, settings.student_temp)
    # The gradient is already the mean over all workers, the loss is not: all must come to the same verdict.
    is_finite = bool(torch.isfinite(metrics["loss"]) & torch.isfinite(norm))
    if is_finite:
        _apply_gradients(state, norm, rates, settings)
        update_teacher(state.teacher, state.student, rates.teacher_momentum)
        state.centers_TK = updated_centers(state.centers_TK, teacher, settings.center_momentum)
    else:
        for buffer, saved in zip(_buffers(state), buffers, strict=True):
            buffer.copy_(saved)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    state.refused_in_a_row = 0 if is_finite else state.refused_in_a_row + 1
    state.refused_steps += not is_finite
    return metrics


@torch.no_grad()
def _teacher_outputs(
    state: PassState, micro_batches: Sequence[Views], precision: Precision
) -> tuple[list[Tensor], Tensor]:
    """The teacher on the global views of the whole batch: logits per token ``(G, B, K)``, features ``(G, B, T, D)``."""
    logits, features = [], []
    for views in micro_batches:
        with autocast(precision, state.device):
            micro_logits, features_GBTD = state.teacher(views.global_BGCHW.transpose(0, 1))
        logits.append(micro_logits)
        features.append(features_GBTD)
    return [torch.cat(own, dim=1) for own in zip(*logits, strict=True)], torch.cat(features, dim=1)


def _accumulate_gradients(
    state: PassState,
    micro_batches: Sequence[Views],
    targets: Sequence[Tensor],
    noise_L2MB: Tensor | None,
    settings: StepSettings,
) -> tuple[Tensor, list[Tensor]]:
    """Backward over all micro-batches: ``(1 + T,)`` loss and loss of each token over all workers, student logits."""
    num = len(micro_batches)
    noises = [None] * num if noise_L2MB is None else noise_L2MB.chunk(num, dim=-1)
    micro_targets = zip(*(target_GBK.chunk(num, dim=1) for target_GBK in targets), strict=True)
    losses, logits = [], []
    for index, (views, own_targets, noise) in enumerate(zip(micro_batches, micro_targets, noises, strict=True)):
        global_GBCHW, local_PLBCHW = views.global_BGCHW.transpose(0, 1), views.local_BPLCHW.permute(1, 2, 0, 3, 4, 5)
        with gradients_stay_local(state.forward, index < num - 1):
            with autocast(settings.precision, state.device):
                student, features_GBTD = state.forward(global_GBCHW, local_PLBCHW, drop_path_noise_L2MB=noise)
            loss_T, num_pairs = part_distillation_terms(student, own_targets, student_temp=settings.student_temp)
            loss = mean_over_pairs(loss_T, num_pairs)
            total = loss
            if settings.koleo_weight > 0:
                koleo = torch.stack([koleo_loss(cls_BD) for cls_BD in features_GBTD[:, :, 0]]).mean()
                total = loss + settings.koleo_weight * koleo
            state.scaler.scale(total / num).backward()
        losses.append(torch.cat([loss[None], loss_T]).detach())
        logits.append([own.detach() for own in student])
    student = [torch.cat(own, dim=1) for own in zip(*logits, strict=True)]
    return distributed.all_reduce_mean(torch.stack(losses).mean(0)), student


def _apply_gradients(state: PassState, norm: Tensor, rates: PassRates, settings: StepSettings) -> None:
    if settings.clip_norm is not None:
        clip_gradients(state.student.parameters(), settings.clip_norm, settings.clip, norm)
    if rates.is_last_layer_frozen:
        _drop_gradients(state.student.head.last_layer_parameters())
    if state.step < settings.head_warmup_steps:
        _drop_gradients(state.student.backbone.parameters())
    state.scaler.step(state.optimizer)


def _diagnose(
    student: Sequence[Tensor], targets: Sequence[Tensor], features_GBTD: Tensor, student_temp: float
) -> dict[str, Tensor]:
    diagnostics = distillation_diagnostics(student, targets, student_temp=student_temp)
    std_T = torch.stack([feature_spread(tokens_GBD.flatten(0, 1)) for tokens_GBD in features_GBTD.unbind(2)])
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
