"""The decoder: upsamples the deepest features of a U-Net to the size of its image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from ._kernels import up1, up2, up3, up4


class Level(nn.Module):
    """Upsample by two, concatenate the encoder's features, convolve twice."""

    def __init__(self, up: nn.Module, channels: int) -> None:
        super().__init__()
        self.up = up
        self.convolve = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
        )

    def forward(self, x: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        return self.convolve(torch.cat([skip, self.up(x)], dim=1))


class UNetDecoder(nn.Module):
    """The right half of the U: from 1024 channels at 1/16 of the size to classes at full size."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        ups = [up.ModelNew() for up in (up1, up2, up3, up4)]
        self.levels = nn.ModuleList(
            Level(up, channels) for up, channels in zip(ups, (512, 256, 128, 64), strict=True)
        )
        self.head = nn.Conv2d(64, classes, 1)

    def forward(self, x: torch.Tensor, skips: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return a score for each class and pixel.

        Args:
            x: [N, 1024, H, W], from the bottom of the U.
            skips: the encoder's features, from the first level: [N, 64, 16 H, 16 W] to
                [N, 512, 2 H, 2 W].
        """
        for level, skip in zip(self.levels, reversed(skips), strict=True):
            x = level(x, skip)
        return self.head(x)
