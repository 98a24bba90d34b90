"""One optimisation step of PASS: the same for any number of workers and micro-batches."""

# Shape letters: B batch (this worker's), G global views, P parts, L local views per part, T tokens, D width,
# K prototypes, C,H,W image, M views of an image, N masked patches.

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from passreid_ray import distributed
from passreid_ray.distributed import local_part
from passreid_ray.dtypes import at_least_float32
from passreid_ray.losses import (
    become_centered_targets,
    distillation_diagnostics,
    feature_spread,
    koleo_loss,
    masked_patch_entropy,
    mean_over_pairs,
    sinkhorn_targets,
    updated_centers,
)
from passreid_ray.train.drop_path import drop_path_noise
from passreid_ray.train.ema import Centering, update_teacher
from passreid_ray.train.optimizer import ClipMode, clip_gradients, gradient_norms, gradients_stay_local, set_rates
from passreid_ray.train.pass_prototypes import (
    in_micro_batches,
    logits_of_own_images,
    targets_of_own_images,
    token_targets,
)
from passreid_ray.train.pass_rates import PassRates
from passreid_ray.train.pass_state import PassState
from passreid_ray.train.pass_student import HiddenPatches
from passreid_ray.train.patch_masks import MaskedPatchConfig, PatchMasks, draw_patch_masks
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
    masked_patch: MaskedPatchConfig = field(default_factory=MaskedPatchConfig)
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
    masks = _draw_masks(state, views, settings) if settings.masked_patch.weight > 0 else None
    teacher = _ask_teacher(state, micro_batches, masks, rates.teacher_temp, settings)
    backbone = state.student.backbone
    noise_L2MB = drop_path_noise(backbone, settings.seed, state.step, len(views), state.device, views.per_image)
    loss_1T, student, patch_loss = _accumulate_gradients(state, micro_batches, teacher, noise_L2MB, settings)

    state.scaler.unscale_(state.optimizer)
    norms_N = gradient_norms(state.student.parameters())
    norm = torch.linalg.vector_norm(norms_N)
    metrics = {"loss": loss_1T[0], "grad_norm": norm, **_named_by_token("loss", loss_1T[1:])}
    if patch_loss is not None:
        metrics["loss/patches"] = patch_loss
    if diagnose:
        metrics |= _diagnose(state, student, teacher, settings)
        metrics |= _diagnose_patches(teacher.hidden, patch_loss)
    # The gradient is already the mean over all workers, the loss is not: all must come to the same verdict.
    is_finite = bool(torch.isfinite(metrics["loss"]) & torch.isfinite(norm))
    if is_finite:
        _apply_gradients(state, norms_N, rates, settings)
        update_teacher(state.teacher, state.student, rates.teacher_momentum)
        local_part(state.centers_TK).copy_(teacher.centers)
        if state.patch_centers_1K is not None and teacher.patch_logits is not None:
            state.patch_centers_1K = updated_centers(
                state.patch_centers_1K, [teacher.patch_logits], settings.center_momentum
            )
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
    """Per token distributions, see ``token_targets``."""
    centers: Tensor
    """What this rank's part of the centers is after this step."""
    features_GBTD: Tensor
    hidden: list[HiddenPatches]
    """Of each micro-batch; empty without the masked-patch loss."""
    patch_logits: Tensor | None
    """``(1, 1, K)``, whose mean over workers is that of all masked patches: what their centers are updated with."""


