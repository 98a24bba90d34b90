"""Which patches the student does not see, whoever computes it: settings and draws of the masked-patch loss."""

# Shape letters: B images of this worker, I of all workers, G global views, N masked views, L patches of a view,
# M masked patches.

from dataclasses import dataclass
from typing import Annotated, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from passreid_ray import distributed
from passreid_ray.config import Section
from passreid_ray.views.block_masks import block_masks

_MASKS_KEY = 0x6D61736B
"""Keeps these draws apart from others of the same seed and step."""

Share = Annotated[float, Field(gt=0, le=1)]


class MaskedPatchConfig(Section):
    """The masked-patch loss (iBOT): the student predicts what the teacher says of patches that it does not see."""

    weight: float = Field(default=0.0, ge=0)
    """Weight of the loss; PASS has none. At 0 there are no masks and no patch head."""
    share: Share = 0.5
    """Of all global views, how many are masked; at least one is."""
    ratio: tuple[Share, Share] = (0.1, 0.5)
    """Least and largest share of a masked view's patches that are hidden."""
    num_prototypes: int = Field(default=8192, ge=2)
    """Output directions of the patch head, whose other sizes are those of head. The targets of a worker's share of a
    batch are kept: 4 bytes per masked patch and prototype."""

    @property
    def head_prototypes(self) -> int | None:
        """Prototypes of the patch head; none where there is no such head."""
        return self.num_prototypes if self.weight > 0 else None

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.ratio
        if low > high:
            raise ValueError(f"ratio: expected [low, high] with low <= high, got {[low, high]}")
        return self


@dataclass(frozen=True)
class MaskedPatches:
    """The masked patches of the global views of a micro-batch."""

    patches_M: Tensor
    """Their numbers among all patches of the views: those of the first view of each image, then of the second, ..."""
    weights_M: Tensor
    """Of the rows of the loss: with them its mean over workers and micro-batches is the mean over masked views of the
    mean over their patches."""

    def __len__(self) -> int:
        return len(self.patches_M)


@dataclass(frozen=True)
class PatchMasks:
    """What is masked in a step."""

    micro_batches: list[MaskedPatches]
    """This worker's."""
    total: int
    """Masked patches of all workers."""


def draw_patch_masks(
    config: MaskedPatchConfig,
    grid: tuple[int, int],
    *,
    seed: int,
    step: int,
    batch: int,
    num_global: int,
    num_micro_batches: int,
    device: torch.device,
) -> PatchMasks:
    """Masks for this worker's ``batch`` images of ``num_global`` global views of ``grid`` patches each.

    Drawn for the global batch from the seed and the step alone, so an image meets the same masks on any worker. How
    much is masked in all varies little: the number of masked views is fixed, and their ratios are spread evenly over
    ``config.ratio``, as in DINOv2 (arXiv:2304.07193). A worker may get no mask at all.
    """
    rng = np.random.default_rng([seed, step, _MASKS_KEY])
    num_images, num_patches = batch * distributed.world_size(), grid[0] * grid[1]
    view_N, num_masked_N = _masked_views(config, num_images * num_global, num_patches, rng)
    image_N, global_N = view_N // num_global, view_N % num_global
    own = np.flatnonzero(image_N // batch == distributed.rank())
    masks_BGL = np.zeros((batch, num_global, num_patches), dtype=bool)
    own_masks_NL = block_masks(num_masked_N, grid, rng, own).reshape(len(own), num_patches)
    masks_BGL[image_N[own] % batch, global_N[own]] = own_masks_NL
    # The mean over workers and micro-batches divides by their number.
    unit = distributed.world_size() * num_micro_batches / len(view_N)
    parts = [_masked_patches(own_BGL, unit, device) for own_BGL in np.split(masks_BGL, num_micro_batches)]
    return PatchMasks(parts, int(num_masked_N.sum()))


def _masked_views(
    config: MaskedPatchConfig, num_views: int, num_patches: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the views that are masked, and of how many patches each."""
    num = max(1, round(config.share * num_views))
    low, high = config.ratio
    ratio_N = low + (high - low) * (np.arange(num) + rng.random(num)) / num
    # The views are in random order, so the ratios need not be.
    return rng.permutation(num_views)[:num], np.maximum(1, np.rint(ratio_N * num_patches).astype(np.int64))


def _masked_patches(masks_BGL: np.ndarray, unit: float, device: torch.device) -> MaskedPatches:
    masks_NL = masks_BGL.swapaxes(0, 1).reshape(-1, masks_BGL.shape[-1])
    weights_NL = np.broadcast_to(unit / np.maximum(masks_NL.sum(axis=1, keepdims=True), 1), masks_NL.shape)
    patches_M, weights_M = torch.from_numpy(np.flatnonzero(masks_NL)), torch.from_numpy(weights_NL[masks_NL])
    return MaskedPatches(patches_M.to(device), weights_M.to(device))
