"""What the tests of the FLOPs counter share."""

import jax
import jax.numpy as jnp
from jax import lax

from scaling_ldm import flops


def spec(*shape, dtype=jnp.float32):
    """The shape and dtype of an array that is never made."""
    return jax.ShapeDtypeStruct(shape, dtype)


def total(fn, *args):
    """All FLOPs of a function."""
    return flops.count(fn, *args).total


def forward_and_backward(fn, *args):
    """FLOPs of the value, and of a gradient with respect to every argument."""
    argnums = tuple(range(len(args)))
    step = jax.value_and_grad(lambda *a: jnp.sum(fn(*a) ** 2), argnums)
    return total(fn, *args), total(step, *args)


X = spec(8, 8)
MATMUL = 2 * 8 * 8 * 8  # FLOPs of X @ X


def conv(
    stride=1, pad="SAME", lhs_dilation=1, rhs_dilation=1, groups=1, batch_groups=1
):
    """A 2-D convolution (x_BHWC, kernel) with these options."""

    def fn(x_BHWC, kernel):
        return lax.conv_general_dilated(
            x_BHWC,
            kernel,
            (stride, stride),
            pad,
            lhs_dilation=(lhs_dilation, lhs_dilation),
            rhs_dilation=(rhs_dilation, rhs_dilation),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
            batch_group_count=batch_groups,
        )

    return fn
