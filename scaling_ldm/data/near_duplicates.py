"""Pictures that are almost the same, found by their thumbnails."""

from __future__ import annotations

import numpy as np
import scipy.sparse.csgraph
import scipy.spatial
from jaxtyping import Int64, UInt8
from PIL import Image

SIDE = 8  # of the thumbnails, in pixels
# Levels of 255 by which thumbnails of near-duplicates differ: on average, and anywhere.
# Half the size and JPEG of quality 60 change 1 to 2 of them on average.
MEAN, MOST = 3, 20
_NEIGHBOURS = 64  # thumbnails whose neighbours are looked up at a time

Pixels = UInt8[np.ndarray, "n values"]
Ids = Int64[np.ndarray, "n"]


def thumbnail(image: np.ndarray) -> np.ndarray:
    """uint8 [h, w, 3] -> the means of SIDE x SIDE areas, uint8 [SIDE * SIDE * 3]."""
    small = Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(small).reshape(-1)


def near_duplicates(thumbnails: Pixels) -> Ids:
    """The group of each picture: groups of near-duplicates have the same number.

    Two pictures are near-duplicates if the values of their thumbnails differ by at
    most MEAN on average, and none by more than MOST. So copies of other sizes, formats
    and qualities are near-duplicates; mirrored and cropped copies are not. Two
    near-duplicates of the same picture are in one group.
    """
    # Equal and almost equal thumbnails first: sets with many of them stay cheap.
    _, first, cell = np.unique(
        thumbnails // MEAN, axis=0, return_index=True, return_inverse=True
    )
    pixels = thumbnails[first].astype(np.int16)
    half = SIDE // 2
    # Averaged over all areas, their means differ by no more than the values do.
    means = pixels.reshape(-1, 2, half, 2, half, 3).mean((2, 4)).reshape(-1, 12)
    tree = scipy.spatial.KDTree(means)
    group, edges = np.arange(len(means)), [np.zeros((0, 2), np.int64)]
    for start in range(0, len(means), _NEIGHBOURS):
        queried, known = means[start : start + _NEIGHBOURS], len(edges)
        found = tree.query_ball_point(queried, MEAN * means.shape[1], p=1)
        for a, others in enumerate(found, start):
            b = np.array(others, np.int64)
            # In sets of very similar pictures, most are in one group already.
            b = b[(b > a) & (group[b] != group[a])]
            if len(b):
                apart = np.abs(pixels[b] - pixels[a])
                b = b[(apart.mean(1) <= MEAN) & (apart.max(1) <= MOST)]
            if len(b):
                edges.append(np.stack([np.full_like(b, a), b], 1))
        if len(edges) > known:
            group = components(np.concatenate(edges), len(means))
    return group[cell.reshape(-1)]


def components(edges: np.ndarray, count: int) -> Ids:
    """The connected component of each of `count` nodes."""
    ones = np.ones(len(edges), bool)
    graph = scipy.sparse.coo_matrix((ones, (edges[:, 0], edges[:, 1])), (count, count))
    _, found = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return found.astype(np.int64)