@torch.no_grad()
def _ask_teacher(
    state: PassState,
    micro_batches: Sequence[Views],
    masks: PatchMasks | None,
    teacher_temp: float,
    settings: StepSettings,
) -> _Teacher:
    outputs = []
    for index, views in enumerate(micro_batches):
        patches_N = None if masks is None else masks.micro_batches[index].patches_M
        with autocast(settings.precision, state.device):
            outputs.append(state.teacher.bottlenecks(views.global_BGCHW.transpose(0, 1), patches_N=patches_N))
    bottlenecks = [torch.cat(own, dim=1) for own in zip(*(own for own, _, _ in outputs), strict=True)]
    with autocast(settings.precision, state.device):
        targets, centers = zip(
            *(
                token_targets(
                    own_GBD,
                    prototypes,
                    center,
                    centering=settings.centering,
                    teacher_temp=teacher_temp,
                    center_momentum=settings.center_momentum,
                )
                for own_GBD, prototypes, center in zip(
                    bottlenecks, state.teacher.head.prototypes(), local_part(state.centers_TK), strict=True
                )
            ),
            strict=True,
        )
    features_GBTD = torch.cat([own for _, own, _ in outputs], dim=1)
    hidden, patch_logits = [], None
    if masks is not None:
        patches = [patches_NE for _, _, patches_NE in outputs if patches_NE is not None]
        hidden, patch_logits = _patch_targets(state, torch.cat(patches), masks, teacher_temp, settings)
    return _Teacher(list(targets), torch.stack(centers), features_GBTD, hidden, patch_logits)


@torch.no_grad()
def _patch_targets(
    state: PassState, patches_NE: Tensor, masks: PatchMasks, teacher_temp: float, settings: StepSettings
) -> tuple[list[HiddenPatches], Tensor]:
    """Of each micro-batch the masked patches with their targets; and ``_Teacher.patch_logits``."""
    assert state.teacher.patches is not None
    assert state.patch_centers_1K is not None
    with autocast(settings.precision, state.device):
        logits_NK = at_least_float32(state.teacher.patches.prototypes()(patches_NE))
    # Workers have different numbers of patches, so each gives its share of the mean.
    share_11K = logits_NK.sum(dim=0)[None, None] * (distributed.world_size() / masks.total)
    match settings.centering:
        case "mean":
            targets_NK = become_centered_targets(logits_NK, state.patch_centers_1K[0], teacher_temp)
        case "sinkhorn":
            targets_NK = sinkhorn_targets([logits_NK[None]], teacher_temp)[0][0]
    parts = targets_NK.split([len(own) for own in masks.micro_batches])
    hidden = [
        HiddenPatches(own.patches_M, own_NK, own.weights_M)
        for own, own_NK in zip(masks.micro_batches, parts, strict=True)
    ]
    return hidden, share_11K


