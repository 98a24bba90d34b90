"""What the student computes in a step, as one module: DDP averages the gradients of what it wraps."""

# Shape letters: B batch, G global views, P parts, L local views per part, V views of one token, T tokens, D width,
# K prototypes, C,H,W image, M = G + P * L views of an image, N masked patches.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from passreid_ray.losses import masked_patch_loss
from passreid_ray.models.pass_model import PassModel
from passreid_ray.train.pass_prototypes import token_loss


@dataclass(frozen=True)
class HiddenPatches:
    """Patches that the student does not see, and what the teacher says of them."""

    patches_N: Tensor
    """Their numbers among those of all global views."""
    targets_NK: Tensor
    weights_N: Tensor
    """Of the rows of the loss."""


class PassStudent(nn.Module):
    """A ``PassModel`` that gives each token's loss: its logits never exist for all views at once."""

    def __init__(self, model: PassModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        global_GBCHW: Tensor,
        local_PLBCHW: Tensor,
        targets: Sequence[Tensor],
        drop_path_noise_L2MB: Tensor | None,
        student_temp: float,
        hidden: HiddenPatches | None = None,
    ) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None]:
        """``(T,)`` cross-entropies, features of the global views, each token's bottleneck of them, the patches' loss.

        ``targets``: per token the teacher's distributions, as ``token_targets`` gives them. The features are
        ``(G, B, T, D)``; the bottlenecks ``(G, B, bottleneck_dim)`` have no gradient: diagnostics make logits of them.
        The last is None without ``hidden`` patches.
        """
        bottlenecks, features_GBTD, patches_NE = self.model.bottlenecks(
            global_GBCHW,
            local_PLBCHW,
            drop_path_noise_L2MB=drop_path_noise_L2MB,
            patches_N=None if hidden is None else hidden.patches_N,
            hides_patches=True,
        )
        losses = [
            token_loss(own_VBD, prototypes, own_targets, student_temp)
            for own_VBD, prototypes, own_targets in zip(bottlenecks, self.model.head.prototypes(), targets, strict=True)
        ]
        global_bottlenecks = [own_VBD[: len(global_GBCHW)].detach() for own_VBD in bottlenecks]
        patch_loss = None
        if hidden is not None and patches_NE is not None and self.model.patches is not None:
            own = self.model.patches.prototypes()
            patch_loss = masked_patch_loss(
                patches_NE, own.weight_v, own.weight_g, hidden.targets_NK, hidden.weights_N, student_temp=student_temp
            )
        # A copy, because FSDP warns of views in what a module returns.
        return torch.stack(losses), features_GBTD.clone(), global_bottlenecks, patch_loss
