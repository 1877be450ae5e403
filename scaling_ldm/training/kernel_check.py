"""A kernel of attention is compared with the plain form on the device that will run it.

Tests compare the kernels on a CPU, in an interpreter or with another library in their
place. Only the real device shows what its compiler makes of them. So a process that
would use a kernel computes a small attention in both ways before it does anything else.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import config
from scaling_ldm.models import attention, attention_backends

# As a share of the largest value. Bfloat16 rounds by 0.4%, and gradients add up such
# errors.
LARGEST_DIFFERENCE = 0.03
_QUERIES, _KEYS, _HEADS = 256, 333, 2  # a number of keys that is no multiple of a tile


def check(model: config.ModelConfig) -> None:
    """Refuses a kernel whose values or gradients are wrong on the first local device.

    It does nothing where every attention is plain, or where the kernel cannot take
    these heads.

    Raises:
      ConfigError: the device cannot run the kernel; or it differs from the plain form
        by more than LARGEST_DIFFERENCE of the largest value, and the message has the
        difference.
    """
    if model.architecture == "autoencoder_kl":  # always plain
        return
    device = jax.local_devices()[0]
    kernel = attention_backends.kernel_of(model.attention, device)
    if kernel is None:
        return
    dtype, features = jnp.dtype(model.compute_dtype), model.head_dim or 64
    if attention_backends.impossible(kernel, dtype, features):
        return
    try:
        found = difference(kernel, dtype, features)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as e:
        raise config.ConfigError(
            f"the attention kernel {kernel!r} cannot run on this {device.device_kind}: "
            f"{' '.join(str(e).split())[:300]}; set config.model.attention = 'plain'"
        ) from e
    if not found <= LARGEST_DIFFERENCE:  # NaN, too
        raise config.ConfigError(
            f"the attention kernel {kernel!r} is wrong on this {device.device_kind}: "
            f"it differs from the plain form by {found:.2g} of the largest value, and "
            f"{LARGEST_DIFFERENCE} is allowed; set config.model.attention = 'plain'"
        )


def difference(kernel: str, dtype: Any, features: int) -> float:
    """The largest difference between a kernel and the plain form on one device.

    Args:
      kernel: a key of attention_backends.KERNELS.
      dtype: of queries, keys and values.
      features: of a head.

    Returns:
      Of the output and of each gradient, the largest difference as a share of the
      largest value; the largest of these.
    """
    random = np.random.default_rng(0)

    def normal(length: int) -> Any:
        shape = (2, length, _HEADS, features)
        return jnp.asarray(random.standard_normal(shape), dtype)

    q, k, v, g = (normal(n) for n in (_QUERIES, _KEYS, _KEYS, _QUERIES))
    mask = jnp.asarray(random.random((2, _KEYS)) < 0.7)

    def in_both_ways(q: Any, k: Any, v: Any) -> list[Any]:
        def plain(q: Any, k: Any, v: Any) -> Any:
            return attention.attend(q, k, v, mask[:, None, None])

        def fused(q: Any, k: Any, v: Any) -> Any:
            return attention_backends.KERNELS[kernel](q, k, v, mask)

        found = []
        for attend in (plain, fused):
            out, pull_back = jax.vjp(attend, q, k, v)
            found.append((out, *pull_back(g.astype(out.dtype))))
        return found

    plain, fused = jax.jit(in_both_ways)(q, k, v)
    shares = []
    for a, b in zip(plain, fused, strict=True):
        a, b = (np.asarray(each, np.float32) for each in (a, b))
        shares.append(np.abs(a - b).max() / np.abs(a).max())
    return float(np.max(shares))
