"""Decides which pictures of a set are held out of training.

A picture's hash decides, so every host finds the same split. The rules (`by`):

caption        captions are held out, with all their pictures
picture        pictures are held out, the same share of every label (else caption)
set            the set has its own split: folders, or a separate set
caption_alone  the hash of each caption alone, as before 0.2

The first two keep near-duplicates (see near_duplicates.py) on one side, and keep every
label on both sides if it has enough pictures. "auto" is `set` if the set has its own
split, else `caption` if there are many captions (see `_are_many`), else `picture`.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64

from scaling_ldm import config, records
from scaling_ldm.data import hashing
from scaling_ldm.data.near_duplicates import components, near_duplicates

VERSION = 1  # of the rules; it increases when they change
NO_LABEL, NOT_SAID = -1, -1
# There are many captions if at least this many would be held out, and if at most this
# many pictures share one on average.
LEAST_CAPTIONS, MOST_SHARED = 10, 20
_ARRAYS = ("positions", "held_out")  # of a Split

Pixels = UInt8[np.ndarray, "n values"]
Flags = Bool[np.ndarray, "n"]
Ids = Int64[np.ndarray, "n"]
Keys = UInt64[np.ndarray, "n"]
GroupFlags = Bool[np.ndarray, "groups"]
GroupKeys = UInt64[np.ndarray, "groups"]


def caption_key(caption: str) -> int:
    """A hash of the caption's words, 64 bits; their order and case do not matter."""
    key = " ".join(sorted(caption.lower().split()))
    digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def held_out(caption: str, fraction: float) -> bool:
    """Whether a caption is held out by the rule "caption_alone".

    Equal captions are always on one side. What a fraction holds out, a larger fraction
    holds out too.

    Args:
      fraction: about this share of all captions is held out.
    """
    return caption_key(caption) / 2**64 < fraction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of n pictures before they are encoded.

    Attributes:
      size: how many pictures the set has.
      positions: where these pictures are in the set, ascending.
      captions: `caption_key` of each.
      labels: NO_LABEL for none.
      thumbnails: see `near_duplicates`.
      said: 1 if the set holds the picture out, 0 if it does not, NOT_SAID.
    """

    size: int
    positions: Ids
    captions: Keys
    labels: Ids
    thumbnails: Pixels
    said: Ids


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Which of n pictures are held out, and how that came about.

    Attributes:
      by: the rule, see the module.
      asked: config.data.split_by.
      fraction: config.data.validation_fraction.
      size: how many pictures the set has.
      positions: where the n pictures are in the set, ascending.
      held_out: whether each picture is held out.
      captions: number of distinct captions.
      labels: number of distinct labels.
      near: how many pictures are a near-duplicate of another one.
      straddling: how many held-out pictures have a near-duplicate in training; always 0
        except with the rule "set".
    """

    by: str
    asked: str
    fraction: float
    size: int
    positions: Ids
    held_out: Flags
    captions: int
    labels: int
    near: int
    straddling: int

    @property
    def summary(self) -> dict[str, Any]:
        """All but the pictures, with a digest of these; for JSON."""
        arrays = self.positions, self.held_out
        found = {k: v for k, v in vars(self).items() if k not in _ARRAYS}
        counts = {
            "train": int((~self.held_out).sum()),
            "validation": int(self.held_out.sum()),
        }
        digest = hashlib.blake2b(b"".join(a.tobytes() for a in arrays), digest_size=16)
        return {"rules": VERSION} | found | counts | {"digest": digest.hexdigest()}

    def side(self, position: int) -> bool | None:
        """Whether the picture at a position is held out; None if it is not listed."""
        place = int(np.searchsorted(self.positions, position))
        there = place < len(self.positions) and self.positions[place] == position
        return bool(self.held_out[place]) if there else None


def to_json(split: Split) -> dict[str, Any]:
    """A split as a file holds it."""
    taken = np.zeros(split.size, bool)
    taken[split.positions] = True
    flags = {"positions": taken, "held_out": split.held_out}
    return split.summary | {
        name: base64.b64encode(np.packbits(bits).tobytes()).decode()
        for name, bits in flags.items()
    }


def from_json(
    value: Mapping[str, Any], summary: Mapping[str, Any], where: str
) -> Split:
    """The inverse of `to_json`.

    Args:
      summary: as the records know it.
      where: the file, for messages.

    Raises:
      Damaged: it is not the split of this summary.
    """
    try:
        fields = {f.name: value[f.name] for f in dataclasses.fields(Split)}
        counts = value["size"], value["train"] + value["validation"]
        for name, count in zip(_ARRAYS, counts, strict=True):
            bits = np.frombuffer(base64.b64decode(value[name]), np.uint8)
            fields[name] = np.unpackbits(bits, count=count).astype(bool)
        fields["positions"] = np.flatnonzero(fields["positions"])
        found = Split(**fields)
    except (KeyError, TypeError, ValueError) as e:
        raise records.Damaged(f"{where} holds no split: {e!r}") from e
    if found.summary["digest"] != summary["digest"]:
        raise records.Damaged(f"{where} is not the split of the records beside it")
    return found


