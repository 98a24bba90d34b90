"""The network that is tuned for re-identification: a part-token ViT, its tokens fused, and batch norms as necks."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError
from passreid_ray.models.batch_norm import BatchNorm1d
from passreid_ray.models.fusion import combine_tokens, fused_width
from passreid_ray.models.part_vit import PartViT

NeckFusion = Literal["cat", "mean"]
Neck = Literal["single", "multi"]


class ReidModel(nn.Module):
    """Features of images: the tokens of ``backbone``, fused, behind one or several necks (BNNeck).

    - ``neck="single"``: tokens are fused, go through one batch norm and are L2-normalised. Features have length 1.
    - ``neck="multi"``: each token has its own batch norm and is L2-normalised, then they are fused. Features are *not*
      normalised again: their length is at most sqrt(2) with ``cat`` and 1 with ``mean``, in the reference too.

    The statistics of a neck are those of the images of all ranks. Its weight is trained, its bias stays 0. Without
    part tokens both kinds are the same: the CLS token behind one batch norm, normalised.

    Necks have the reference's names, ``bottleneck`` and ``bottleneck_pt1`` to ``bottleneck_ptP``, so ``state_dict()``
    is its file format but for the prefixes.

    Args:
        backbone: all of its parameters are trained, as in the reference.
        fusion: ``cat`` is CLS and the mean of the parts side by side, ``mean`` the mean of these two.

    Source: PASS (arXiv:2203.03931), section 3.3; BNNeck: arXiv:1903.07071, section 3.5.

    Raises:
        UserError: another fusion or neck.
    """

    def __init__(self, backbone: PartViT, *, fusion: NeckFusion, neck: Neck) -> None:
        super().__init__()
        if fusion not in get_args(NeckFusion):
            raise UserError(f"fusion: expected 'cat' or 'mean', found {fusion!r}")
        if neck not in get_args(Neck):
            raise UserError(f"neck: expected 'single' or 'multi', found {neck!r}")
        self.backbone = backbone
        self.fusion: NeckFusion = fusion
        self.neck: Neck = neck
        widths = [self.feature_width] if neck == "single" else [backbone.width] * backbone.num_tokens
        self.neck_names = ["bottleneck", *(f"bottleneck_pt{j}" for j in range(1, len(widths)))]
        for name, width in zip(self.neck_names, widths, strict=True):
            norm = BatchNorm1d(width)
            norm.bias.requires_grad_(False)
            self.add_module(name, norm)

    @property
    def feature_width(self) -> int:
        """Width of the features: D, or 2D with ``cat`` and at least one part."""
        return fused_width(self.backbone.width, self.backbone.num_parts, self.fusion)

    def forward(self, images_BCHW: Tensor, *, drop_path_noise: Tensor | None = None) -> Tensor:
        """Features ``(B, feature_width)`` in float32, whatever precision the backbone computes in.

        Training and evaluation differ only in the statistics of the necks and in stochastic depth, whose
        ``drop_path_noise`` is that of ``PartViT.forward``. In training every rank must take part in every call.
        """
        tokens_BTD = at_least_float32(self.backbone(images_BCHW, drop_path_noise=drop_path_noise))
        necks = [self.get_submodule(name) for name in self.neck_names]
        if self.neck == "single":
            return F.normalize(necks[0](combine_tokens(tokens_BTD, self.fusion)), dim=1)
        outputs = [neck(token_BD) for neck, token_BD in zip(necks, tokens_BTD.unbind(1), strict=True)]
        return combine_tokens(F.normalize(torch.stack(outputs, dim=1), dim=2), self.fusion)
