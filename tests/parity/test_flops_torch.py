"""FLOPs equal torch's FlopCounterMode, to the last one, on equivalent modules.

Torch is run on the meta device, so nothing is computed. Both count 2 x MAC and every
tap on padding. Where torch's formula is wrong, the test says by how much and checks
that too, so that a repair upstream is noticed.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from scaling_ldm import flops

torch = pytest.importorskip("torch")
flop_counter = pytest.importorskip("torch.utils.flop_counter")
F = torch.nn.functional

pytestmark = pytest.mark.parity


def torch_flops(fn, *shapes):
    """FLOPs of the forward pass, and of forward + backward to every argument."""
    args = [torch.empty(shape, device="meta", requires_grad=True) for shape in shapes]
    counts = []
    for backward in (False, True):
        with flop_counter.FlopCounterMode(display=False) as counter:
            out = fn(*args)
            if backward:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    return tuple(counts)


def jax_flops(fn, *shapes):
    args = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]

    def loss(*args):
        return jnp.sum(fn(*args) ** 2)

    step = jax.value_and_grad(loss, tuple(range(len(args))))
    return flops.count(fn, *args).total, flops.count(step, *args).total


def test_linear():
    theirs = torch_flops(F.linear, (6, 5, 16), (24, 16), (24,))
    ours = jax_flops(
        lambda x, w, b: x @ w.T + b[None, None], (6, 5, 16), (24, 16), (24,)
    )
    assert ours == theirs == (2 * 30 * 16 * 24, 3 * 2 * 30 * 16 * 24)


def test_mlp():
    shapes = (6, 16), (64, 16), (64,), (16, 64), (16,)
    theirs = torch_flops(
        lambda x, w, b, v, c: F.linear(F.gelu(F.linear(x, w, b)), v, c), *shapes
    )
    ours = jax_flops(
        lambda x, w, b, v, c: jax.nn.gelu(x @ w.T + b[None]) @ v.T + c[None], *shapes
    )
    assert ours == theirs


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_attention(causal, cross):
    query, key = (2, 4, 16, 8), (2, 4, 24 if cross else 16, 8)
    math_only = torch.nn.attention.SDPBackend.MATH
    with torch.nn.attention.sdpa_kernel(math_only):
        theirs = torch_flops(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal),
            query,
            key,
            key,
        )

    def swap(shape):
        return shape[0], shape[2], shape[1], shape[3]

    ours = jax_flops(
        lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal),
        swap(query),
        swap(key),
        swap(key),
    )
    assert ours == theirs


def conv_nchw(stride, pad, dilation, groups, spatial):
    letters = "DHW"[3 - spatial :]

    def fn(x, w):
        return jax.lax.conv_general_dilated(
            x,
            w,
            (stride,) * spatial,
            [(pad, pad)] * spatial,
            rhs_dilation=(dilation,) * spatial,
            feature_group_count=groups,
            dimension_numbers=("NC" + letters, "OI" + letters, "NC" + letters),
        )

    return fn


CONVS = [
    # stride, padding, dilation, groups, spatial dimensions
    (1, 0, 1, 1, 2),
    (1, 1, 1, 1, 2),
    (1, 3, 1, 1, 2),  # more padding than kernel
    (2, 0, 1, 1, 2),
    (2, 1, 1, 1, 2),
    (3, 2, 1, 1, 2),
    (1, 1, 2, 1, 2),
    (2, 2, 3, 1, 2),
    (2, 1, 2, 1, 1),
    (2, 1, 1, 1, 3),
    (1, 1, 1, 2, 2),
    (2, 1, 1, 4, 2),
    (2, 2, 2, 8, 2),  # depthwise
]


@pytest.mark.parametrize("case", CONVS, ids=str)
def test_convolution(case):
    stride, pad, dilation, groups, spatial = case
    x, w = (2, 8, *(9,) * spatial), (16, 8 // groups, *(3,) * spatial)
    conv = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    forward, step = torch_flops(
        lambda x, w: conv(
            x, w, stride=stride, padding=pad, dilation=dilation, groups=groups
        ),
        x,
        w,
    )
    # Torch takes the kernel gradient's channel count from the ungrouped tensors: it
    # multiplies every input channel with every output channel, `groups` times too many.
    kernel_gradient = forward * groups
    assert step == 2 * forward + kernel_gradient
    assert jax_flops(conv_nchw(*case), x, w) == (forward, 3 * forward)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolution(stride, pad, dilation, groups):
    x, w = (2, 8, 7, 7), (8, 16 // groups, 3, 3)
    forward, step = torch_flops(
        lambda x, w: F.conv_transpose2d(
            x, w, stride=stride, padding=pad, dilation=dilation, groups=groups
        ),
        x,
        w,
    )
    assert forward == 2 * 2 * 49 * 9 * 8 * 16 // groups
    assert step == 2 * forward + forward * groups  # as in test_convolution
    reach = 2 * dilation - pad

    def transposed(x, w):
        # (in, out / groups) -> (out, in / groups), and reversed in space.
        w = w.reshape(groups, 8 // groups, 16 // groups, 3, 3).swapaxes(1, 2)
        w = jnp.flip(w.reshape(16, 8 // groups, 3, 3), (2, 3))
        return jax.lax.conv_general_dilated(
            x,
            w,
            (1, 1),
            [(reach, reach)] * 2,
            lhs_dilation=(stride, stride),
            rhs_dilation=(dilation, dilation),
            feature_group_count=groups,
            dimension_numbers=("NCHW", "OIHW", "NCHW"),
        )

    ours = jax_flops(transposed, x, w)
    if stride == 1:
        # No dilated input tells it from a convolution, so it is counted as one: by its
        # outputs, where torch goes by the inputs.
        side = 7 + 2 * reach - 2 * dilation
        forward = forward // 49 * side**2
    assert ours == (forward, 3 * forward)


class FlaxBlock(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, x_BND):
        normed = nn.LayerNorm()(x_BND)
        x_BND = x_BND + nn.MultiHeadDotProductAttention(num_heads=self.heads)(normed)
        hidden = nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(x_BND)))
        return x_BND + nn.Dense(self.width)(hidden)


def torch_block(width, heads):
    return torch.nn.TransformerEncoderLayer(
        width,
        heads,
        4 * width,
        dropout=0.0,
        activation="gelu",
        batch_first=True,
        norm_first=True,
        device="meta",
    )


@pytest.mark.parametrize("remat", [False, True])
def test_transformer_block(remat):
    width, heads, shape = 32, 4, (2, 24, 32)
    block = torch_block(width, heads)
    math_only = torch.nn.attention.SDPBackend.MATH
    with torch.nn.attention.sdpa_kernel(math_only):
        theirs = torch_flops(block, shape)
    module = (nn.remat(FlaxBlock) if remat else FlaxBlock)(width, heads)
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), x)

    def loss(params, x):
        return jnp.sum(module.apply(params, x) ** 2)

    forward = flops.count(module.apply, params, x)
    step = flops.count(jax.value_and_grad(loss, (0, 1)), params, x)
    assert (forward.total, step.model) == theirs
    assert (step.hardware > step.model) == remat
    tokens = 2 * 24
    closed_form = 2 * tokens * 12 * width**2 + 2 * 2 * 2 * 24 * 24 * width
    assert theirs == (closed_form, 3 * closed_form)


def test_flash_attention_backward_recomputes_the_scores(monkeypatch):
    """Torch counts five products for a fused backward, as our hardware FLOPs do."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(fused, "check_compute_capability", lambda *_: True)
    shape = (2, 4, 64, 32)
    theirs = flop_counter.sdpa_flop_count(shape, shape, shape)
    theirs += flop_counter.sdpa_backward_flop_count(shape, shape, shape, shape)
    x = jax.ShapeDtypeStruct((2, 64, 4, 32), jnp.bfloat16)

    def loss(q, k, v):
        out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
        return jnp.sum(out.astype(jnp.float32))

    ours = flops.count(jax.value_and_grad(loss, (0, 1, 2)), x, x, x)
    assert ours.hardware == theirs
