"""A training step of PASS as its published code is built, in plain torch: what ours is measured and tested against.

Written from the description: PASS (arXiv:2203.03931) on DINO (arXiv:2104.14294), and the order and number of calls of
the published code. One backbone call per group of views, one head call per token and group with the prototypes
normalised anew in each, attention in plain steps, a teacher in training mode, a loop over 44 pairs of views, clipping
that reads every norm back, torch's AdamW as it comes, a Python loop for the teacher, and two reads of the loss.

Parameter names are those of ``PassModel``, so both start from one ``state_dict()``.
"""

# Shape letters: B batch, M rows, N patches and prefix tokens, T tokens, D width, H heads, K prototypes, G global views.

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.optim import AdamW

from passreid_ray.models.pass_model import PassModel
from passreid_ray.train.optimizer import STATE_KEYS
from passreid_ray.train.pass_rates import PassRates
from passreid_ray.train.pass_state import PassState
from passreid_ray.train.pass_step import Views
from passreid_ray.train.precision import Precision, autocast

NUM_PARTS = 3
TOKEN_NAMES = ("cls", "pt1", "pt2", "pt3")


@dataclass(frozen=True)
class Sizes:
    """The shape of a model."""

    image_size_px: tuple[int, int]
    patch_px: int
    width: int
    depth: int
    num_heads: int
    hidden_dim: int
    bottleneck_dim: int
    num_prototypes: int
    drop_path: float

    @classmethod
    def of(cls, model: PassModel) -> "Sizes":
        """Those of ``model``."""
        backbone, first = model.backbone, cast(Attention, model.backbone.get_submodule("blocks.0.attn"))
        hidden_dim = model.head.get_parameter("mlp_cls.0.weight").shape[0]
        num_prototypes, bottleneck_dim = model.head.get_parameter("last_layer_cls.weight_v").shape
        return cls(
            image_size_px=backbone.image_size,
            patch_px=backbone.patch_size[0],
            width=backbone.width,
            depth=backbone.depth,
            num_heads=first.num_heads,
            hidden_dim=hidden_dim,
            bottleneck_dim=bottleneck_dim,
            num_prototypes=num_prototypes,
            drop_path=backbone.drop_path_rates[-1],
        )


