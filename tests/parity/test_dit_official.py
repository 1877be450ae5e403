"""DiT in the layout of its authors, and torch's files, compared with torch."""

import collections

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_array_equal

from scaling_ldm.models import positions
from scaling_ldm.models.denoisers import dit
from scaling_ldm.models.weights import dit as dit_weights
from scaling_ldm.models.weights import layout, torch_file

torch = pytest.importorskip("torch")
nn, F = torch.nn, torch.nn.functional

pytestmark = pytest.mark.parity
WIDTH, DEPTH, HEADS, CLASSES, SIDE, PATCH = 32, 2, 2, 5, 8, 2

SHAPE = dit.DiTConfig(
    architecture="adaln_zero",
    width=WIDTH,
    depth=DEPTH,
    heads=HEADS,
    image_shape=(SIDE, SIDE, 4),
    patch_size=PATCH,
    mlp_ratio=4,
    activation="gelu",
    text_tokens=0,
    text_width=0,
    time_width=256,
    vocab_size=0,
    classes=CLASSES,
    dtype=jnp.float32,
    remat="none",
    unroll=False,
    grid=positions.PositionGrid(columns_first=True),
    out_channels=8,
)


def plain_norm(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


def modulated(x, shift, scale):
    return plain_norm(x) * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Module()
        self.attn.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.attn.proj = nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Module()
        self.mlp.fc1 = nn.Linear(WIDTH, 4 * WIDTH)
        self.mlp.fc2 = nn.Linear(4 * WIDTH, WIDTH)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c):
        by = self.adaLN_modulation(c).chunk(6, dim=1)
        B, N, _ = x.shape
        qkv = self.attn.qkv(modulated(x, by[0], by[1]))
        q, k, v = qkv.reshape(B, N, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
        x = x + by[2].unsqueeze(1) * self.attn.proj(seen.reshape(B, N, WIDTH))
        h = F.gelu(self.mlp.fc1(modulated(x, by[3], by[4])), approximate="tanh")
        return x + by[5].unsqueeze(1) * self.mlp.fc2(h)


class Dit(nn.Module):
    """The published network, written again from its paper with its authors' names."""

    def __init__(self):
        super().__init__()
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv2d(4, WIDTH, PATCH, PATCH)
        self.t_embedder = nn.Module()
        self.t_embedder.mlp = nn.Sequential(
            nn.Linear(256, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH)
        )
        self.y_embedder = nn.Module()
        self.y_embedder.embedding_table = nn.Embedding(CLASSES + 1, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.final_layer = nn.Module()
        self.final_layer.linear = nn.Linear(WIDTH, PATCH**2 * 8)
        self.final_layer.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH)
        )
        side = SIDE // PATCH
        rate = 1 / 10_000 ** (np.arange(WIDTH // 4) / (WIDTH / 4))
        line = np.arange(side)[:, None] * rate
        line = np.concatenate([np.sin(line), np.cos(line)], axis=1)
        column = np.broadcast_to(line[None], (side, side, WIDTH // 2))
        table = np.concatenate([column, column.swapaxes(0, 1)], axis=-1)
        table = torch.from_numpy(table.reshape(1, -1, WIDTH)).float()
        self.pos_embed = nn.Parameter(table, requires_grad=False)

    def forward(self, x, t, y):
        B = x.shape[0]
        x = self.x_embedder.proj(x).flatten(2).transpose(1, 2) + self.pos_embed
        rate = torch.exp(-np.log(10_000) * torch.arange(128) / 128)
        angle = t[:, None].float() * rate
        c = self.t_embedder.mlp(torch.cat([angle.cos(), angle.sin()], dim=1))
        c = c + self.y_embedder.embedding_table(y)
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
        x = self.final_layer.linear(modulated(x, shift, scale))
        x = x.reshape(B, SIDE // PATCH, SIDE // PATCH, PATCH, PATCH, 8)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(B, 8, SIDE, SIDE)


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    net = Dit()
    for name, parameter in net.named_parameters():
        if name != "pos_embed":
            parameter.data = 0.15 * torch.randn(parameter.shape)
    return net


@pytest.mark.parametrize("legacy", [False, True])
def test_forward_from_their_file(theirs, tmp_path, legacy):
    torch.save(
        {"ema": theirs.state_dict()},
        tmp_path / "dit.pt",
        _use_new_zipfile_serialization=not legacy,
    )
    params = dit_weights.load(tmp_path / "dit.pt", SHAPE, "official")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, SIDE, SIDE, 4)).astype("f")
    t, label = np.asarray([3, 871]), np.asarray([1, CLASSES])
    with torch.no_grad():
        wanted = theirs(
            torch.from_numpy(x).permute(0, 3, 1, 2),
            torch.from_numpy(t),
            torch.from_numpy(label),
        )
    wanted = wanted.permute(0, 2, 3, 1).numpy()
    got = dit.apply(SHAPE, params, x, jnp.asarray(t / 1000, "f"), {"label": label})
    assert np.abs(got - wanted).max() <= 1e-4 * np.abs(wanted).max()


def test_weights_go_round(theirs, tmp_path):
    given = {name: v.detach().numpy() for name, v in theirs.state_dict().items()}
    layout.save(given, tmp_path / "in.safetensors")
    params = dit_weights.load(tmp_path / "in.safetensors", SHAPE, "official")
    dit_weights.save(params, tmp_path / "out.safetensors", SHAPE, "official")
    back = layout.load(tmp_path / "out.safetensors")
    assert back.keys() == given.keys()
    for name, value in given.items():
        if name == "pos_embed":  # computed when it is written
            np.testing.assert_allclose(back[name], value, atol=1e-7)
        else:
            assert_array_equal(back[name], value, err_msg=name)
    theirs.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in back.items()})


def test_another_table_of_positions_is_refused(theirs, tmp_path):
    given = {name: v.detach().numpy() for name, v in theirs.state_dict().items()}
    given["pos_embed"] = given["pos_embed"][:, ::-1]
    layout.save(given, tmp_path / "in.safetensors")
    with pytest.raises(layout.WeightsError, match="pos_embed differs from the"):
        dit_weights.load(tmp_path / "in.safetensors", SHAPE, "official")


@pytest.mark.parametrize("legacy", [False, True])
def test_files_hold_what_torch_reads(tmp_path, legacy):
    torch.manual_seed(0)
    base = torch.randn(4, 6, 8)
    saved = collections.OrderedDict(
        model=collections.OrderedDict(
            transposed=base.permute(2, 0, 1),
            view=base[1:3, ::2, 3],
            shared=base,
            scalar=torch.tensor(3.5),
            empty=torch.zeros(0, 3),
            parameter=nn.Parameter(torch.randn(2, 2)),
            half=torch.randn(5).half(),
            brain=torch.randn(5).bfloat16(),
            double=torch.randn(2, 2, dtype=torch.float64),
            whole=torch.arange(-3, 3),
            byte=torch.arange(3, dtype=torch.uint8),
            true=torch.tensor([True, False]),
            channels_last=torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        ),
        step=7,
        names=["a", ("b", None)],
    )
    path = tmp_path / "saved.pt"
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy)
    got, wanted = torch_file.read(path), torch.load(path, weights_only=True)
    assert got["step"] == wanted["step"] and got["names"] == wanted["names"]
    assert got["model"].keys() == wanted["model"].keys()
    for name, tensor in wanted["model"].items():
        array = got["model"][name]
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch."), name
        assert array.flags.c_contiguous and array.shape == tuple(tensor.shape)
        assert_array_equal(
            array.astype("f8"), tensor.detach().double().numpy(), err_msg=name
        )
    assert torch_file.load(path).keys() == wanted["model"].keys()
    # Such a tensor could be of any size in a small file.
    torch.save(
        {"expanded": torch.randn(1, 3).expand(4, 3)},
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    with pytest.raises(layout.WeightsError, match="save it with .contiguous"):
        torch_file.read(path)


@pytest.mark.parametrize("legacy", [False, True])
def test_modules_are_refused(tmp_path, legacy):
    path = tmp_path / "module.pt"
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(layout.WeightsError, match="torch.nn.modules.linear.Linear"):
        torch_file.read(path)
