"""Projection onto prototypes: one DINO head (arXiv:2104.14294) per token."""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passreid_ray.distributed import is_sharded, local_part
from passreid_ray.errors import UserError
from passreid_ray.models.batch_norm import BatchNorm1d
from passreid_ray.products import Linear, linear

BLOCK_BYTES = 2**22
"""Prototypes that are worked on at a time on a CPU without gradient: they stay in its cache."""


def token_names(num_tokens: int) -> list[str]:
    """The reference's names of the tokens in its head and center keys: cls, pt1, pt2, ..."""
    return ["cls", *(f"pt{j}" for j in range(1, num_tokens))]


class Prototypes(nn.Module):
    """K prototype directions; weight-normalised: row k is ``weight_g[k] * weight_v[k] / |weight_v[k]|``."""

    def __init__(self, in_dim: int, num_prototypes: int, trainable_norm: bool) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=trainable_norm)
        self.weight_v = nn.Parameter(torch.empty(num_prototypes, in_dim))
        bound = in_dim**-0.5  # nn.Linear's own default, which the reference keeps for this layer
        nn.init.uniform_(self.weight_v, -bound, bound)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds some of the prototypes only; then there are no logits of all of them."""
        return is_sharded(self.weight_v)

    def own_rows(self) -> Tensor:
        """The prototypes that this rank holds, ``(S, D)``, normalised, with gradient."""
        weight_v_SD, weight_g_S1 = local_part(self.weight_v), local_part(self.weight_g)
        return weight_v_SD * (weight_g_S1 / torch.linalg.vector_norm(weight_v_SD, dim=1, keepdim=True))

    def forward(self, features_MD: Tensor) -> Tensor:
        """Logits ``(..., K)`` of features ``(..., D)``."""
        # Scaling logits, not weights: there are many more prototypes than rows.
        if self.weight_v.device.type == "cpu" and not torch.is_grad_enabled():
            return self._logits_in_blocks(features_MD.flatten(0, -2)).unflatten(0, features_MD.shape[:-1])
        length_K1 = torch.linalg.vector_norm(self.weight_v, dim=1, keepdim=True)
        return linear(features_MD, self.weight_v) * (self.weight_g / length_K1)[:, 0]

    def _logits_in_blocks(self, features_MD: Tensor) -> Tensor:
        """Logits ``(M, K)``; a block's length, cast and product are made while it is in cache: they read it once."""
        logits_MK = self.weight_v.new_empty(len(features_MD), len(self.weight_v))
        size = max(1, BLOCK_BYTES // (self.weight_v.shape[1] * self.weight_v.element_size()))
        blocks = zip(self.weight_v.split(size), self.weight_g.split(size), logits_MK.split(size, dim=1), strict=True)
        for weight_v_SD, weight_g_S1, logits_MS in blocks:
            scale_S1 = weight_g_S1 / torch.linalg.vector_norm(weight_v_SD, dim=1, keepdim=True)
            torch.mul(linear(features_MD, weight_v_SD), scale_S1[:, 0], out=logits_MS)
        return logits_MK


class PrototypeHead(nn.Module):
    """For each token its own MLP, L2-normalised bottleneck and weight-normalised prototypes.

    Parameter names are those of the reference's checkpoints (``mlp_{cls,pt1,..}.{0,2,4}``,
    ``last_layer_{cls,pt1,..}.weight_{g,v}``), so ``state_dict()`` is their format.

    Args:
        in_dim: D, width of the tokens.
        num_prototypes: K.
        num_tokens: T = 1 + P.
        norm_last_layer: keep prototypes at length 1; otherwise their lengths ``weight_g`` are trained.
        batch_norm: normalise the hidden layers over the batch of all workers. The reference's released heads have
            none; it helps small models that see few images.
    """

    def __init__(
        self,
        in_dim: int,
        num_prototypes: int,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
        num_tokens: int = 4,
        norm_last_layer: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        self.num_prototypes = num_prototypes
        self.num_tokens = num_tokens
        for name in token_names(num_tokens):
            # A bias before a batch norm has no gradient but rounding, which Adam would turn into steps.
            norms = [[BatchNorm1d(hidden_dim)] if batch_norm else [] for _ in range(2)]
            mlp = nn.Sequential(
                Linear(in_dim, hidden_dim, bias=not batch_norm),
                *norms[0],
                nn.GELU(),
                Linear(hidden_dim, hidden_dim, bias=not batch_norm),
                *norms[1],
                nn.GELU(),
                Linear(hidden_dim, bottleneck_dim),
            )
            mlp.apply(_init_linear)
            self.add_module(f"mlp_{name}", mlp)
        for name in token_names(num_tokens):
            prototypes = Prototypes(bottleneck_dim, num_prototypes, trainable_norm=not norm_last_layer)
            self.add_module(f"last_layer_{name}", prototypes)

    def forward(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Logits ``(M_t, K)`` of T tensors ``(M_t, D)``; ``M_t`` may differ between tokens and may be 0.

        Pass all views of a token at once: the lengths of the prototypes are computed once per call.
        """
        rows = zip(self.prototypes(), self.bottlenecks(tokens), strict=True)
        return [prototypes(bottleneck_MD) for prototypes, bottleneck_MD in rows]

    def bottlenecks(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Of T tensors ``(M_t, D)`` what is compared with the prototypes: ``(M_t, bottleneck_dim)``, length 1."""
        return [F.normalize(mlp(features_MD), dim=-1) for mlp, features_MD in zip(self.mlps(), tokens, strict=True)]

    def mlps(self) -> list[nn.Module]:
        """That of each token, before the L2 norm."""
        return [self.get_submodule(f"mlp_{name}") for name in token_names(self.num_tokens)]

    def prototypes(self) -> list[Prototypes]:
        """Those of each token."""
        return [cast(Prototypes, self.get_submodule(f"last_layer_{name}")) for name in token_names(self.num_tokens)]

    def last_layer_parameters(self) -> list[nn.Parameter]:
        """The parameters of the prototypes, which the first epochs of pre-training keep frozen."""
        return [parameter for prototypes in self.prototypes() for parameter in prototypes.parameters()]


def official_head_state_dict(head: PrototypeHead) -> dict[str, Tensor]:
    """Copies of the head's weights under the reference's keys, without the ``head.`` prefix."""
    return {key: value.detach().cpu().clone() for key, value in head.state_dict().items()}


def load_heads(head: PrototypeHead, state: Mapping[str, Tensor]) -> None:
    """Copy the reference's head weights into ``head``; keys with or without ``module.`` and ``head.``.

    Keys of other modules (``backbone.*``) are passed over.

    Raises:
        UserError: a head is missing, or has another shape or more tokens than ``head``.
    """
    stripped = {key.removeprefix("module.").removeprefix("head."): value for key, value in state.items()}
    given = {key: value for key, value in stripped.items() if key.startswith(("mlp_", "last_layer_"))}
    wanted = head.state_dict()
    if missing := sorted(wanted.keys() - given.keys()):
        raise UserError(f"prototype head: {len(missing)} keys are not in the checkpoint, the first is {missing[0]!r}")
    if unexpected := sorted(given.keys() - wanted.keys()):
        raise UserError(
            f"prototype head: a head with num_tokens={head.num_tokens} has no {unexpected[0]!r}, the checkpoint has"
        )
    for key, value in given.items():
        if value.shape != wanted[key].shape:
            raise UserError(
                f"prototype head: {key} is {tuple(value.shape)} in the checkpoint and {tuple(wanted[key].shape)} here; "
                "build the head with the checkpoint's hidden_dim, bottleneck_dim and num_prototypes"
            )
    head.load_state_dict(given)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        # The reference truncates at +-2, that is 100 standard deviations; a float32 draw at the edge then lands on 2.0.
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.1, b=0.1)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
