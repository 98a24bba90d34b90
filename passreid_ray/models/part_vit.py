"""The part-token vision transformer of PASS (arXiv:2203.03931): its own prefix tokens and positions, timm's trunk.

What is special about it, compared with a plain ViT:

- 1 + P learnt prefix tokens, CLS first, each with its own position; the position table holds patches only;
- a global view reads all of them, a local view only CLS and the token of its part;
- stochastic depth is driven by an explicit noise tensor, so that a global batch gives the same result however many
  workers share it;
- parameter names are those of the released PASS backbones, so ``state_dict()`` is their file format.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal, cast

import torch
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from passreid_ray.errors import UserError
from passreid_ray.models.blocks import BranchDraws, PartBlock
from passreid_ray.models.ics_stem import OFFICIAL_CHANNELS, IcsStem
from passreid_ray.models.patch_grids import checked_grids, positions_on_canvas, real_patches, without_padding
from passreid_ray.models.positions import Grid, resize_positions, resize_positions_as_reference
from passreid_ray.models.trunk import build_trunk

# Shape letters: B images, N tokens or patches of an image, T prefix tokens, M chosen patches of any images, D width,
# C,H,W image.

Stem = Literal["patch", "ics"]


class PartViT(nn.Module):
    """Vision transformer with a CLS token and ``num_parts`` part tokens.

    Args:
        trunk: timm name of a plain pre-norm ViT; ``trunk_kwargs`` (``embed_dim``, ``depth``, ``num_heads``, ...) reach
            ``timm.create_model``.
        image_size: height and width (px) whose patch grid the position table has. Other sizes are taken too.
        num_parts: P.
        stem: ``"patch"`` is one linear projection per patch, ``"ics"`` the convolutional stem of TransReID-SSL.
        stem_channels: width of the convolutional stem.
        drop_path: chance of the last block's branches to be dropped, linear in depth from 0, in training mode.
        official_pos_resize: resample positions at every size exactly as the PASS pre-training code does. False: the
            table itself at ``image_size`` (as all its fine-tuning codes do), bicubic to the exact grid otherwise.

    Raises:
        UserError: a trunk that is unknown or does not fit, or a size that the patches do not divide.
    """

    cls_token: nn.Parameter
    cls_pos: nn.Parameter
    pos_embed: nn.Parameter

    def __init__(
        self,
        trunk: str = "vit_small_patch16_224",
        *,
        image_size: tuple[int, int] = (256, 128),
        num_parts: int = 3,
        stem: Stem = "patch",
        stem_channels: int = OFFICIAL_CHANNELS,
        drop_path: float = 0.0,
        official_pos_resize: bool = False,
        **trunk_kwargs: Any,
    ) -> None:
        super().__init__()
        if num_parts < 0:
            raise UserError(f"num_parts: expected >= 0, found {num_parts}")
        if not 0 <= drop_path < 1:
            raise UserError(f"drop_path: expected a chance in [0, 1), found {drop_path}")
        vit = build_trunk(trunk, image_size, trunk_kwargs)
        self.trunk_name = trunk
        self.image_size = image_size
        self.num_parts = num_parts
        self.num_tokens = 1 + num_parts
        self.width: int = vit.embed_dim
        self.depth = len(vit.blocks)
        self.patch_size: tuple[int, int] = vit.patch_embed.patch_size
        self.grid = self._grid_of(*image_size)
        self.official_pos_resize = official_pos_resize
        self.checkpoints_activations = False
        self.drop_path_rates: list[float] = torch.linspace(0, drop_path, self.depth).tolist()

        # Registered in the order, under the names and with the shapes of the released backbones. Tokens stay separate
        # parameters (not one (T, D) table) because the reference clips gradients parameter by parameter.
        part_names = range(1, num_parts + 1)
        for name in [
            "cls_token",
            *(f"part_token{j}" for j in part_names),
            "cls_pos",
            *(f"part{j}_pos" for j in part_names),
        ]:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, self.width)))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], self.width))
        match stem:
            case "patch":
                self.patch_embed = vit.patch_embed
            case "ics":
                self.patch_embed = IcsStem(self.patch_size, self.width, stem_channels)
            case _:
                raise UserError(f"stem: expected 'patch' or 'ics', found {stem!r}")
        self.norm_pre = vit.norm_pre
        self.blocks = vit.blocks
        self.norm = vit.norm

        for name in ["cls_token", "pos_embed", *(n for j in part_names for n in (f"part_token{j}", f"part{j}_pos"))]:
            nn.init.trunc_normal_(self.get_parameter(name), std=0.02)  # cls_pos stays zero, as in the reference

    def forward(
        self,
        images_BCHW: Tensor,
        part_B: Tensor | None = None,
        *,
        drop_path_noise: Tensor | None = None,
        grids_B2: Tensor | None = None,
        patches_M: Tensor | None = None,
        mask_token_1D: Tensor | None = None,
    ) -> Tensor:
        """Normalised prefix tokens of the last block, and the patches that are asked for.

        Args:
            images_BCHW: global views, or local views when ``part_B`` is given; H and W multiples of the patch.
            part_B: the part index 0..P-1 of each local view.
            drop_path_noise: ``(depth, 2, B)`` uniform in [0, 1), one number per block, branch (attention, MLP) and
                image: a branch is dropped where it is below the block's rate, and scaled by 1 / (1 - rate) elsewhere.
                Drawn from torch's default generator when absent; not used in eval mode or at rate 0.
            grids_B2: rows and columns of patches of each image, when images of several sizes are padded to one. Image
                b is then its top left ``rows * patch`` x ``columns * patch`` pixels and nothing else: it has the
                positions of its own grid, and no token sees the padding, whatever it holds. Local views may have grids
                too. Best on the CPU, where it is read: a tensor on a GPU makes every forward wait for it.
            patches_M: patches to return too: their numbers, counted row by row over all images. Not with grids.
            mask_token_1D: what stands in the place of ``patches_M`` in the input, before positions are added: their
                pixels are not read. iBOT (arXiv:2111.07832).

        Returns:
            ``(B, 1 + P, D)`` tokens, CLS first; with ``part_B`` ``(B, 2, D)``: CLS and the token of that part. With
            ``patches_M`` ``(B * T + M, D)``: these tokens image by image, then the patches.

        Raises:
            UserError: a size, part, noise or grid that does not fit; grids with the convolutional stem, whose
                convolutions and norms would mix padding into the image; or grids with patches.
        """
        if grids_B2 is not None and patches_M is not None:
            raise UserError(
                "patches_M: patches of images in grids of their own cannot be asked for; leave out grids_B2"
            )
        out_M = None
        if grids_B2 is None:
            hidden_M = None if mask_token_1D is None else patches_M
            tokens_BND, visible_B11N = self._tokens(images_BCHW, part_B, hidden_M, mask_token_1D), None
            if patches_M is not None:
                out_M = _numbers_of_tokens(tokens_BND, patches_M, self.num_tokens if part_B is None else 2)
        else:
            tokens_BND, visible_B11N = self._tokens_of_grids(images_BCHW, part_B, grids_B2)
        noise_L2B = self._drop_path_noise(tokens_BND, drop_path_noise)
        num_out = self.num_tokens if part_B is None else 2
        return self.norm(self.run_blocks(tokens_BND, noise_L2B, num_out, visible_B11N, out_M))

    def run_blocks(
        self,
        tokens_BND: Tensor,
        noise_L2B: Tensor | None,
        num_out: int,
        visible_B11N: Tensor | None = None,
        out_M: Tensor | None = None,
    ) -> Tensor:
        """The first ``num_out`` tokens out of the last block, not normalised, ``(B, num_out, D)``.

        ``noise_L2B``: as ``drop_path_noise`` of ``forward``; none: nothing is dropped. ``visible_B11N``: tokens that
        attention may read. ``out_M``: tokens of any images to return instead, ``(M, D)``, as ``PartBlock`` takes them.
        """
        for index, (block, rate) in enumerate(zip(self._blocks(), self.drop_path_rates, strict=True)):
            draws = None if noise_L2B is None or rate == 0 else BranchDraws(noise_L2B[index] >= rate, rate)
            # Patches of the last block that nobody asks for are not read.
            is_last = index + 1 == self.depth
            run = partial(block, draws=draws, num_out=num_out if is_last else None, visible_B11N=visible_B11N)
            if is_last and out_M is not None:
                run = partial(block, draws=draws, out_M=out_M)
            if self.checkpoints_activations and torch.is_grad_enabled():
                tokens_BND = cast(Tensor, checkpoint(run, tokens_BND, use_reentrant=False))
            else:
                tokens_BND = run(tokens_BND)
        return tokens_BND

    def use_activation_checkpointing(self, enabled: bool) -> None:
        """Keep only the input of each block for backward, which then computes the block again: less memory, more time.

        Source: arXiv:1604.06174. The gradients are the same.
        """
        self.checkpoints_activations = enabled

    def use_fused_attention(self, enabled: bool) -> None:
        """Compute attention with torch's fused kernel (timm's default) or in plain steps; the result is the same.

        On CPUs the fused kernel's backward is slow in bf16: plain steps train a small ViT 1.7 times as fast.
        """
        for block in self._blocks():
            setattr(block.attn, "fused_attn", enabled)  # noqa: B010 timm calls it final, for TorchScript's sake

    def attention_maps(self, images_BCHW: Tensor) -> Tensor:
        """How much each prefix token looks at each patch in the last block, without stochastic depth.

        Returns:
            ``(B, heads, 1 + P, rows, columns)``: attention weights of patches; together with the weights on the prefix
            tokens, which are left out, they sum to 1.
        """
        tokens_BND = self._tokens(images_BCHW, None)
        *first_blocks, last = self._blocks()
        for block in first_blocks:
            tokens_BND = block(tokens_BND)
        attn = cast(Attention, last.attn)
        batch, length, _ = tokens_BND.shape
        qkv = attn.qkv(last.norm1(tokens_BND)).reshape(batch, length, 3, attn.num_heads, attn.head_dim)
        query, key, _ = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        query, key = attn.q_norm(query), attn.k_norm(key)
        weights = (query[:, :, : self.num_tokens] * attn.scale @ key.transpose(-2, -1)).softmax(dim=-1)
        return weights[..., self.num_tokens :].unflatten(-1, self._grid_of(*images_BCHW.shape[-2:]))

    def positions(self, grid: Grid) -> Tensor:
        """Positions ``(1, rows * columns, D)`` added to the patches of an input with this patch grid."""
        if self.official_pos_resize:
            return resize_positions_as_reference(self.pos_embed, self.grid, grid)
        return resize_positions(self.pos_embed, self.grid, grid, "bicubic")

    def _tokens(
        self,
        images_BCHW: Tensor,
        part_B: Tensor | None,
        hidden_M: Tensor | None = None,
        mask_token_1D: Tensor | None = None,
    ) -> Tensor:
        """Input of the first block: prefix tokens, then patches, positions added; the token in place of hidden ones."""
        grid = self._grid_of(*images_BCHW.shape[-2:])
        if hidden_M is None or mask_token_1D is None:
            patches_BND = self.patch_embed(images_BCHW).flatten(1, 2)
        else:
            is_hidden = torch.zeros(len(images_BCHW) * grid[0] * grid[1], dtype=torch.bool, device=images_BCHW.device)
            hidden_BRC = is_hidden.index_fill(0, hidden_M, True).unflatten(0, (-1, *grid))
            if isinstance(self.patch_embed, IcsStem):  # it reads pixels beyond a patch
                images_BCHW = without_padding(images_BCHW, ~hidden_BRC, self.patch_size)
            patches_BND = self.patch_embed(images_BCHW).flatten(1, 2)
            patches_BND = torch.where(hidden_BRC.flatten(1)[:, :, None], mask_token_1D, patches_BND)
        patches_BND = patches_BND + self.positions(grid)
        return self.norm_pre(torch.cat([self._prefix(len(images_BCHW), part_B), patches_BND], dim=1))

    def _tokens_of_grids(self, images_BCHW: Tensor, part_B: Tensor | None, grids_B2: Tensor) -> tuple[Tensor, Tensor]:
        """As ``_tokens``, each image in its own grid; and which tokens attention may read, ``(B, 1, 1, N)``."""
        if isinstance(self.patch_embed, IcsStem):
            raise UserError(
                "grids_B2: stem='ics' reads pixels beyond a patch, so padding cannot be kept out of an "
                "image; use stem='patch' or batches of one size without grids"
            )
        canvas = self._grid_of(*images_BCHW.shape[-2:])
        grids = checked_grids(grids_B2, len(images_BCHW), canvas)
        # A plain copy to a GPU would wait for all that is queued there.
        real_BRC = real_patches(grids, canvas).to(images_BCHW.device, non_blocking=True)
        patches_BND = self.patch_embed(without_padding(images_BCHW, real_BRC, self.patch_size)).flatten(1, 2)
        patches_BND = patches_BND + positions_on_canvas(grids, canvas, self.positions)
        prefix_BTD = self._prefix(len(images_BCHW), part_B)
        visible_BN = torch.cat([real_BRC.new_ones(prefix_BTD.shape[:2]), real_BRC.flatten(1)], dim=1)
        return self.norm_pre(torch.cat([prefix_BTD, patches_BND], dim=1)), visible_BN[:, None, None]

    def _prefix(self, batch_size: int, part_B: Tensor | None) -> Tensor:
        """``(B, 1 + P, D)`` for global views, ``(B, 2, D)`` for local ones, own positions added."""
        cls_11D = self.cls_token + self.cls_pos
        parts = [
            self.get_parameter(f"part_token{j}") + self.get_parameter(f"part{j}_pos")
            for j in range(1, self.num_parts + 1)
        ]
        if part_B is None:
            return torch.cat([cls_11D, *parts], dim=1).expand(batch_size, -1, -1)
        if not parts:
            raise UserError("part_B: this model has num_parts=0, so it takes no local views of a part")
        if part_B.shape != (batch_size,) or part_B.is_floating_point():
            raise UserError(f"part_B: expected {batch_size} integers, found {part_B.dtype} {tuple(part_B.shape)}")
        own_B1D = torch.cat(parts)[part_B]
        return torch.cat([cls_11D.expand(batch_size, -1, -1), own_B1D], dim=1)

    def _drop_path_noise(self, tokens_BND: Tensor, noise_L2B: Tensor | None) -> Tensor | None:
        """The given noise, or one drawn here; None when nothing can be dropped."""
        if not self.training or self.drop_path_rates[-1] == 0:
            return None
        shape = (self.depth, 2, len(tokens_BND))
        if noise_L2B is None:
            return torch.rand(shape, device=tokens_BND.device)
        if noise_L2B.shape != shape:
            raise UserError(f"drop_path_noise: expected {shape} (depth, 2, B), found {tuple(noise_L2B.shape)}")
        return noise_L2B

    def _blocks(self) -> Iterable[PartBlock]:
        return cast(Iterable[PartBlock], self.blocks)

    def _grid_of(self, height_px: int, width_px: int) -> Grid:
        patch_height, patch_width = self.patch_size
        if height_px % patch_height or width_px % patch_width:
            raise UserError(
                f"image size {height_px}x{width_px} px is not a multiple of the patch, {patch_height}x{patch_width} px"
            )
        return height_px // patch_height, width_px // patch_width


def _numbers_of_tokens(tokens_BND: Tensor, patches_M: Tensor, num_prefix: int) -> Tensor:
    """Numbers, counted over all tokens, of all prefix tokens and then of patches whose numbers count patches only."""
    batch, length, _ = tokens_BND.shape
    numbers_BN = torch.arange(batch * length, device=tokens_BND.device).unflatten(0, (batch, length))
    patches = numbers_BN[:, num_prefix:].flatten().index_select(0, patches_M)
    return torch.cat([numbers_BN[:, :num_prefix].flatten(), patches])
