"""Pairs of transformers, and configurations that shapes of tensors do not show.

Layers are stacked here and numbered there. `Pairs` walks one of our trees of shapes.
Each of its methods pairs the leaves under a path with the tensors of a torch module.
`done` checks that no leaf is left.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from scaling_ldm.models.weights import files, layout
from scaling_ldm.records.errors import WeightsError

# Module of one of our blocks -> its name there; several names where ours fuses theirs.
Names = Mapping[str, str | Sequence[str]]
# Fields of a network that its user chooses, whatever the weights are.
_CHOSEN = (
    "dtype",
    "remat",
    "attention",
    "unroll",
    "image_shape",
    "text_tokens",
    "max_tokens",
    "projection",
    "pooler",
    "mask_token",
    "skip",
    "final_norm",
    "offset",
)
_KINDS = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class Pairs:
    """Collects the pairs of one network.

    Paths are keys of our tree joined by "/". `layer` says which layer of a stack is
    meant; None means a leaf without an axis of layers.
    """

    def __init__(self, tree: Any) -> None:
        """Takes a tree of shapes, as `jax.eval_shape` gives it for our `init`."""
        self._shapes = {
            tuple(key.key for key in keys): leaf.shape
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        self._found: list[layout.Pair] = []

    def _add(
        self,
        path: str,
        name: str,
        *,
        layer: int | None,
        part: tuple[int | slice, ...] = (),
        inputs: int = 0,
        theirs: tuple[int, ...] | None = None,
        merged: tuple[int, ...] | None = None,
        order: tuple[int, ...] | None = None,
    ) -> None:
        """Pairs one leaf, or with `part` a part of it.

        Args:
          inputs: how many axes of a matrix are inputs; 0: a vector, flat there.
          theirs, merged, order: as in `layout.Pair`; they replace what follows from
            `inputs`.
        """
        keys = tuple(path.split("/"))
        whole = self._shapes[keys]
        index = part if layer is None else (layer, *part)
        ours = whole if layer is None else whole[1:]
        ours = tuple(
            size
            for i, size in enumerate(ours)
            if i >= len(part) or isinstance(part[i], slice)
        )
        if merged is None and inputs:
            merged = (math.prod(ours[:inputs]), math.prod(ours[inputs:]))
            order = (1, 0)
        elif merged is None:
            merged, order = (math.prod(ours),), (0,)
        assert order is not None
        theirs = theirs or tuple(merged[axis] for axis in order)
        self._found.append(
            layout.Pair(keys, name, ours, theirs, merged, order, at=index, whole=whole)
        )

    def _leaves(self, path: str) -> list[str]:
        """Which of kernel, scale and bias a module has."""
        keys = tuple(path.split("/"))
        return [kind for kind in _KINDS if (*keys, kind) in self._shapes]

    def module(self, path: str, name: str, layer: int | None = None) -> None:
        """A dense layer, with or without a bias, or a norm.

        The inputs of an output projection, whose name ends in "out", are all heads.
        """
        for kind in self._leaves(path):
            inputs = 0
            if kind == "kernel":
                shape = self._shapes[tuple(f"{path}/kernel".split("/"))]
                axes = len(shape) - (layer is not None)
                inputs = axes - 1 if path.endswith("out") else 1
            theirs = f"{name}.{_KINDS[kind]}"
            self._add(f"{path}/{kind}", theirs, layer=layer, inputs=inputs)

    def fused(self, path: str, names: Sequence[str], layer: int | None = None) -> None:
        """A projection [in, n, ...] that is n projections there."""
        for i, name in enumerate(names):
            for kind in self._leaves(path):
                matrix = kind == "kernel"
                self._add(
                    f"{path}/{kind}",
                    f"{name}.{_KINDS[kind]}",
                    layer=layer,
                    part=(slice(None), i) if matrix else (i,),
                    inputs=1 if matrix else 0,
                )

    def block(self, path: str, names: Names, theirs: str, layer: int | None) -> None:
        """The modules of one block, which is called `theirs` there."""
        for ours, name in names.items():
            if isinstance(name, str):
                self.module(f"{path}/{ours}", f"{theirs}.{name}", layer)
            else:
                parts = [f"{theirs}.{part}" for part in name]
                self.fused(f"{path}/{ours}", parts, layer)

    def vector(
        self,
        path: str,
        name: str,
        layer: int | None = None,
        theirs: tuple[int, ...] | None = None,
    ) -> None:
        """A leaf with the same numbers in the same order, flat there or as `theirs`."""
        self._add(path, name, layer=layer, theirs=theirs)

    def table(self, path: str, name: str) -> None:
        """Rows to look up, the same there."""
        shape = self._shapes[tuple(path.split("/"))]
        self._add(path, name, layer=None, merged=shape, order=(0, 1))

    def patches_in(self, path: str, name: str, patch: int, flat: bool = False) -> None:
        """[p p C, D] here; there a convolution's [D, C, p, p], or flat [D, C p p]."""
        size, width = self._shapes[(*path.split("/"), "kernel")]
        channels = size // patch**2
        self._add(
            f"{path}/kernel",
            f"{name}.weight",
            layer=None,
            merged=(patch, patch, channels, width),
            order=(3, 2, 0, 1),
            theirs=(width, size) if flat else None,
        )
        if "bias" in self._leaves(path):
            self._add(f"{path}/bias", f"{name}.bias", layer=None)

    def patches_out(self, path: str, name: str, patch: int) -> None:
        """[D, p p C] here, [C p p, D] there: channels first within a patch."""
        width, size = self._shapes[(*path.split("/"), "kernel")]
        sizes = (patch, patch, size // patch**2)
        self._add(
            f"{path}/kernel",
            f"{name}.weight",
            layer=None,
            merged=(width, *sizes),
            order=(3, 1, 2, 0),
            theirs=(size, width),
        )
        self._add(
            f"{path}/bias",
            f"{name}.bias",
            layer=None,
            merged=sizes,
            order=(2, 0, 1),
            theirs=(size,),
        )

    def done(self) -> list[layout.Pair]:
        """All pairs.

        Raises:
          ValueError: a leaf that no pair names, because their network has no such part.
        """
        rest = self._shapes.keys() - {pair.path for pair in self._found}
        if rest:
            names = ", ".join(sorted("/".join(path) for path in rest))
            raise ValueError(f"the published layout has no place for {names}")
        return self._found


def require(config: Any, wanted: Mapping[str, Any], what: str, *more: str) -> None:
    """Checks that a network computes the same as a published one.

    Args:
      wanted: field of the config -> the value that it must have.
      more: further differences that the caller found.

    Raises:
      ValueError: other values; the message lists all of them.
    """
    have = {name: getattr(config, name) for name in wanted}
    wrong = [f"{k} = {have[k]!r}, not {v!r}" for k, v in wanted.items() if have[k] != v]
    if wrong := [*wrong, *more]:
        raise ValueError(f"{what} computes something else: {'; '.join(wrong)}")


def settings(
    published: Mapping[str, Any],
    defaults: Mapping[str, Any],
    only: Mapping[str, tuple[Any, ...]],
    what: str,
    ignored: Container[str] = (),
) -> dict[str, Any]:
    """Checks a published config.json and fills in its defaults.

    Args:
      defaults: every key that is read or checked -> what the publisher's library
        assumes where it is absent.
      only: key -> the values that our network can have.
      what: whose config it should be, for the message of an error.
      ignored: keys that change nothing that is computed here.

    Raises:
      WeightsError: other values, or keys that are set but unknown; all are listed.
    """
    said = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in published.items()
        if not key.startswith("_") and key not in ignored
    }
    found = {**defaults, **said}
    problems = [
        f"{key} = {value!r} is not known"
        for key, value in found.items()
        if key not in defaults and not (value is False or value in (None, [], {}))
    ]
    problems += [
        f"{key} = {found[key]!r}; may be {' or '.join(map(repr, values))}"
        for key, values in only.items()
        if found[key] not in values
    ]
    if problems:
        raise WeightsError(
            f"this config is not {what}:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return {key: found[key] for key in defaults}


def agree(
    path: str | pathlib.Path,
    config: Any,
    names: Sequence[str],
    from_config: Callable[[Mapping[str, Any]], Any],
) -> None:
    """Checks a network against the config.json beside its weights, if there is one.

    Shapes of tensors do not show heads, activations or epsilons.

    Args:
      names: of this network in a config.json, as `_class_name` or `model_type`. A
        config.json of another network says nothing about these weights.
      from_config: config.json -> config.

    Raises:
      WeightsError: a setting differs, or the network of config.json cannot be built.
    """
    published = files.beside(path)
    name = published.get("_class_name") or published.get("model_type")
    if name not in names:
        return
    theirs = from_config(published)
    fields = [field.name for field in dataclasses.fields(config)]
    differ = [
        f"{field} = {getattr(theirs, field)!r}, not {getattr(config, field)!r}"
        for field in fields
        if field not in _CHOSEN and getattr(theirs, field) != getattr(config, field)
    ]
    if differ:
        raise WeightsError(
            f"{path}: its {files.CONFIG} says {'; '.join(differ)}; read the config "
            "from there"
        )


def check_pixels(
    directory: str | pathlib.Path, mean: np.ndarray, deviation: np.ndarray
) -> None:
    """Checks how a network of pictures was given its pixels, where its folder says it.

    Args:
      mean, deviation: [3], of pictures in [0, 1], that are taken here.

    Raises:
      WeightsError: its preprocessor_config.json has others, or none.
    """
    path = pathlib.Path(directory) / "preprocessor_config.json"
    said = files.read_json(path) if path.is_file() else {}
    wanted = {
        "do_normalize": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "image_mean": mean,
        "image_std": deviation,
    }
    for key, here in wanted.items():
        there = said.get(key, here)
        if there is None or not np.allclose(there, here, rtol=1e-5):
            raise WeightsError(
                f"{path}: {key} is {there}; pictures are read with {np.asarray(here)}"
            )


def check_model_type(published: Mapping[str, Any], *known: str) -> None:
    """Checks the model_type of a config.json of transformers, if it has one.

    Raises:
      WeightsError: it is another network, which may have tensors of the same shapes.
    """
    kind = published.get("model_type") or known[0]
    if kind not in known:
        raise WeightsError(f"model_type is {kind!r}; known: {', '.join(known)}")
