"""What the student computes in a step, as one module: DDP averages the gradients of what it wraps."""

# Shape letters: B batch, G global views, P parts, L local views per part, V views of one token, T tokens, D width,
# K prototypes, C,H,W image, M = G + P * L views of an image.

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from passreid_ray.models.pass_model import PassModel
from passreid_ray.train.pass_prototypes import token_loss


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
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """``(T,)`` cross-entropies, the features of the global views, and each token's bottleneck of them.

        ``targets``: per token the teacher's distributions, as ``token_targets`` gives them. The features are
        ``(G, B, T, D)``; the bottlenecks ``(G, B, bottleneck_dim)`` have no gradient: diagnostics make logits of them.
        """
        bottlenecks, features_GBTD = self.model.bottlenecks(
            global_GBCHW, local_PLBCHW, drop_path_noise_L2MB=drop_path_noise_L2MB
        )
        losses = [
            token_loss(own_VBD, prototypes, own_targets, student_temp)
            for own_VBD, prototypes, own_targets in zip(bottlenecks, self.model.head.prototypes(), targets, strict=True)
        ]
        global_bottlenecks = [own_VBD[: len(global_GBCHW)].detach() for own_VBD in bottlenecks]
        # A copy, because FSDP warns of views in what a module returns.
        return torch.stack(losses), features_GBTD.clone(), global_bottlenecks
