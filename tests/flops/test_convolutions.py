"""Convolutions and their gradients against closed forms."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flops_helpers import conv, forward_and_backward, spec, total
from jax import lax


def test_conv_closed_forms():
    x, w = spec(2, 9, 9, 4), spec(3, 3, 4, 6)
    taps = 2 * 2 * 9 * 4 * 6  # 2 x batch x kernel x channels in x channels out
    assert total(conv(), x, w) == taps * 81
    assert total(conv(pad="VALID"), x, w) == taps * 49
    assert total(conv(stride=2), x, w) == taps * 25
    assert total(conv(pad="VALID", rhs_dilation=2), x, w) == taps * 25
    assert total(conv(groups=2), x, spec(3, 3, 2, 6)) == taps * 81 // 2
    assert total(conv(groups=4), x, spec(3, 3, 1, 4)) == 2 * 2 * 9 * 4 * 81
    assert total(conv(batch_groups=2), x, w) == taps * 81 // 2


def test_conv_counts_taps_on_padding_even_where_the_kernel_is_larger():
    assert total(conv(), spec(1, 2, 2, 1), spec(3, 3, 1, 1)) == 2 * 4 * 9


SIZES = (4, 7, 8)
KERNELS = (1, 2, 3, 5)
PADDINGS = ("SAME", "VALID", [(1, 0), (2, 1)])
BY_DAY = ((1, 1, 1), (1, 2, 2), (2, 1, 3), (2, 2, 2))  # of groups, dilation, stride


@pytest.mark.parametrize(
    ("groups", "dilation", "stride"),
    [
        pytest.param(*each, marks=() if each in BY_DAY else pytest.mark.slow)
        for each in itertools.product((1, 2), (1, 2), (1, 2, 3))
    ],
)
def test_conv_forward_and_backward_is_three_times_forward(stride, dilation, groups):
    for size, k, pad in itertools.product(SIZES, KERNELS, PADDINGS):
        if pad == "VALID" and size < (k - 1) * dilation + 1:
            continue
        fn = conv(stride, pad, rhs_dilation=dilation, groups=groups)
        args = spec(2, size, size, 4), spec(k, k, 4 // groups, 6)
        out = jax.eval_shape(fn, *args).shape
        if 0 in out:
            continue
        forward, step = forward_and_backward(fn, *args)
        expected = 2 * 2 * out[1] * out[2] * k * k * 4 * 6 // groups
        assert forward == expected, (size, k, pad)
        assert step == 3 * forward, (size, k, pad)


@pytest.mark.parametrize("kernel_dilation", [1, 2])
@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("k", [2, 3, 4])
@pytest.mark.parametrize("dilation", [2, 3])
def test_transposed_conv_meets_every_input_with_every_tap(
    dilation, k, size, kernel_dilation
):
    reach = (k - 1) * kernel_dilation
    fn = conv(
        pad=[(reach, reach)] * 2, lhs_dilation=dilation, rhs_dilation=kernel_dilation
    )
    forward, step = forward_and_backward(fn, spec(2, size, size, 4), spec(k, k, 4, 6))
    assert forward == 2 * 2 * size**2 * k**2 * 4 * 6
    assert step == 3 * forward


@pytest.mark.parametrize("transpose_kernel", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_lax_conv_transpose_backward(transpose_kernel, stride, padding):
    def fn(x, w):
        return lax.conv_transpose(
            x,
            w,
            (stride, stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            transpose_kernel=transpose_kernel,
        )

    forward, step = forward_and_backward(fn, spec(2, 5, 5, 4), spec(3, 3, 4, 4))
    plain = stride == 1 and padding == "VALID"  # counted as a convolution
    assert forward == 2 * 2 * (49 if plain else 25) * 9 * 16
    assert step == 3 * forward


def test_resampling_conv_backward():
    fn = conv(stride=3, lhs_dilation=2, pad=[(1, 1), (1, 1)])
    forward, step = forward_and_backward(fn, spec(2, 9, 9, 4), spec(3, 3, 4, 6))
    assert forward == 2 * 2 * (6 * 3 // 2) ** 2 * 4 * 6  # 6 outputs, half of the taps
    assert step == 3 * forward


def test_batch_groups_backward():
    forward, step = forward_and_backward(
        conv(batch_groups=2), spec(4, 5, 5, 3), spec(3, 3, 3, 6)
    )
    assert forward == 2 * 2 * 25 * 9 * 3 * 6
    assert step == 3 * forward


def test_conv_under_vmap_over_kernels_and_jit():
    fn = jax.jit(jax.vmap(conv(pad="VALID")))
    forward, step = forward_and_backward(fn, spec(3, 2, 7, 7, 4), spec(3, 3, 3, 4, 6))
    assert forward == 3 * 2 * 2 * 25 * 9 * 4 * 6
    assert step == 3 * forward


def test_vmapped_gradient_with_a_kernel_larger_than_the_input():
    fn = conv(pad=[(1, 1), (1, 1)])
    args = spec(3, 2, 4, 4, 4), spec(3, 5, 5, 4, 6)

    def loss(x, w):
        return jnp.sum(fn(x, w) ** 2)

    step = jax.vmap(jax.value_and_grad(loss, (0, 1)))
    assert total(jax.vmap(fn), *args) == 3 * 2 * 2 * 4 * 25 * 4 * 6
    assert total(step, *args) == 3 * total(jax.vmap(fn), *args)


def test_flipped_activations_are_not_taken_for_a_flipped_kernel():
    def fn(x, w):
        return lax.rev(conv(pad="VALID")(x, w), (1, 2))

    forward, step = forward_and_backward(fn, spec(2, 9, 9, 4), spec(3, 3, 4, 6))
    assert step == 3 * forward


def test_conv_with_features_first_and_batch_last():
    def fn(x, w):
        layout = ("CHWN", "HWIO", "CHWN")
        return lax.conv_general_dilated(x, w, (1, 1), "VALID", dimension_numbers=layout)

    forward, step = forward_and_backward(fn, spec(4, 9, 9, 2), spec(3, 3, 4, 6))
    assert forward == 2 * 2 * 49 * 9 * 4 * 6
    assert step == 3 * forward


@pytest.mark.parametrize("features", [1, 3])
def test_conv_in_one_and_three_dimensions(features):
    module = nn.Conv(5, (3,) * features, strides=2, padding="VALID")
    x = spec(2, *(9,) * features, 4)
    params = jax.eval_shape(module.init, jax.random.key(0), x)

    def fn(x, p):
        return module.apply(p, x)

    forward, step = forward_and_backward(fn, x, params)
    assert forward == 2 * 2 * (4 * 3) ** features * 4 * 5
    assert step == 3 * forward
