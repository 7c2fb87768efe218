"""The upsampler: audio samples from the frames of a mel spectrogram."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from ._kernels import up1, up2, up3, up4


class ResidualBlock(nn.Module):
    """Dilated convolutions, each with an activation before it and a skip connection around it."""

    def __init__(self, channels: int, kernel_size: int, dilations: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding="same")
            for dilation in dilations
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(functional.leaky_relu(x, 0.1))
        return x


class Upsampler(nn.Module):
    """HiFi-GAN's generator with one residual block per scale; 256 samples for each frame."""

    def __init__(self, mels: int = 80) -> None:
        super().__init__()
        self.first = nn.Conv1d(mels, 512, 7, padding=3)
        self.ups = nn.ModuleList(up.ModelNew() for up in (up1, up2, up3, up4))
        self.blocks = nn.ModuleList(
            ResidualBlock(channels, 3, (1, 3, 5)) for channels in (256, 128, 64, 32)
        )
        self.last = nn.Conv1d(32, 1, 7, padding=3)

    def forward(self, mel: torch.Tensor) -> torch.Tensor:
        """Return the audio [N, 1, 256 T] for a mel spectrogram [N, mels, T]."""
        x = self.first(mel)
        for up, block in zip(self.ups, self.blocks, strict=True):
            x = block(up(x))  # the activation before the layer is part of its kernel
        return torch.tanh(self.last(functional.leaky_relu(x)))
