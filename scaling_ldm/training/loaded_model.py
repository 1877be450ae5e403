"""A trained network with all that it takes to draw with it; what `load` returns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from scaling_ldm.config import names
from scaling_ldm.diffusion import samplers
from scaling_ldm.models import pretrained
from scaling_ldm.training.captions import CaptionReader
from scaling_ldm.training.inference import keys_of, pixels

_SHARED = ("sampler", "steps", "guidance", "grid")  # what every sampler takes


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LoadedModel:
    """A network with its weights, schedule, captions and autoencoder, on one device.

    model.sample("a red coat", n=4) draws pictures. The other methods are for your own
    loops: samplers.sample(model.denoise, key, shape=(4, *model.shape), cond=...,
    uncond=...) gives samples, and `decode` turns them into pictures.

    Attributes:
      name: of the run, or of the folder.
      denoise: (x [B, H, W, C], t scalar or [B], cond) -> the estimate of x0. Its t is
        that of `denoise.schedule`; it is mapped to the network's own t.
      shape: (H, W, C) of a sample: a latent, or a picture in [-1, 1].
      conditioning: names of the arrays in `cond`.
      classes: labels of a network that reads them, 0 to classes - 1; else 0.
      label_names: of the labels, in their order; () if they have none.
      about: what is known of the training, such as "step" and "validation_loss".
      drawing: how its study or its pipeline draws: "sampler", "steps", "guidance",
        "grid", which may be a function of the steps, and options of the sampler.
    """

    name: str
    denoise: samplers.DiffusionModel
    shape: tuple[int, int, int]
    conditioning: tuple[str, ...]
    classes: int
    about: Mapping[str, Any]
    drawing: Mapping[str, Any]
    label_names: tuple[str, ...] = ()
    # Readers of captions and of latents; None where the network has none.
    _captions: CaptionReader | None = dataclasses.field(repr=False)
    _autoencoder: Callable[[], pretrained.PretrainedAutoencoder] | None = (
        dataclasses.field(repr=False)
    )

    def __repr__(self) -> str:
        d = self.denoise
        return (
            f"LoadedModel({self.name}: {d.prediction} of {self.shape} on {d.schedule}, "
            f"reads {self._said()})"
        )

    def sample(
        self,
        captions: str | Sequence[str] | None = None,
        n: int = 1,
        *,
        labels: Any = None,
        arrays: Mapping[str, Any] | None = None,
        seed: int = 0,
        batch_size: int = 16,
        **options: Any,
    ) -> np.ndarray:
        """Draws n pictures of each caption or label.

        Picture i depends on the seed and on i alone. It is the one that the stage
        generate draws of this caption at its position i, up to rounding.

        Args:
          captions: one or several. None: without a caption.
          labels: one or several, for a network that reads labels: integers, or names
            of `label_names`.
          arrays: what else the network reads, such as "image", a row for each caption
            or label.
          seed: of the noise.
          batch_size: pictures that are drawn at once.
          options: sampler, steps, guidance, grid and others of `samplers.sample`; what
            is not given is as in `drawing`. Another sampler has its own options.
            Without captions and labels there is nothing to guide. A network that reads
            the guidance is given it, and is not guided besides.

        Returns:
          uint8 [captions * n, height, width, 3].

        Raises:
          ValueError: an input that the network does not read, or one that is missing.
          ConfigError: the text encoder or the autoencoder is not found, or is not the
            one of training.
        """
        if n < 1 or batch_size < 1:
            raise ValueError(f"n = {n} and batch_size = {batch_size}: at least 1 each")
        how = {**self.drawing, **options}
        if how["sampler"] != self.drawing["sampler"]:
            how = {k: how[k] for k in how if k in (*_SHARED, *options)}
        if callable(how.get("grid")):
            how["grid"] = how["grid"](how["steps"])
        scale = how["guidance"]
        if "guidance" in self.conditioning or (captions is None and labels is None):
            how["guidance"] = None
        cond, uncond = self._conditions(captions, labels, arrays or {}, scale)
        rows = np.repeat(np.arange(len(next(iter(cond.values()), [0]))), n)
        each = min(batch_size, len(rows))
        drawn = []
        for start in range(0, len(rows), each):
            index = np.minimum(np.arange(start, start + each), len(rows) - 1)
            chosen = rows[index]
            x = samplers.sample(
                self.denoise,
                keys_of(jax.random.key(seed), jnp.asarray(index, jnp.int32)),
                shape=(each, *self.shape),
                cond={name: value[chosen] for name, value in cond.items()},
                uncond={name: value[chosen] for name, value in uncond.items()},
                **how,
            )
            drawn.append(self.decode(x)[: len(rows) - start])
        return np.concatenate(drawn)

    def encode_text(self, captions: str | Sequence[str]) -> dict[str, np.ndarray]:
        """Captions as the network reads them.

        Returns:
          "text": ids of words int32 [n, S], or features float32 [n, S, E]; and "mask":
          bool [n, S], true where there is text.

        Raises:
          TypeError: a caption is no text.
          ValueError: the network reads no captions, or knows no word of one.
          ConfigError: the text encoder is not found, or is not the one of training.
        """
        if self._captions is None:
            raise ValueError(f"{self.name} reads {self._said()}, no captions")
        several = isinstance(captions, Iterable) and not isinstance(captions, str)
        texts = list(captions) if several else [captions]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError(f"captions must be text: {captions!r:.80}")
        return self._captions.read(texts)

    def decode(self, x: ArrayLike) -> np.ndarray:
        """Samples [n, H, W, C] -> pictures, uint8 [n, height, width, 3].

        Raises:
          ConfigError: the autoencoder is not found, or is not the one of training.
        """
        if self._autoencoder is None:
            return pixels(np.asarray(x))
        params, decode = self._decoder
        return pixels(np.asarray(decode(params, x)))

    @functools.cached_property
    def _decoder(self) -> tuple[Any, Callable[[Any, ArrayLike], jax.Array]]:
        if self._autoencoder is None:
            raise ValueError(f"{self.name} has no autoencoder")
        network, params, _ = self._autoencoder()

        @jax.jit
        def decode(params: Any, x: jax.Array) -> jax.Array:
            return network.decode(params, network.from_latent(x))

        return params, decode

    def _said(self) -> str:
        return ", ".join(self.conditioning) or "nothing"

    def _conditions(
        self,
        captions: str | Sequence[str] | None,
        labels: Any,
        arrays: Mapping[str, Any],
        scale: Any = None,
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """(cond, uncond), [captions or labels, ...] each, of what the network reads.

        scale: for a network that reads the guidance.
        """
        if labels is not None and "label" not in self.conditioning:
            raise ValueError(f"{self.name} reads {self._said()}, no labels")
        cond: dict[str, np.ndarray] = {}
        empty: dict[str, np.ndarray] = {}
        if captions is not None:
            cond |= self.encode_text(captions)
        if labels is not None:
            cond["label"] = self._labels(labels)
        if self._captions is not None and "text" in self.conditioning:
            empty |= self._captions.uncond
        if "label" in self.conditioning:
            empty["label"] = np.array(self.classes, np.int32)
        if "guidance" in self.conditioning and scale is not None:
            empty["guidance"] = np.array(scale, np.float32)
        cond |= {name: np.asarray(value) for name, value in arrays.items()}
        rows = {name: len(value) for name, value in cond.items()} or {"": 1}
        count = max(rows.values())
        if odd := {name: k for name, k in rows.items() if k != count}:
            raise ValueError(f"rows of conditions differ: {odd}, others have {count}")
        # What is read without captions or labels is the empty condition.
        wide = {
            name: np.broadcast_to(value, (count, *value.shape))
            for name, value in empty.items()
        }
        cond = wide | cond
        lacks = [name for name in self.conditioning if name not in cond]
        if lacks or (more := [n for n in cond if n not in self.conditioning]):
            what = f"give {', '.join(lacks)} in arrays" if lacks else f"not {more}"
            raise ValueError(f"{self.name} reads {self._said()}: {what}")
        return cond, cond | wide

    def _labels(self, labels: Any) -> np.ndarray:
        given = np.atleast_1d(np.asarray(labels))
        if given.ndim == 1 and given.dtype.kind == "U":
            return np.array([self._label_named(str(name)) for name in given], np.int32)
        whole = np.issubdtype(given.dtype, np.integer)
        if (
            given.ndim != 1
            or not whole
            or not np.all((given >= 0) & (given < self.classes))
        ):
            raise ValueError(f"labels are 0 to {self.classes - 1}, got {labels!r}")
        return given.astype(np.int32)

    def _label_named(self, name: str) -> int:
        """The label of that name, in which "_" and "-" count as spaces."""
        plain = [_plain(known) for known in self.label_names]
        if plain.count(_plain(name)) == 1:
            return plain.index(_plain(name))
        if name in self.label_names:
            return self.label_names.index(name)
        if not self.label_names:
            raise ValueError(
                f"labels={name!r}: the labels of {self.name} have no names; they are 0 "
                f"to {self.classes - 1}"
            )
        close = names.nearest(name, self.label_names)
        hint = f"did you mean {close!r}? " if close else ""
        raise ValueError(
            f"labels={name!r}: no label of {self.name} has this name; {hint}known: "
            f"{', '.join(self.label_names)}"
        )


def _plain(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").lower().split())
