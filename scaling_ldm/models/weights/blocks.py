"""Pairs of transformers whose layers are stacked here and numbered there.

`Pairs` walks one of our trees of shapes: each method claims the leaves under a path for
the tensors of a torch module, and `done` checks that no leaf was left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from scaling_ldm.models.weights import layout

Path = str | tuple[str, ...]


class Pairs:
    """Collects the pairs of one network.

    Methods take `layer`: which one of a stack, or None for a leaf without layer axis.
    """

    def __init__(self, tree: Any) -> None:
        """tree: of shapes, as `jax.eval_shape` gives it for our `init`."""
        self._shapes = {
            tuple(key.key for key in keys): leaf.shape
            for keys, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        self._found: list[layout.Pair] = []

    def _add(
        self,
        path: layout.Path,
        name: str,
        *,
        layer: int | None,
        part: tuple[int | slice, ...] = (),
        inputs: int = 0,
        theirs: tuple[int, ...] | None = None,
        merged: tuple[int, ...] | None = None,
        order: tuple[int, ...] | None = None,
    ) -> None:
        """inputs: axes of a matrix that are inputs; 0: a vector, flat there."""
        whole = self._shapes[path]
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
            layout.Pair(path, name, ours, theirs, merged, order, at=index, whole=whole)
        )

    def linear(
        self, path: Path, name: str, layer: int | None = None, inputs: int = 1
    ) -> None:
        """A dense kernel and bias; `inputs` = 2 where heads are joined."""
        path = _split(path)
        self._add((*path, "kernel"), f"{name}.weight", layer=layer, inputs=inputs)
        self._add((*path, "bias"), f"{name}.bias", layer=layer)

    def fused(self, path: Path, names: Sequence[str], layer: int | None) -> None:
        """A projection to heads [in, n, K, H] that there is n of their own."""
        path = _split(path)
        for i, name in enumerate(names):
            self._add(
                (*path, "kernel"),
                f"{name}.weight",
                layer=layer,
                part=(slice(None), i),
                inputs=1,
            )
            self._add((*path, "bias"), f"{name}.bias", layer=layer, part=(i,))

    def vector(
        self,
        path: Path,
        name: str,
        layer: int | None = None,
        theirs: tuple[int, ...] | None = None,
    ) -> None:
        """A leaf that is the same there but for its axes' grouping."""
        self._add(_split(path), name, layer=layer, theirs=theirs)

    def table(self, path: Path, name: str) -> None:
        """Rows to look up, the same there."""
        path = _split(path)
        self._add(
            path,
            name,
            layer=None,
            merged=self._shapes[path],
            order=(0, 1),
        )

    def patches_in(self, path: Path, name: str, patch: int, flat: bool = False) -> None:
        """[p p C, D] <-> a convolution's [D, C, p, p], or flat [D, C p p]."""
        path = _split(path)
        size, width = self._shapes[(*path, "kernel")]
        channels = size // patch**2
        self._add(
            (*path, "kernel"),
            f"{name}.weight",
            layer=None,
            merged=(patch, patch, channels, width),
            order=(3, 2, 0, 1),
            theirs=(width, size) if flat else None,
        )
        self._add((*path, "bias"), f"{name}.bias", layer=None)

    def patches_out(self, path: Path, name: str, patch: int) -> None:
        """[D, p p C] <-> [C p p, D], channels first within a patch."""
        path = _split(path)
        width, size = self._shapes[(*path, "kernel")]
        sizes = (patch, patch, size // patch**2)
        self._add(
            (*path, "kernel"),
            f"{name}.weight",
            layer=None,
            merged=(width, *sizes),
            order=(3, 1, 2, 0),
            theirs=(size, width),
        )
        self._add(
            (*path, "bias"),
            f"{name}.bias",
            layer=None,
            merged=sizes,
            order=(2, 0, 1),
            theirs=(size,),
        )

    def done(self) -> list[layout.Pair]:
        """All pairs.

        Raises:
          ValueError: a leaf that none of them names: the network has more than theirs.
        """
        rest = self._shapes.keys() - {pair.path for pair in self._found}
        if rest:
            names = ", ".join(sorted("/".join(path) for path in rest))
            raise ValueError(f"the published layout has no place for {names}")
        return self._found


def _split(path: Path) -> layout.Path:
    return tuple(path.split("/")) if isinstance(path, str) else path


def settings(
    published: Mapping[str, Any],
    defaults: Mapping[str, Any],
    only: Mapping[str, tuple[Any, ...]],
    what: str,
) -> dict[str, Any]:
    """A published config with its defaults, checked.

    Args:
      defaults: every key that is read or checked, as the library that wrote it has it.
      only: key -> the values that our network can be.

    Raises:
      layout.WeightsError: other values, or keys that are set but unknown: all of them.
    """
    found = {
        **defaults,
        **{k: v for k, v in published.items() if not k.startswith("_")},
    }
    problems = [
        f"{key} = {value!r} is not known"
        for key, value in found.items()
        if key not in defaults and value not in (None, False)
    ]
    problems += [
        f"{key} = {found[key]!r}; may be {' or '.join(map(repr, values))}"
        for key, values in only.items()
        if found[key] not in values
    ]
    if problems:
        raise layout.WeightsError(
            f"this config is not {what}:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return {key: found[key] for key in defaults}
