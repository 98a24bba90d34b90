"""The network that is tuned for re-identification: a part-token ViT, its tokens fused, and batch norms as necks."""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from passreid_ray.dtypes import at_least_float32
from passreid_ray.errors import UserError
from passreid_ray.models.batch_norm import BatchNorm1d
from passreid_ray.models.fusion import combine_tokens, fused_width
from passreid_ray.models.part_vit import PartViT

NeckFusion = Literal["cat", "mean"]
Neck = Literal["single", "multi"]


class ReidFeatures(NamedTuple):
    """What supervised tuning reads of a batch, both ``(B, feature_width)`` and neither of them normalised."""

    before_BD: Tensor
    """The fused tokens in front of the necks: for distances, in the triplet loss and in retrieval."""
    after_BD: Tensor
    """Behind the necks: for the classifier."""


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
        self.num_pieces = 1
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

    def forward(
        self, images_BCHW: Tensor, *, drop_path_noise: Tensor | None = None, grids_B2: Tensor | None = None
    ) -> Tensor:
        """Features ``(B, feature_width)`` in float32, whatever precision the backbone computes in.

        Training and evaluation differ only in the statistics of the necks and in stochastic depth, whose
        ``drop_path_noise`` is that of ``PartViT.forward``, as is ``grids_B2``, for images of several sizes. In training
        every rank must take part in every call.
        """
        normed_BTD = self._behind_necks(self._tokens(images_BCHW, drop_path_noise, grids_B2))
        return combine_tokens(F.normalize(normed_BTD, dim=2), self.fusion)

    def embed(
        self, images_BCHW: Tensor, *, drop_path_noise: Tensor | None = None, grids_B2: Tensor | None = None
    ) -> ReidFeatures:
        """Features in front of and behind the necks, as the reference's supervised tuning (TransReID) uses them.

        Unlike ``forward``, nothing is normalised: with ``neck="multi"`` the outputs of the batch norms are fused as
        they are. Everything else is as in ``forward``.

        Source: PASS (arXiv:2203.03931), section 3.3, on TransReID (arXiv:2102.04378); which side serves which loss:
        BNNeck (arXiv:1903.07071), section 3.5.
        """
        tokens_BTD = self._tokens(images_BCHW, drop_path_noise, grids_B2)
        after_BD = combine_tokens(self._behind_necks(tokens_BTD), self.fusion)
        return ReidFeatures(combine_tokens(tokens_BTD, self.fusion), after_BD)

    def compute_in_pieces(self, num: int) -> None:
        """Compute the backbone on ``num`` equal pieces of a batch, one after the other, where gradients are asked for.

        Backward computes each piece again: memory is that of one piece, and time about a third more. Features are those
        of the whole batch up to rounding, as long as the backbone has no batch norm; necks see all of it. Activation
        checkpointing (arXiv:1604.06174) along the batch.
        """
        self.num_pieces = num

    def _tokens(self, images_BCHW: Tensor, drop_path_noise: Tensor | None, grids_B2: Tensor | None) -> Tensor:
        num = self.num_pieces if torch.is_grad_enabled() else 1
        if num == 1:
            return self._tokens_of_piece(images_BCHW, drop_path_noise, grids_B2)
        noises = [None] * num if drop_path_noise is None else drop_path_noise.chunk(num, dim=-1)
        grids = [None] * num if grids_B2 is None else grids_B2.chunk(num)
        pieces = zip(images_BCHW.chunk(num), noises, grids, strict=True)
        return torch.cat([checkpoint(self._tokens_of_piece, *piece, use_reentrant=False) for piece in pieces])

    def _tokens_of_piece(self, images_BCHW: Tensor, drop_path_noise: Tensor | None, grids_B2: Tensor | None) -> Tensor:
        return at_least_float32(self.backbone(images_BCHW, drop_path_noise=drop_path_noise, grids_B2=grids_B2))

    def _behind_necks(self, tokens_BTD: Tensor) -> Tensor:
        """Every token behind its own neck, or ``(B, 1, feature_width)``: the fused tokens behind the single one."""
        if self.neck == "single":
            tokens_BTD = combine_tokens(tokens_BTD, self.fusion)[:, None]
        necks = [self.get_submodule(name) for name in self.neck_names]
        return torch.stack([neck(token) for neck, token in zip(necks, tokens_BTD.unbind(1), strict=True)], dim=1)