def in_words(summary: Mapping[str, Any]) -> str:
    """A sentence about a split, from `Split.summary`; {}: records before 0.2."""
    if not summary:
        return "held out by the hash of each caption alone, as before version 0.2"
    share = f"a share of {summary['fraction']:.3g}"
    how = {
        "caption": f"by caption: {share} of {summary['captions']:,} captions",
        "picture": f"by picture: {share} of each of "
        + (
            f"{summary['labels']:,} labels"
            if summary["labels"]
            else f"{summary['captions']:,} captions"
        ),
        "set": "by the split that the set itself has",
    }[summary["by"]]
    line = (
        f"{summary['validation']:,} of {summary['train'] + summary['validation']:,} "
        f"pictures are held out {how}"
    )
    if summary["near"] and summary["by"] != "set":
        line += f"; {summary['near']:,} pictures are beside their near-duplicates"
    if summary["straddling"]:
        line += (
            f"; {summary['straddling']:,} of them have a near-duplicate in training, "
            "so measurements on them are too good"
        )
    return line


def rule_in_words(cfg: config.DataConfig) -> str:
    """A sentence about how pictures will be held out, before they are read."""
    share = f"a share of {cfg.validation_fraction:.3g}"
    if cfg.validation_path or cfg.validation_split:
        return "held out are the pictures of config.data.validation_path or _split"
    return {
        "auto": f"held out is {share}: by the set's own split if it has one, else by "
        "caption if there are many captions, else by picture; the stage encode decides",
        "caption": f"held out is {share} of the captions",
        "picture": f"held out is {share} of the pictures of each label",
        "caption_alone": f"held out is {share} of the captions, by their hash alone",
    }[cfg.split_by]


def decide(survey: Survey, cfg: config.DataConfig) -> Split:
    """The split of a set.

    Raises:
      ConfigError: fewer pictures than config.data.validation_minimum are held out, or a
        label is missing on one side; the error says what to do.
    """
    near = near_duplicates(survey.thumbnails)
    said = survey.said != NOT_SAID
    if cfg.split_by == "auto":
        many = _are_many(survey, cfg.validation_fraction)
        by = "set" if said.any() else "caption" if many else "picture"
    else:
        by = cfg.split_by
    if by == "set":
        flags = survey.said == 1
    elif by == "caption":
        flags = _by_caption(survey, near, cfg.validation_fraction)
    else:
        flags = _by_picture(survey, near, cfg.validation_fraction)
    sizes = np.bincount(near)
    straddling = flags & ~_all_of(near, flags)
    split = Split(
        by=by,
        asked=cfg.split_by,
        fraction=cfg.validation_fraction,
        size=survey.size,
        positions=survey.positions,
        held_out=flags,
        captions=len(np.unique(survey.captions)),
        labels=len(np.unique(survey.labels[survey.labels != NO_LABEL])),
        near=int((sizes[near] > 1).sum()),
        straddling=int(straddling.sum()),
    )
    _check(split, survey, near, cfg)
    return split


def _are_many(survey: Survey, fraction: float) -> bool:
    """Whether there are enough captions to hold out a fair sample of them."""
    count = len(np.unique(survey.captions))
    few = count * fraction < LEAST_CAPTIONS
    shared = len(survey.captions) > MOST_SHARED * count
    return not (few or shared or _name_labels(survey))


def _name_labels(survey: Survey) -> bool:
    """Whether captions are only the names of the labels."""
    if (survey.labels == NO_LABEL).any():
        return False
    pairs = np.stack([survey.captions, survey.labels.astype(np.uint64)])
    return len(np.unique(pairs, axis=1).T) == len(np.unique(survey.labels))


def _by_caption(survey: Survey, near: Ids, fraction: float) -> Flags:
    """Holds out captions by their hash, with all pictures that near-duplicates link."""
    keys, caption = np.unique(survey.captions, return_inverse=True)
    count = len(keys)
    edges = np.stack([caption.reshape(-1), near + count], 1)
    group = components(edges, count + int(near.max(initial=0)) + 1)
    # Two hashes: one chooses the caption that represents a group, the other decides
    # whether it is held out. So large groups are not held out more often.
    order = np.lexsort((hashing.mix(keys), group[:count]))
    _, first = np.unique(group[:count][order], return_index=True)
    groups = int(group.max(initial=-1)) + 1
    value = np.zeros(groups, np.uint64)
    value[group[:count][order][first]] = keys[order][first]
    of_picture = group[caption.reshape(-1)]
    sizes = np.bincount(of_picture, minlength=groups)
    largest = max(fraction * len(near), sizes[sizes > 0].min(initial=1))
    out = (value / 2**64 < fraction) & (sizes <= largest)
    return _with_every_label(out, of_picture, value, survey.labels)[of_picture]


