"""Which attention a denoiser computes: the plain one, or a kernel of its backend.

The choice is made while a program is traced. It depends on the devices of the mesh,
which need not be on this machine.

plain   `attention.attend`, on every backend.
cudnn   cuDNN's flash attention, on NVIDIA GPUs.
pallas  the kernels of `attention_kernel`, on TPUs.
auto    the kernel of the backend where there is one for these shapes, else plain.

A kernel works on the rows of one device, inside `sharded.on_rows` or on a mesh of one
device. Without a mesh, or where axes other than the rows are split, the plain form is
used, whatever was chosen. Shapes and FLOPs are the same. No kernel has a forward
derivative (`attention.attend` has none either) or a second derivative.

Letters: B batch, T queries, S keys, K heads, H features of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Bool, Float

from scaling_ldm import config
from scaling_ldm.models import attention
from scaling_ldm.models.shapes import Array

# With fewer queries most of a tile is padding. This limit was not measured.
FEWEST_QUERIES = 128
# Features of a head that cuDNN takes on every GPU since Ampere.
_CUDNN_FEATURES = range(8, 128 + 1, 8)
_CUDNN_DTYPES = (jnp.bfloat16, jnp.float16)


def attend(
    q_BTKH: Float[Array, "B T K H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    mask: Bool[Array, "_ 1 _ S"] | None,
    choice: str,
) -> Float[Array, "B T K H"]:
    """Computes `attention.attend` in the way that `choice` names.

    Args:
      choice: a name of config.ATTENTION.

    Raises:
      ConfigError: the choice cannot run on the devices of the mesh, or with these
        heads; cuDNN is not installed.
    """
    kernel = _kernel(choice, q_BTKH, mask)
    if kernel is None:
        return attention.attend(q_BTKH, k_BSKH, v_BSKH, mask)
    B, S = k_BSKH.shape[:2]
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, 0, 0], (B, S))
    given = (q_BTKH, k_BSKH, v_BSKH, mask)
    if AxisType.Explicit not in jax.sharding.get_abstract_mesh().axis_types:
        return KERNELS[kernel](*given)
    # One device: no axis is divided, and a kernel need not know that axes have names.
    whole = jax.tree.map(lambda a: jax.sharding.reshard(a, PartitionSpec()), given)
    return jax.sharding.reshard(
        KERNELS[kernel](*whole), jax.typeof(q_BTKH).sharding.spec
    )


def check(choice: str, platform: str) -> None:
    """Refuses a choice that no device of a platform can run (ConfigError)."""
    runs_on = config.ATTENTION[choice]
    if runs_on and _backend(platform) not in runs_on:
        raise config.ConfigError(
            f"config.model.attention = {choice!r} runs on {' or '.join(runs_on)}, not "
            f"on {_backend(platform)}; 'auto' and 'plain' run everywhere"
        )


def _backend(platform: str) -> str:
    return "gpu" if platform in ("gpu", "cuda", "rocm") else platform


def kernel_of(choice: str, device: Any) -> str | None:
    """The kernel that a choice names on a kind of device; None: the plain form.

    Args:
      choice: a name of config.ATTENTION.
      device: with `platform` and `device_kind`; it need not be here.

    Raises:
      ConfigError: no device of this platform can run it.
    """
    if choice == "plain":
        return None
    check(choice, device.platform)
    if choice != "auto":
        return choice
    kernel = {"gpu": "cudnn", "tpu": "pallas"}.get(_backend(device.platform))
    if kernel == "cudnn" and not _may_have_cudnn(device):
        return None
    return kernel


def _may_have_cudnn(device: Any) -> bool:
    """Whether it is a GPU of NVIDIA since Ampere, as far as its description says."""
    if "NVIDIA" not in device.device_kind:
        return False
    # A described device has no compute capability: those of `compile` are newer.
    return float(getattr(device, "compute_capability", "8.0")) >= 8.0


def _kernel(choice: str, q_BTKH: Any, mask: Any) -> str | None:
    """The name of the kernel to use; None: the plain form."""
    mesh = jax.sharding.get_abstract_mesh()
    device = getattr(mesh, "abstract_device", None)
    if mesh.empty or device is None:
        return None
    kernel = kernel_of(choice, device)
    if kernel is None or (mesh.size > 1 and set(mesh.axis_types) != {AxisType.Manual}):
        return None
    if choice == "auto" and q_BTKH.shape[1] < FEWEST_QUERIES:
        return None
    if mask is not None and mask.shape[2] > 1:
        why = "each query has its own mask; the kernels take one mask for all queries"
    else:
        why = impossible(kernel, q_BTKH.dtype, q_BTKH.shape[-1])
    if why and choice != "auto":
        raise config.ConfigError(f"config.model.attention = {choice!r}: {why}")
    return None if why else kernel


def impossible(kernel: str, dtype: Any, features: int) -> str:
    """Why a kernel cannot compute with this type and size of heads; "": it can."""
    if kernel == "cudnn" and dtype not in _CUDNN_DTYPES:
        return f"it computes in bfloat16, not in {dtype}"
    if kernel == "cudnn" and features not in _CUDNN_FEATURES:
        return (
            f"a head has {features} features; cuDNN takes multiples of 8 up to "
            f"{_CUDNN_FEATURES[-1]}"
        )
    return ""


def _pallas(
    q_BTKH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BS: Any,
    *,
    interpret: bool = False,
) -> Any:
    from scaling_ldm.models import attention_kernel  # Pallas takes long to import

    q, k, v = (a.transpose(0, 2, 3, 1) for a in (q_BTKH, k_BSKH, v_BSKH))
    out_BKHT = attention_kernel.attend(
        q * q_BTKH.shape[-1] ** -0.5, k, v, mask_BS, interpret=interpret
    )
    return out_BKHT.transpose(0, 3, 1, 2)


def _cudnn(
    q_BTKH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BS: Any,
    *,
    implementation: Any = "cudnn",
) -> jax.Array:
    """Gives cuDNN lengths. A mask would be stored for every pair of query and key.

    Attention does not depend on the order of the keys. So the keys that are seen come
    first, and their number is the length. If all keys are masked, the query is set to
    zero and sees all keys. All keys then get the same weight, as in the plain form.
    cuDNN has gradients for even lengths only, so an odd one gets a key, or query, that
    is not seen.
    """
    T, S = q_BTKH.shape[1], k_BSKH.shape[1]
    q, k, v = (
        jnp.pad(a, ((0, 0), (0, a.shape[1] % 2), (0, 0), (0, 0)))
        for a in (q_BTKH, k_BSKH, v_BSKH)
    )
    lengths: dict[str, Any] = {}
    if mask_BS is not None or T % 2 or S % 2:
        seen_B = jnp.full_like(q[:, 0, 0, 0], S, jnp.int32)
        if mask_BS is not None:
            count_B = mask_BS.sum(1, dtype=jnp.int32)
            q = jnp.where((count_B > 0)[:, None, None, None], q, 0)
            seen_B = jnp.where(count_B > 0, count_B, S)
            order_BS = jnp.argsort(~mask_BS, axis=1, stable=True)
            order_BS = jnp.pad(order_BS, ((0, 0), (0, S % 2)), constant_values=S)
            k, v = (
                jnp.take_along_axis(a, order_BS[..., None, None], axis=1)
                for a in (k, v)
            )
        is_seen = (jnp.arange(k.shape[1])[None] < seen_B[:, None])[..., None, None]
        k, v = jnp.where(is_seen, k, 0), jnp.where(is_seen, v, 0)
        lengths["query_seq_lengths"] = jnp.full_like(seen_B, T)
        lengths["key_value_seq_lengths"] = seen_B
    try:
        with jax.named_scope(f"attention_of_{T}x{S}"):  # what `flops` counts
            out = jax.nn.dot_product_attention(
                q, k, v, implementation=implementation, **lengths
            )
    except RuntimeError as e:
        if "cuDNN" not in str(e):
            raise
        raise config.ConfigError(
            "the attention of GPUs needs cuDNN, which is not found: install "
            "nvidia-cudnn-cu13, or set config.model.attention = 'plain'"
        ) from e
    return out[:, :T]


KERNELS: dict[str, Callable[..., jax.Array]] = {"cudnn": _cudnn, "pallas": _pallas}
