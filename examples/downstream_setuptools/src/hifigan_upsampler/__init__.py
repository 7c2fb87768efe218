"""The upsampling stack of HiFi-GAN V1, compiled by convgen."""

from .upsampler import Upsampler

__all__ = ["Upsampler"]
