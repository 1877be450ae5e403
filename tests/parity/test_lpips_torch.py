"""LPIPS gives the numbers of the same networks in torch, on random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_ldm import flops
from scaling_ldm.models.encoders import lpips
from scaling_ldm.models.weights import lpips as weights

torch = pytest.importorskip("torch")
flop_counter = pytest.importorskip("torch.utils.flop_counter")
nn = torch.nn

pytestmark = pytest.mark.parity


def vgg16():
    """`features` of torchvision's vgg16 without the last pool, and the layers read."""
    found, inputs = [], 3
    for stage in ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3):
        for outputs in stage:
            found += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        found.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*found[:-1]), (3, 8, 15, 22, 29)


def alexnet():
    return nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(),
    ), (1, 4, 7, 9, 11)


class Theirs(nn.Module):
    """Zhang et al.'s distance as their package computes it."""

    def __init__(self, name):
        super().__init__()
        self.features, self.taps = {"vgg": vgg16, "alex": alexnet}[name]()
        widths = {"vgg": (64, 128, 256, 512, 512), "alex": (64, 192, 384, 256, 256)}
        for i, width in enumerate(widths[name]):
            head = nn.Conv2d(width, 1, 1, bias=False)
            self.add_module(f"lin{i}", nn.ModuleDict({"model": self._named(head)}))

    @staticmethod
    def _named(head):
        return nn.Sequential(nn.Dropout(), head)

    def outputs(self, x):
        shift = torch.tensor([-0.030, -0.088, -0.188])[None, :, None, None]
        scale = torch.tensor([0.458, 0.448, 0.450])[None, :, None, None]
        x = (x.permute(0, 3, 1, 2) / 255 * 2 - 1 - shift.to(x)) / scale.to(x)
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i in self.taps:
                length = torch.sqrt(torch.sum(x**2, dim=1, keepdim=True))
                yield x / (length + 1e-10)

    def forward(self, x, y):
        terms = []
        for i, (a, b) in enumerate(zip(self.outputs(x), self.outputs(y), strict=True)):
            head = getattr(self, f"lin{i}")["model"]
            terms.append(head((a - b) ** 2).mean((1, 2, 3)))
        return sum(terms)


def randomised(name):
    torch.manual_seed(0)
    net = Theirs(name).eval()
    with torch.no_grad():
        for key, p in net.named_parameters():
            if key.startswith("lin"):
                p.uniform_(0, 1)
            elif p.ndim == 4:
                p.normal_(0, (2 / p[0].numel()) ** 0.5)
            else:
                p.normal_(0, 0.1)
    return net


def saved(net, place, form):
    """Writes backbone and heads to two files, as torchvision and the package do."""
    heads = {k: v for k, v in net.state_dict().items() if k.startswith("lin")}
    rest = {k: v for k, v in net.state_dict().items() if k not in heads}
    paths = []
    for name, tensors in (("backbone", rest), ("heads", heads)):
        path = place / f"{name}.{'safetensors' if form == 'safetensors' else 'pth'}"
        if form == "safetensors":
            from safetensors.torch import save_file

            save_file(tensors, path)
        else:
            zipped = form == "zip"
            torch.save(tensors, path, _use_new_zipfile_serialization=zipped)
        paths.append(path)
    return paths


@pytest.mark.parametrize(
    ("name", "form"),
    [("vgg", "plain"), ("vgg", "safetensors"), ("alex", "plain"), ("alex", "zip")],
)
def test_distances(name, form, tmp_path):
    net, config = randomised(name), lpips.BACKBONES[name]
    params = weights.load(*saved(net, tmp_path, form), config)
    distance = jax.jit(functools.partial(lpips.distance, config))
    rng = np.random.default_rng(0)
    for size in [(64, 64), (33, 70), (config.smallest, 47)]:
        x = rng.uniform(0, 255, (3, *size, 3)).astype("f")
        y = np.clip(x + rng.normal(size=x.shape) * 30, 0, 255).astype("f")
        y[2] = x[2]
        with torch.no_grad():
            wanted = net(torch.from_numpy(x), torch.from_numpy(y)).numpy()
        got = np.asarray(distance(params, x, y))
        assert wanted[:2].min() > 0.01 and wanted[2] == got[2] == 0
        assert np.abs(got - wanted).max() <= 1e-4 * wanted.max()
        assert np.abs(got - np.asarray(distance(params, y, x))).max() == 0


@pytest.mark.parametrize("name", lpips.BACKBONES)
def test_counts(name):
    config = lpips.BACKBONES[name]
    net = Theirs(name).eval().to("meta")
    x = torch.empty((2, 64, 96, 3), device="meta")
    with flop_counter.FlopCounterMode(display=False) as counter, torch.no_grad():
        list(net.outputs(x))
    x = jax.ShapeDtypeStruct(tuple(x.shape), jnp.float32)
    distance = functools.partial(lpips.distance, config)
    counted = flops.count(distance, lpips.shapes(config), x, x)
    assert counted.total == 2 * counter.get_total_flops()  # two pictures
    ours = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(lpips.shapes(config)))
    assert ours == sum(p.numel() for p in net.parameters())
