"""An experiment's pretrained networks, run on this host's devices batch by batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from scaling_ldm import config
from scaling_ldm.data import encoded, shards
from scaling_ldm.models import pretrained
from scaling_ldm.training import mesh


class FrozenNetworks:
    """The pretrained autoencoder and text encoder of an experiment, if it has them.

    side: (height, width) of the pictures that give latents of data.shape.
    layout: of the records.
    rows: of a batch on the devices; every call has as many, so it compiles once.
    uncond: features of the empty caption, [tokens, E], or None.

    Raises:
      ConfigError: a network does not fit the experiment.
    """

    def __init__(self, experiment: config.Experiment) -> None:
        self._experiment = experiment
        cfg, (H, W, C) = experiment.encode, experiment.data.shape
        local = jax.local_devices()
        self._mesh = mesh.build(
            config.MeshConfig(fsdp=math.gcd(experiment.mesh.fsdp, len(local))),
            {},
            local,
        )
        self.rows = -(-cfg.batch_size // len(local)) * len(local)
        self._dtype = np.dtype(cfg.dtype)
        self._length = experiment.data.text_tokens
        self._image: pretrained.PretrainedAutoencoder | None = None
        self._text: pretrained.PretrainedTextEncoder | None = None
        params: dict[str, Any] = {}
        factor, stored, kind, width = 1, (H, W, C), "uint8", 0
        if cfg.autoencoder != "none":
            self._image = pretrained.autoencoder(cfg.autoencoder, cfg.compute_dtype)
            network = self._image.network
            _check_latents(experiment, network.factor, network.latent_channels)
            params["image"] = self._image.params
            factor, kind = network.factor, cfg.dtype
            stored = (H, W, 2 * C)
        if not experiment.reads_words:
            self._text = pretrained.text_encoder(cfg.text_encoder, cfg.compute_dtype)
            width = self._text.network.width
            encoded.check_width(experiment, width)
            _check_tokens(experiment, self._text.network.max_tokens)
            params["text"] = self._text.params
        self.side = (H * factor, W * factor)
        self.layout = shards.Layout(
            shape=stored, dtype=kind, text_width=width, text_dtype=cfg.dtype
        )
        self._params = mesh.place_params(self._mesh, params)
        batch = mesh.named_sharding(self._mesh, mesh.BATCH)
        self._apply = jax.jit(self._forward, out_shardings=batch)
        self.uncond: np.ndarray | None = None
        if self._text is not None:
            blank = np.zeros((*self.side, 3), np.uint8)
            _, features = self.read(self.start([blank], [""]))
            self.uncond = features[0] if features else None

    def describe(self) -> str:
        """Names and shapes, for people."""
        s, cfg = self.layout, self._experiment.encode
        shape = " x ".join(map(str, (*self.side, 3)))
        stored = " x ".join(map(str, self._experiment.data.shape))
        said = f"{cfg.autoencoder} ({shape} -> {stored})"
        if self._image is None:
            said = f"no autoencoder ({shape} pixels)"
        if self._text is None:
            return f"{said}, text as words"
        return f"{said}, {cfg.text_encoder} ({self._length} tokens of {s.text_width})"

    def _forward(self, params: Any, given: dict[str, jax.Array]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        if self._image is not None:
            x = given["image"].astype(jnp.float32) / 127.5 - 1
            moments = self._image.network.encode(params["image"], x)
            found["x"] = moments.astype(self._dtype)
        if self._text is not None:
            encode = self._text.network.apply
            features = encode(params["text"], given["ids"], given["mask"])
            found["features"] = features.astype(self._dtype)
        return found

    def start(self, images: Sequence[np.ndarray], captions: Sequence[str]) -> Any:
        """Starts to encode a batch of at most `rows` pictures; `read` waits for it.

        Args:
          images: uint8 [height, width, 3] each.
          captions: as many.
        """
        stacked = np.stack(images)
        if self.layout.shape[2] == 1:
            stacked = _grey(stacked)
        given = {"image": _pad(stacked, self.rows)}
        if self._text is not None:
            ids, mask = self._text.tokenizer.encode(captions, self._length)
            given |= {"ids": _pad(ids, self.rows), "mask": _pad(mask, self.rows)}
        if self._image is None and self._text is None:
            return given, len(images), {}
        with jax.set_mesh(self._mesh):
            sharding = mesh.named_sharding(self._mesh, mesh.BATCH)
            found = self._apply(self._params, jax.device_put(given, sharding))
        return given, len(images), found

    def read(self, started: Any) -> tuple[np.ndarray, list[np.ndarray] | None]:
        """The results of `start`, without the rows that filled the batch.

        Returns:
          The arrays to store, [n, ...], and the features of each caption, [tokens, E],
          or None if captions are stored as words.
        """
        given, count, found = started
        x = np.asarray(found["x"] if self._image is not None else given["image"])
        if self._text is None:
            return x[:count], None
        features = np.asarray(found["features"])
        tokens = given["mask"].sum(1)
        return x[:count], [features[i, : tokens[i]] for i in range(count)]

    def scaled(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance, float32 [n, H, W, C], of what a denoiser will read.

        Args:
          x: arrays to store, as `read` returns them.
        """
        x = x.astype(np.float32)
        if self._image is None:
            return x / np.float32(127.5) - 1, np.zeros_like(x)
        mean, log_variance = np.split(x, 2, axis=-1)
        network = self._image.network
        variance = np.exp(log_variance) * np.float32(network.scale**2)
        return np.asarray(network.to_latent(mean)), variance


def _grey(images: np.ndarray) -> np.ndarray:
    """uint8 [n, h, w, 3] -> [n, h, w, 1]: luma of ITU-R BT.601, exact where R=G=B."""
    luma = images.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((luma + (1 << 15)) >> 16).astype(np.uint8)[..., None]


def _pad(rows: np.ndarray, length: int) -> np.ndarray:
    return np.pad(rows, [(0, length - len(rows))] + [(0, 0)] * (rows.ndim - 1))


def _check_latents(experiment: config.Experiment, factor: int, channels: int) -> None:
    shape = experiment.data.shape
    if shape[2] != channels:
        raise config.ConfigError(
            f"config.data.shape = {shape}: the latents of "
            f"{experiment.encode.autoencoder} have {channels} channels, and are "
            f"{factor} times smaller than the pictures; {shape[0] * factor} x "
            f"{shape[1] * factor} pictures give {(*shape[:2], channels)}"
        )


def _check_tokens(experiment: config.Experiment, most: int) -> None:
    if experiment.data.text_tokens > most:
        raise config.ConfigError(
            f"config.data.text_tokens = {experiment.data.text_tokens}: "
            f"{experiment.encode.text_encoder} reads at most {most}"
        )
