"""One block of the trunk: timm's own layers, run for the images and the tokens that are wanted.

A module that is called, not a function of one: what shards or compiles block by block hooks into the call.
"""

# Shape letters: B images, R images that keep a branch, N tokens, Q tokens that ask, M tokens of any images, H heads,
# E width of one, D width.

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models.vision_transformer import Block
from torch import Tensor

from passreid_ray.products import linear


@dataclass(frozen=True)
class BranchDraws:
    """Stochastic depth of a block (arXiv:1603.09382): which images keep which branch."""

    is_kept_2B: Tensor
    """Of attention and of the MLP."""
    rate: float
    """Chance of an image's branch to be dropped; one that is kept is scaled by 1 / (1 - rate)."""
    scales_2B: Tensor = field(init=False)
    """What the branches are multiplied with."""

    def __post_init__(self) -> None:
        # Of tensors: a compiled block would be compiled again for every block's own rate.
        object.__setattr__(self, "scales_2B", self.is_kept_2B.double() / (1 - self.rate))

    def of_images(self, images_M: Tensor) -> "BranchDraws":
        """The draws of the images with these numbers, which may come several times."""
        return BranchDraws(self.is_kept_2B[:, images_M], self.rate)


class PartBlock(Block):
    """timm's pre-norm block, with another forward."""

    @classmethod
    def of(cls, block: Block) -> "PartBlock":
        """``block`` itself, from now on with this forward; its weights and their names stay."""
        block.__class__ = cls
        return cast(PartBlock, block)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] only part-token models call it
        self,
        tokens_BND: Tensor,
        draws: BranchDraws | None = None,
        *,
        num_out: int | None = None,
        out_M: Tensor | None = None,
        visible_B11N: Tensor | None = None,
    ) -> Tensor:
        """The first ``num_out`` tokens out of the block, ``(B, num_out, D)``; none: all.

        Or, without ``num_out``, the tokens ``out_M`` of any images, ``(M, D)``: numbers counted over all images.

        Equals timm's ``Block.forward`` with the draws of its DropPath passed in. ``visible_B11N``: tokens that
        attention may read. What does not reach the result is left out: queries and MLP of the other tokens, and on a
        CPU the dropped branches of images (elsewhere it would have to wait for the device, to know how many there are).
        """

        def attention(tokens_RND: Tensor, rows_R: Tensor | None) -> Tensor:
            visible_R11N = visible_B11N if visible_B11N is None or rows_R is None else visible_B11N[rows_R]
            return self.ls1(_attend(cast(Attention, self.attn), self.norm1(tokens_RND), num_out, visible_R11N))

        def mlp(tokens_RND: Tensor, rows_R: Tensor | None) -> Tensor:
            return self.ls2(self.mlp(self.norm2(tokens_RND)))

        tokens_BND = _with_branch(tokens_BND, attention, draws, 0, num_out)
        if out_M is None:
            return _with_branch(tokens_BND, mlp, draws, 1, num_out)
        # Nothing mixes tokens from here on, so each may be an image of its own.
        own_draws = None if draws is None else draws.of_images(out_M // tokens_BND.shape[1])
        chosen_M1D = tokens_BND.flatten(0, 1).index_select(0, out_M)[:, None]
        return _with_branch(chosen_M1D, mlp, own_draws, 1, None)[:, 0]


def _with_branch(
    tokens_BND: Tensor,
    branch: Callable[[Tensor, Tensor | None], Tensor],
    draws: BranchDraws | None,
    row: int,
    num_out: int | None,
) -> Tensor:
    """``tokens_BND`` plus their branch, whose draws are in ``row``."""
    out_BND = tokens_BND[:, :num_out]
    if draws is None:
        return out_BND + branch(tokens_BND, None)
    # How many rows are kept is not known when a block is compiled.
    if tokens_BND.device.type == "cpu" and not torch.compiler.is_compiling():
        is_kept_B = draws.is_kept_2B[row]
        rows_R = is_kept_B.nonzero()[:, 0]
        # With no row at all, weights would get no gradient instead of a zero one, and DDP would wait for it.
        if 0 < len(rows_R) < len(is_kept_B):
            kept_RND = branch(tokens_BND[rows_R], rows_R)
            return out_BND.index_add(0, rows_R, kept_RND.to(out_BND.dtype), alpha=1 / (1 - draws.rate))
    scales_B11 = draws.scales_2B[row, :, None, None].to(tokens_BND.dtype)  # a wider one would make the sum as wide
    return out_BND + branch(tokens_BND, None) * scales_B11


def _attend(attn: Attention, tokens_BND: Tensor, num_queries: int | None, visible_B11N: Tensor | None) -> Tensor:
    """timm's ``Attention.forward`` with the queries of the first tokens only."""
    if num_queries is None:
        return attn(tokens_BND, attn_mask=visible_B11N)
    asking_BQD = tokens_BND[:, :num_queries]
    widths = [attn.attn_dim, 2 * attn.attn_dim]
    of_query, of_key_value = attn.qkv.weight.split(widths)
    query_bias, key_value_bias = (None, None) if attn.qkv.bias is None else attn.qkv.bias.split(widths)
    query_BHQE = linear(asking_BQD, of_query, query_bias).unflatten(-1, (attn.num_heads, -1)).transpose(1, 2)
    key_value = linear(tokens_BND, of_key_value, key_value_bias).unflatten(-1, (2, attn.num_heads, -1))
    key_BHNE, value_BHNE = key_value.permute(2, 0, 3, 1, 4).unbind(0)
    query_BHQE, key_BHNE = attn.q_norm(query_BHQE), attn.k_norm(key_BHNE)
    if attn.fused_attn:
        drop = attn.attn_drop.p if attn.training else 0.0
        read_BHQE = F.scaled_dot_product_attention(query_BHQE, key_BHNE, value_BHNE, visible_B11N, drop)
    else:
        scores_BHQN = query_BHQE * attn.scale @ key_BHNE.transpose(-2, -1)
        if visible_B11N is not None:
            scores_BHQN = scores_BHQN.masked_fill(~visible_B11N, float("-inf"))
        read_BHQE = attn.attn_drop(scores_BHQN.softmax(dim=-1)) @ value_BHNE
    read_BQD = attn.norm(read_BHQE.transpose(1, 2).flatten(2))
    if attn.gate is not None:
        read_BQD = read_BQD * attn.gate(asking_BQD).sigmoid()
    return attn.proj_drop(attn.proj(read_BQD))
