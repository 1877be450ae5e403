"""Pictures and captions -> records of latents and text features, once per data set."""

from scaling_ldm.encode.stage import Preempted, run

__all__ = ["Preempted", "run"]