def _draw_masks(state: PassState, views: Views, settings: StepSettings) -> PatchMasks:
    num_global, (height_px, width_px) = views.global_BGCHW.shape[1], views.global_BGCHW.shape[-2:]
    patch_height, patch_width = state.student.backbone.patch_size
    return draw_patch_masks(
        settings.masked_patch,
        (height_px // patch_height, width_px // patch_width),
        seed=settings.seed,
        step=state.step,
        batch=len(views),
        num_global=num_global,
        num_micro_batches=settings.num_micro_batches,
        device=state.device,
    )


def _accumulate_gradients(
    state: PassState,
    micro_batches: Sequence[Views],
    teacher: _Teacher,
    noise_L2MB: Tensor | None,
    settings: StepSettings,
) -> tuple[Tensor, list[Tensor], Tensor | None]:
    """Backward over all micro-batches: ``(1 + T,)`` loss and loss of each token over all workers.

    And the student's bottlenecks of the global views, per token ``(G, B, D)``; and the masked-patch loss over all
    workers, where it is used.
    """
    num = len(micro_batches)
    noises = [None] * num if noise_L2MB is None else noise_L2MB.chunk(num, dim=-1)
    of_tokens = zip(teacher.targets, state.student.head.prototypes(), strict=True)
    micro_targets = zip(*(in_micro_batches(own, num, prototypes) for own, prototypes in of_tokens), strict=True)
    losses, bottlenecks = [], []
    for index, (views, own_targets, noise) in enumerate(zip(micro_batches, micro_targets, noises, strict=True)):
        global_GBCHW, local_PLBCHW = views.global_BGCHW.transpose(0, 1), views.local_BPLCHW.permute(1, 2, 0, 3, 4, 5)
        with gradients_stay_local(state.forward, index < num - 1):
            with autocast(settings.precision, state.device):
                hidden = teacher.hidden[index] if teacher.hidden else None
                loss_T, features_GBTD, own_bottlenecks, patch_loss = state.forward(
                    global_GBCHW, local_PLBCHW, own_targets, noise, settings.student_temp, hidden
                )
            loss = mean_over_pairs(loss_T, _weights_of_tokens(views, settings))
            total = loss
            if settings.koleo_weight > 0:
                koleo = torch.stack([koleo_loss(cls_BD) for cls_BD in features_GBTD[:, :, 0]]).mean()
                total = loss + settings.koleo_weight * koleo
            if patch_loss is not None:
                total = total + settings.masked_patch.weight * patch_loss
            state.scaler.scale(total / num).backward()
        of_patches = [] if patch_loss is None else [patch_loss[None]]
        losses.append(torch.cat([loss[None], loss_T, *of_patches]).detach())
        bottlenecks.append(own_bottlenecks)
    student = [torch.cat(own, dim=1) for own in zip(*bottlenecks, strict=True)]
    means = distributed.all_reduce_mean(torch.stack(losses).mean(0))
    return (means[:-1], student, means[-1]) if teacher.hidden else (means, student, None)


def _weights_of_tokens(views: Views, settings: StepSettings) -> list[float]:
    """What each token's loss counts in the mean: its pairs of views times its own weight."""
    weights = settings.token_weights or (1.0,) * len(views.pairs_per_token)
    return [pairs * weight for pairs, weight in zip(views.pairs_per_token, weights, strict=True)]


def _apply_gradients(state: PassState, norms_N: Tensor, rates: PassRates, settings: StepSettings) -> None:
    if settings.clip_norm is not None:
        clip_gradients(state.student.parameters(), settings.clip_norm, settings.clip, norms_N)
    if rates.is_last_layer_frozen:
        _drop_gradients(state.student.last_layer_parameters())
    if state.step < settings.head_warmup_steps:
        _drop_gradients(state.student.backbone.parameters())
    state.scaler.step(state.optimizer)


@torch.no_grad()
def _diagnose(
    state: PassState, student: Sequence[Tensor], teacher: _Teacher, settings: StepSettings
) -> dict[str, Tensor]:
    heads = state.student.head.prototypes()
    with autocast(settings.precision, state.device):
        logits = [logits_of_own_images(own_GBD, own) for own_GBD, own in zip(student, heads, strict=True)]
    targets = [targets_of_own_images(own_targets, own) for own_targets, own in zip(teacher.targets, heads, strict=True)]
    diagnostics = distillation_diagnostics(logits, targets, student_temp=settings.student_temp)
    tokens = teacher.features_GBTD.unbind(2)
    std_T = torch.stack([feature_spread(tokens_GBD.flatten(0, 1)) for tokens_GBD in tokens])
    return {
        **_named_by_token("teacher_entropy", diagnostics.teacher_entropy_T),
        **_named_by_token("kl", diagnostics.divergence_T),
        **_named_by_token("feature_std", std_T),
    }


def _diagnose_patches(hidden: Sequence[HiddenPatches], patch_loss: Tensor | None) -> dict[str, Tensor]:
    if patch_loss is None:
        return {}
    targets_NK = torch.cat([own.targets_NK for own in hidden])
    # Weights are made for the mean over workers and micro-batches.
    num_means = distributed.world_size() * len(hidden)
    entropy = masked_patch_entropy(targets_NK, torch.cat([own.weights_N for own in hidden])) / num_means
    return {"teacher_entropy/patches": entropy, "kl/patches": patch_loss - entropy}


def _named_by_token(name: str, values_T: Tensor) -> dict[str, Tensor]:
    tokens = ["cls", *(f"part{part}" for part in range(len(values_T) - 1))]
    return {f"{name}/{token}": value for token, value in zip(tokens, values_T, strict=True)}


def _drop_gradients(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _buffers(state: PassState) -> list[Tensor]:
    return [*state.student.buffers(), *state.teacher.buffers()]
