"""One optimisation step of PASS: the same for any number of workers and micro-batches."""

# Shape letters: B batch (this worker's), G global views, P parts, L local views per part, T tokens, D width,
# K prototypes, C,H,W image, M views of an image.

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from passreid_ray import distributed
from passreid_ray.losses import (
    distillation_diagnostics,
    feature_spread,
    mean_over_pairs,
    part_distillation_terms,
    updated_centers,
)
from passreid_ray.train.ema import update_teacher
from passreid_ray.train.optimizer import ClipMode, clip_gradients, gradient_norm, set_rates
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
    noise_L2MB = drop_path_noise(state, settings.seed, views)
    loss_T, teacher, metrics = _accumulate_gradients(state, views, noise_L2MB, rates, settings, diagnose=diagnose)

    state.scaler.unscale_(state.optimizer)
    norm = gradient_norm(state.student.parameters())
    metrics |= {"grad_norm": norm, **_named_by_token("loss", loss_T[1:])}
    metrics["loss"] = loss_T[0]
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


def drop_path_noise(state: PassState, seed: int, views: Views) -> Tensor | None:
    """Stochastic depth's noise for this worker's images, ``(depth, 2, M, B)``; None when the student has none.

    Drawn for the global batch from the seed and the step alone, so an image meets the same noise on any worker.
    """
    if state.student.backbone.drop_path_rates[-1] == 0:
        return None
    batch, rank = len(views), distributed.rank()
    generator = torch.Generator().manual_seed((seed << 32) + state.step)
    shape = (state.student.backbone.depth, 2, views.per_image, batch * distributed.world_size())
    return torch.rand(shape, generator=generator)[..., rank * batch : (rank + 1) * batch].to(state.device)


def _accumulate_gradients(
    state: PassState,
    views: Views,
    noise_L2MB: Tensor | None,
    rates: PassRates,
    settings: StepSettings,
    *,
    diagnose: bool,
) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    """Backward over all micro-batches: ([loss, loss of each token], teacher logits per token, diagnostics)."""
    num = settings.num_micro_batches
    noises = [None] * num if noise_L2MB is None else noise_L2MB.chunk(num, dim=-1)
    losses, teachers, metrics = [], [], []
    for index, (micro, noise) in enumerate(zip(views.split(num), noises, strict=True)):
        global_GBCHW, local_PLBCHW = micro.global_BGCHW.transpose(0, 1), micro.local_BPLCHW.permute(1, 2, 0, 3, 4, 5)
        with _gradients_stay_local(state.forward, index < num - 1):
            with autocast(settings.precision, state.device):
                with torch.no_grad():
                    teacher, features_GBTD = state.teacher(global_GBCHW)
                student, _ = state.forward(global_GBCHW, local_PLBCHW, drop_path_noise_L2MB=noise)
            loss_T, pairs_T = part_distillation_terms(
                student,
                teacher,
                state.centers_TK,
                student_temp=settings.student_temp,
                teacher_temp=rates.teacher_temp,
            )
            loss = mean_over_pairs(loss_T, pairs_T)
            state.scaler.scale(loss / num).backward()
        losses.append(torch.cat([loss[None], loss_T]).detach())
        teachers.append(teacher)
        if diagnose:
            metrics.append(_diagnose(student, teacher, features_GBTD, state, rates, settings))
    mean = distributed.all_reduce_mean(torch.stack(losses).mean(0))
    teacher = [torch.cat(own, dim=1) for own in zip(*teachers, strict=True)]
    return mean, teacher, {name: torch.stack([m[name] for m in metrics]).mean(0) for name in (metrics or [{}])[0]}


def _apply_gradients(state: PassState, norm: Tensor, rates: PassRates, settings: StepSettings) -> None:
    if settings.clip_norm is not None:
        clip_gradients(state.student.parameters(), settings.clip_norm, settings.clip, norm)
    if rates.is_last_layer_frozen:
        _drop_gradients(state.student.head.last_layer_parameters())
    if state.step < settings.head_warmup_steps:
        _drop_gradients(state.student.backbone.parameters())
    state.scaler.step(state.optimizer)


def _diagnose(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    features_GBTD: Tensor,
    state: PassState,
    rates: PassRates,
    settings: StepSettings,
) -> dict[str, Tensor]:
    diagnostics = distillation_diagnostics(
        student, teacher, state.centers_TK, student_temp=settings.student_temp, teacher_temp=rates.teacher_temp
    )
    std_T = torch.stack([feature_spread(tokens_GBD.flatten(0, 1)) for tokens_GBD in features_GBTD.unbind(2)])
    return {
        **_named_by_token("teacher_entropy", diagnostics.teacher_entropy_T),
        **_named_by_token("kl", diagnostics.divergence_T),
        **_named_by_token("feature_std", std_T),
    }


def _named_by_token(name: str, values_T: Tensor) -> dict[str, Tensor]:
    tokens = ["cls", *(f"part{part}" for part in range(len(values_T) - 1))]
    return {f"{name}/{token}": value for token, value in zip(tokens, values_T, strict=True)}


def _gradients_stay_local(module: nn.Module, apply: bool) -> contextlib.AbstractContextManager[None]:
    return module.no_sync() if apply and isinstance(module, DistributedDataParallel) else contextlib.nullcontext()


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _buffers(state: PassState) -> list[Tensor]:
    return [*state.student.buffers(), *state.teacher.buffers()]
