"""Samplers: noise -> pictures, with any callable denoise(x_BHWC, t_B); jax only."""

from scaling_ldm.samplers.euler import euler

__all__ = ["euler"]
