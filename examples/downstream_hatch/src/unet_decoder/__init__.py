"""The decoder of a U-Net, its up-convolutions compiled by convgen."""

from .decoder import UNetDecoder

__all__ = ["UNetDecoder"]