class LiteralAttention(nn.Module):
    """Attention in plain steps."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        batch, length, width = tokens_BND.shape
        head_dim = width // self.num_heads
        qkv = self.qkv(tokens_BND).reshape(batch, length, 3, self.num_heads, head_dim).permute(2, 0, 3, 1, 4)
        query, key, value = qkv[0], qkv[1], qkv[2]
        weights_BHNN = ((query @ key.transpose(-2, -1)) * head_dim**-0.5).softmax(dim=-1)
        return self.proj((weights_BHNN @ value).transpose(1, 2).reshape(batch, length, width))


class LiteralMlp(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens_BND)))


class LiteralBlock(nn.Module):
    """Pre-norm transformer block with stochastic depth per image and branch."""

    def __init__(self, width: int, num_heads: int, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = LiteralAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = LiteralMlp(width)

    def forward(self, tokens_BND: Tensor) -> Tensor:
        tokens_BND = tokens_BND + self._dropped(self.attn(self.norm1(tokens_BND)))
        return tokens_BND + self._dropped(self.mlp(self.norm2(tokens_BND)))

    def _dropped(self, branch_BND: Tensor) -> Tensor:
        if self.drop_path == 0 or not self.training:
            return branch_BND
        keep = 1 - self.drop_path
        mask_B11 = (keep + torch.rand(len(branch_BND), 1, 1, dtype=branch_BND.dtype, device=branch_BND.device)).floor()
        return branch_BND / keep * mask_B11


class LiteralPatchEmbed(nn.Module):
    """One linear projection per patch."""

    def __init__(self, patch_px: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_px, stride=patch_px)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.proj(images_BCHW).flatten(2).transpose(1, 2)


class LiteralBackbone(nn.Module):
    """Part-token ViT; every block and the last norm run on all tokens."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.patch_px = sizes.patch_px
        self.grid = tuple(side // sizes.patch_px for side in sizes.image_size_px)
        parts = range(1, NUM_PARTS + 1)
        for name in ["cls_token", *(f"part_token{j}" for j in parts), "cls_pos", *(f"part{j}_pos" for j in parts)]:
            self.register_parameter(name, nn.Parameter(0.02 * torch.randn(1, 1, sizes.width)))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, math.prod(self.grid), sizes.width))
        self.patch_embed = LiteralPatchEmbed(sizes.patch_px, sizes.width)
        rates = torch.linspace(0, sizes.drop_path, sizes.depth).tolist()
        self.blocks = nn.ModuleList([LiteralBlock(sizes.width, sizes.num_heads, rate) for rate in rates])
        self.norm = nn.LayerNorm(sizes.width, eps=1e-6)

    def forward(self, images_BCHW: Tensor, part: int | None) -> list[Tensor]:
        """The prefix tokens, each ``(B, D)``: all of them, or CLS and the one of ``part``."""
        read = [0, *(range(1, NUM_PARTS + 1) if part is None else [1 + part])]
        tokens = [self.get_parameter("cls_token" if j == 0 else f"part_token{j}") for j in read]
        positions = [self.get_parameter("cls_pos" if j == 0 else f"part{j}_pos") for j in read]
        prefix = [token.expand(len(images_BCHW), -1, -1) for token in tokens]
        x_BND = torch.cat([*prefix, self.patch_embed(images_BCHW)], dim=1)
        x_BND = x_BND + torch.cat([*positions, self._patch_positions(*images_BCHW.shape[-2:])], dim=1)
        for block in self.blocks:
            x_BND = block(x_BND)
        x_BND = self.norm(x_BND)
        return [x_BND[:, index] for index in range(len(read))]

    def _patch_positions(self, height_px: int, width_px: int) -> Tensor:
        # Resampled at every size, its own too, with 0.1 added to the new one: PartViT's official_pos_resize.
        sides = (height_px // self.patch_px, width_px // self.patch_px)
        scale = [(new + 0.1) / old for new, old in zip(sides, self.grid, strict=True)]
        table_1DHW = self.pos_embed.reshape(1, *self.grid, -1).permute(0, 3, 1, 2)
        table_1DHW = F.interpolate(table_1DHW, scale_factor=scale, mode="bicubic")
        return table_1DHW.permute(0, 2, 3, 1).reshape(1, math.prod(sides), -1)


class LiteralHead(nn.Module):
    """One DINO head per token."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        for name in TOKEN_NAMES:
            mlp = nn.Sequential(
                nn.Linear(sizes.width, sizes.hidden_dim),
                nn.GELU(),
                nn.Linear(sizes.hidden_dim, sizes.hidden_dim),
                nn.GELU(),
                nn.Linear(sizes.hidden_dim, sizes.bottleneck_dim),
            )
            self.add_module(f"mlp_{name}", mlp)
        for name in TOKEN_NAMES:
            plain = nn.Linear(sizes.bottleneck_dim, sizes.num_prototypes, bias=False)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # deprecated, and what is published
                prototypes = nn.utils.weight_norm(plain)
            prototypes.get_parameter("weight_g").data.fill_(1)
            prototypes.get_parameter("weight_g").requires_grad = False
            self.add_module(f"last_layer_{name}", prototypes)

    def forward(self, tokens: Sequence[Tensor], read: Sequence[int]) -> list[Tensor]:
        """Logits ``(M, K)`` of the tokens whose numbers are ``read``."""
        logits = []
        for features_MD, token in zip(tokens, read, strict=True):
            bottleneck = F.normalize(self.get_submodule(f"mlp_{TOKEN_NAMES[token]}")(features_MD), dim=-1, p=2)
            logits.append(self.get_submodule(f"last_layer_{TOKEN_NAMES[token]}")(bottleneck))
        return logits


class LiteralModel(nn.Module):
    """Backbone and heads, called group by group."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.backbone = LiteralBackbone(sizes)
        self.head = LiteralHead(sizes)

    def forward(self, crops: Sequence[Tensor]) -> list[list[Tensor]]:
        """Logits per group: of the two global views' four tokens; then of CLS and part, for each part's views."""
        everything = range(1 + NUM_PARTS)
        logits = [self.head(self.backbone(torch.cat(tuple(crops[:2])), None), everything)]
        per_part = (len(crops) - 2) // NUM_PARTS
        for part in range(NUM_PARTS if per_part else 0):
            first = 2 + part * per_part
            tokens = self.backbone(torch.cat(tuple(crops[first : first + per_part])), part)
            logits.append(self.head(tokens, [0, 1 + part]))
        return logits


@dataclass
class LiteralState:
    """What the literal step changes."""

    student: LiteralModel
    teacher: LiteralModel
    centers: list[Tensor]
    """``(1, K)`` of each token."""
    optimizer: AdamW
    step: int = 0


def literal_state(sizes: Sizes, device: torch.device, dtype: torch.dtype = torch.float32) -> LiteralState:
    """A state before the first step, with random weights."""
    student, teacher = LiteralModel(sizes), LiteralModel(sizes)
    for block in teacher.backbone.blocks:
        cast(LiteralBlock, block).drop_path = 0.0
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student.to(device, dtype)
    teacher.to(device, dtype)
    centers = [torch.zeros(1, sizes.num_prototypes, device=device, dtype=dtype) for _ in TOKEN_NAMES]
    learnt = [(name, own) for name, own in student.named_parameters() if own.requires_grad]
    exempt = [own.ndim == 1 or name.endswith(".bias") for name, own in learnt]
    groups = [
        {"params": [own for (_, own), is_exempt in zip(learnt, exempt, strict=True) if not is_exempt]},
        {"params": [own for (_, own), is_exempt in zip(learnt, exempt, strict=True) if is_exempt], "weight_decay": 0.0},
    ]
    # As published, with torch's own choice of kernel: a plain loop over parameters on a CPU.
    return LiteralState(student, teacher, centers, AdamW(groups))


def load_weights(state: LiteralState, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> None:
    """Copy the ``state_dict()`` of two ``PassModel`` into ``state``."""
    state.student.load_state_dict(student)
    state.teacher.load_state_dict(teacher)


def crops_of(views: Views) -> list[Tensor]:
    """The list of views that the published loader gives: global ones, then part by part, each ``(B, C, H, W)``."""
    local_BMCHW = views.local_BPLCHW.flatten(1, 2)
    return [own.contiguous() for own in (*views.global_BGCHW.unbind(1), *local_BMCHW.unbind(1))]


def literal_step(
    state: LiteralState,
    crops: Sequence[Tensor],
    rates: PassRates,
    *,
    precision: Precision = "fp32",
    student_temp: float = 0.1,
    center_momentum: float = 0.9,
    clip_norm: float = 3.0,
) -> float:
    """One step on the ``crops`` of a batch; its loss. ``bf16`` is autocast around both models and the loss.

    Raises:
        FloatingPointError: the loss is not finite.
    """
    for index, group in enumerate(state.optimizer.param_groups):
        group["lr"] = rates.lr
        if index == 0:
            group["weight_decay"] = rates.weight_decay

    with autocast(precision, state.centers[0].device):
        teacher = state.teacher(crops[:2])[0]
        student = state.student(crops)
        loss = literal_pair_loss(student, teacher, state.centers, student_temp, rates.teacher_temp)
        for token, logits_MK in enumerate(teacher):
            _update_center(state.centers, token, logits_MK, center_momentum)
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"loss is {loss.item()} at step {state.step}")

    state.optimizer.zero_grad()
    loss.backward()
    clip_each(state.student, clip_norm)
    if rates.is_last_layer_frozen:
        for name, own in state.student.named_parameters():
            if "last_layer" in name:
                own.grad = None
    state.optimizer.step()

    with torch.no_grad():
        for own, moving in zip(state.student.parameters(), state.teacher.parameters(), strict=True):
            moving.mul_(rates.teacher_momentum).add_((1 - rates.teacher_momentum) * own.detach())
    state.step += 1
    return loss.item()


def literal_pair_loss(
    student: Sequence[Sequence[Tensor]],
    teacher: Sequence[Tensor],
    centers: Sequence[Tensor],
    student_temp: float,
    teacher_temp: float,
) -> Tensor:
    """Mean cross-entropy over all pairs of different views; the log-softmax of a view anew in every pair.

    ``student`` and ``teacher`` are what ``LiteralModel`` returns for all views and for the global ones alone.
    """
    global_logits, *local_logits = student
    num_pairs, total = 0, torch.zeros((), device=teacher[0].device, dtype=centers[0].dtype)
    for token, (teacher_MK, center_1K) in enumerate(zip(teacher, centers, strict=True)):
        views = list((global_logits[token] / student_temp).chunk(2))
        for part, (cls_MK, part_MK) in enumerate(local_logits):
            if token in (0, 1 + part):
                own_MK = cls_MK if token == 0 else part_MK
                views += (own_MK / student_temp).chunk(len(own_MK) * 2 // len(teacher_MK))
        targets = F.softmax((teacher_MK - center_1K) / teacher_temp, dim=-1).detach().chunk(2)
        for target_view, target_BK in enumerate(targets):
            for view, logits_BK in enumerate(views):
                if view != target_view:
                    total = total + torch.sum(-target_BK * F.log_softmax(logits_BK, dim=-1), dim=-1).mean()
                    num_pairs += 1
    return total / num_pairs


def clip_each(model: nn.Module, clip_norm: float) -> list[float]:
    """Clip every gradient by itself, reading each norm back; the norms."""
    norms = []
    for own in model.parameters():
        if own.grad is not None:
            norm = own.grad.norm(2)
            norms.append(norm.item())
            scale = clip_norm / (norm + 1e-6)
            if scale < 1:
                own.grad.mul_(scale)
    return norms


def largest_differences(state: PassState, literal: LiteralState) -> dict[str, float]:
    """By kind of tensor the largest ``|ours - literal| / |literal|`` (L2 norms) of any tensor of both states.

    Names that only one side has raise ``KeyError``.
    """
    kinds: dict[str, Iterator[tuple[str, Tensor, Tensor]]] = {
        "student": _pairs(state.student.state_dict(), literal.student.state_dict()),
        "teacher": _pairs(state.teacher.state_dict(), literal.teacher.state_dict()),
        "gradient mean": _pairs(_gradient_means(state), _gradient_means(literal)),
        "centers": iter([("centers", state.centers_TK, torch.cat(literal.centers))]),
    }
    return {kind: max(_difference(*pair) for pair in pairs) for kind, pairs in kinds.items()}


@torch.no_grad()
def _update_center(centers: list[Tensor], token: int, logits_MK: Tensor, momentum: float) -> None:
    mean_1K = torch.sum(logits_MK, dim=0, keepdim=True) / len(logits_MK)
    centers[token] = centers[token] * momentum + mean_1K * (1 - momentum)


def _pairs(ours: dict[str, Tensor], literal: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor]]:
    if unmatched := sorted(ours.keys() ^ literal.keys()):
        raise KeyError(f"only one side has {unmatched}")
    return ((name, value, literal[name]) for name, value in ours.items())


def _gradient_means(state: PassState | LiteralState) -> dict[str, Tensor]:
    """AdamW's running mean of each gradient: after the first step the clipped gradient times 1 - beta."""
    first_moment = STATE_KEYS[1]
    kept = state.optimizer.state
    return {name: kept[own][first_moment] for name, own in state.student.named_parameters() if own in kept}


def _difference(name: str, ours: Tensor, literal: Tensor) -> float:
    difference, size = (ours - literal).double(), literal.double()
    if name.endswith("attn.qkv.bias"):
        # The gradient of its K third is zero but for rounding, which Adam turns into whole steps.
        width = len(ours) // 3
        difference[width : 2 * width] = 0
    norm = float(size.norm())
    return float(difference.norm()) / norm if norm > 0 else float(difference.norm())