def _by_picture(survey: Survey, near: Ids, fraction: float) -> Flags:
    """Groups of near-duplicates are held out, a share of each label or caption."""
    labelled = bool((survey.labels != NO_LABEL).all())
    kinds = survey.labels if labelled else survey.captions
    _, kind, number = np.unique(kinds, return_inverse=True, return_counts=True)
    kind = kind.reshape(-1)
    if not labelled:  # captions of few pictures are one stratum
        kind = np.where(number[kind] * fraction < 1, len(number), kind)
    _, first, of_picture = np.unique(near, return_index=True, return_inverse=True)
    of_picture = of_picture.reshape(-1)
    sizes, value = np.bincount(of_picture), _keys(survey.thumbnails, of_picture)
    stratum = kind[first]
    out = np.zeros(len(sizes), bool)
    order = np.lexsort((value, stratum))
    cuts = np.flatnonzero(np.diff(stratum[order])) + 1
    for groups in np.split(order, cuts):
        quota = max(round(fraction * int(sizes[groups].sum())), 1)
        small = groups[sizes[groups] <= quota]
        before = np.cumsum(sizes[small]) - sizes[small]
        out[small[before < quota]] = True
        if out[groups].all():
            out[groups[-1]] = False
    return _with_every_label(out, of_picture, value, survey.labels)[of_picture]


def _keys(thumbnails: Pixels, group: Ids) -> GroupKeys:
    """A hash of each group: that of its smallest thumbnail, not of names or order."""
    order = np.lexsort((*thumbnails.T[::-1], group))
    _, first = np.unique(group[order], return_index=True)
    digests = [
        hashlib.blake2b(thumbnails[i].tobytes(), digest_size=8).digest()
        for i in order[first]
    ]
    return np.frombuffer(b"".join(digests), ">u8").astype(np.uint64)


def _with_every_label(
    out: GroupFlags,
    group: Ids,
    value: GroupKeys,
    labels: Ids,
) -> GroupFlags:
    """The groups to hold out, changed so that every label is on both sides if possible.

    Args:
      out: whether each group is held out.
      group: the group of each picture.
      value: the hash of each group; the smallest are held out first.
      labels: the label of each picture.
    """
    out = out.copy()
    known = [int(label) for label in np.unique(labels) if label != NO_LABEL]
    members = {label: np.unique(group[labels == label]) for label in known}
    for mine in members.values():
        if out[mine].all():
            out[mine[np.argmax(value[mine])]] = False
    inside: dict[int, list[int]] = {}
    for label, mine in members.items():
        for one in mine.tolist():
            inside.setdefault(one, []).append(label)
    for mine in members.values():
        if not out[mine].any():
            for one in mine[np.argsort(value[mine])].tolist():
                if all((~out[members[k]]).sum() > 1 for k in inside[one]):
                    out[one] = True
                    break
    return out


def _all_of(group: Ids, flags: Flags) -> Flags:
    """For each picture, whether all pictures of its group are flagged."""
    return (np.bincount(group, ~flags) == 0)[group]


def _check(split: Split, survey: Survey, near: Ids, cfg: config.DataConfig) -> None:
    """Refuses a validation set that is too small, or a label on one side alone."""
    least = cfg.validation_minimum
    if not least:
        return
    count = int(split.held_out.sum())
    own = split.by == "set"
    share = f"raise config.data.validation_fraction ({cfg.validation_fraction:g})"
    more = "hold out more of the set" if own else share
    remedy = (
        f"{more}, give more pictures or others in config.data.validation_path, or "
        "accept it with --config.data.validation_minimum="
    )
    if count < least:
        raise config.ConfigError(
            f"{count:,} of {len(split.held_out):,} pictures would be held out, split "
            f"by {split.by}; config.data.validation_minimum = {least:,}: {remedy}"
            f"{count}"
        )
    if count == len(split.held_out):
        raise config.ConfigError(
            "every picture is held out, so none is left to train on: lower "
            "config.data.validation_fraction"
        )
    known = np.unique(survey.labels[survey.labels != NO_LABEL]).tolist()
    for where, flags in (("held-out", split.held_out), ("training", ~split.held_out)):
        there = set(survey.labels[flags].tolist())
        if missing := [label for label in known if label not in there]:
            listed = ", ".join(
                f"{k} ({len(np.unique(near[survey.labels == k])):,})"
                for k in missing[:5]
            )
            raise config.ConfigError(
                f"no {where} picture has the label {listed}"
                f"{', ...' if len(missing) > 5 else ''}; in brackets, its pictures "
                "that are no near-duplicates: each label needs two, one to train on "
                "and one to validate with; add pictures, leave the label out, or "
                f"{remedy}0"
            )
