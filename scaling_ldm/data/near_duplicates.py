"""Pictures that are almost the same, found by their thumbnails."""

from __future__ import annotations

import numpy as np
import scipy.sparse.csgraph
import scipy.spatial
from jaxtyping import Int64, UInt8
from PIL import Image

SIDE = 8  # of the thumbnails, in pixels
TOLERANCE = 8  # levels of 255 by which thumbnails of near-duplicates differ at most
_NEIGHBOURS = 512  # thumbnails whose neighbours are looked up at a time

Pixels = UInt8[np.ndarray, "n values"]
Ids = Int64[np.ndarray, "n"]


def thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] -> the means of SIDE x SIDE areas, uint8 [SIDE * SIDE * 3]."""
    small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small).reshape(-1)


def near_duplicates(thumbnails: Pixels) -> Ids:
    """The group of each picture: groups of near-duplicates have the same number.

    Two pictures are near-duplicates if no value of their thumbnails differs by more
    than TOLERANCE; so copies of other sizes, formats and qualities are, mirrored and
    cropped ones are not. What is a near-duplicate of the same picture is in one group.
    """
    # Equal ones, and almost equal ones, first: sets with many of them stay cheap.
    _, first, cell = np.unique(
        thumbnails // (TOLERANCE // 2), axis=0, return_index=True, return_inverse=True
    )
    pixels = thumbnails[first].astype(np.int16)
    half = SIDE // 2
    # Means of near-duplicates are as close as their values.
    means = pixels.reshape(-1, 2, half, 2, half, 3).mean((2, 4)).reshape(-1, 12)
    tree = scipy.spatial.cKDTree(means)
    edges = [np.zeros((0, 2), np.int64)]
    for start in range(0, len(means), _NEIGHBOURS):
        found = tree.query_ball_point(
            means[start : start + _NEIGHBOURS], TOLERANCE, p=np.inf
        )
        for a, others in enumerate(found, start):
            b = np.array([other for other in others if other > a], np.int64)
            if len(b):
                b = b[np.abs(pixels[b] - pixels[a]).max(1) <= TOLERANCE]
                edges.append(np.stack([np.full_like(b, a), b], 1))
    return components(np.concatenate(edges), len(pixels))[cell.reshape(-1)]


def components(edges: np.ndarray, count: int) -> Ids:
    """The connected component of each of `count` nodes."""
    ones = np.ones(len(edges), bool)
    graph = scipy.sparse.coo_matrix((ones, (edges[:, 0], edges[:, 1])), (count, count))
    _, found = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return found.astype(np.int64)
