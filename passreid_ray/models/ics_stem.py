"""The IBN convolutional stem of TransReID-SSL (arXiv:2111.12084), instead of one linear projection per patch."""

import torch
from torch import Tensor, nn

from passreid_ray.errors import UserError
from passreid_ray.models.batch_norm import BatchNorm2d

OFFICIAL_CHANNELS = 64
STRIDE = 2
"""Pixels per step of the first convolution; the projection makes patches of what that leaves."""


class IBN(nn.Module):
    """Instance norm on the first half of the channels, batch norm on the second (IBN-Net, arXiv:1807.09441)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.IN = nn.InstanceNorm2d(channels // 2, affine=True)
        self.BN = BatchNorm2d(channels - channels // 2)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Same shape as the input."""
        instance, batch = images_BCHW.split([self.IN.num_features, self.BN.num_features], dim=1)
        return torch.cat([self.IN(instance), self.BN(batch)], dim=1)


class IcsStem(nn.Module):
    """Three convolutions at half resolution, then a linear projection of each patch.

    Parameter names are those of the TransReID-SSL checkpoints: ``conv.{0,3,6}`` convolutions, ``conv.{1,4}`` IBN,
    ``conv.7`` batch norm, ``proj``.
    """

    def __init__(self, patch_size: tuple[int, int], width: int, channels: int = OFFICIAL_CHANNELS) -> None:
        super().__init__()
        if patch_size[0] % STRIDE or patch_size[1] % STRIDE:
            raise UserError(f"stem: 'ics' needs an even patch size; found {patch_size[0]}x{patch_size[1]}")
        self.conv = nn.Sequential(
            nn.Conv2d(3, channels, kernel_size=7, stride=STRIDE, padding=3, bias=False),
            IBN(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            IBN(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False),
            BatchNorm2d(channels),
            nn.ReLU(),
        )
        kernel = (patch_size[0] // STRIDE, patch_size[1] // STRIDE)
        self.proj = nn.Conv2d(channels, width, kernel_size=kernel, stride=kernel)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Patches ``(B, rows, columns, D)``."""
        return self.proj(self.conv(images_BCHW)).permute(0, 2, 3, 1)
