"""What the tables say that nothing reads does nothing, and is refused."""

import dataclasses
import functools
import hashlib
import types

import jax
import numpy as np
import pytest

from scaling_ldm import config, encode, generate, mesh, optim, programs
from scaling_ldm import data as data_lib
from scaling_ldm import step as step_lib
from scaling_ldm.config import reads
from scaling_ldm.data import encoded

# Small, and valid for every architecture; what is not read stays at its default.
BASE = {
    "data": {"shape": (8, 8, 3), "text_tokens": 4, "vocab_size": 64},
    "encode": {"text_encoder": "vocabulary"},
    "plan": {"sizes": ((32, 2),)},
    "train": {"batch_size": 2},
    "validation": {"batch_size": 2, "samples": 2},
}
OF = {
    "adaln_zero": {"model": {"classes": 16}},
    "unet": {"model": {"heads": 2, "head_dim": 0}},
} | {
    name: {"model": {"head_dim": 16}} for name in ("in_context", "cross_attention")
}
