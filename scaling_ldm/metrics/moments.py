"""Mean and covariance of features, from batches, in float64.

Rows are taken CHUNK at a time, in their order, and the chunks are combined by the
update of Chan, Golub & LeVeque 1983 (The American Statistician 37, 242). Every chunk is
centred on its own mean before it is squared, so means that are large against the
deviations cost few digits. The same rows in the same order give the same bits, however
they are cut into batches. That is enough: features are stored in the order of their
pictures, so a resumed evaluation, and one on another number of processes, adds the same
rows in the same order.

Sums that are the same bits in every order (exact integers) were used before and gained
nothing. For 2000 against 3000 features of 1280 dimensions, other chunks change the
distance by 5e-15 of its value. With exact sums, another number of BLAS threads changes
it by the same 5e-15, because the singular values depend on the threads. The exact sums
took ten times as long (3.0 s, not 0.3 s). Files that hold them are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from scaling_ldm import records
from scaling_ldm.metrics.checks import check_finite
from scaling_ldm.metrics.shapes import CovDD, FeaturesND, MeanD
from scaling_ldm.records import places
from scaling_ldm.records.errors import NO_ARRAYS

CHUNK = 1024  # rows
FORMAT = 2  # format of written files; format 1 holds exact integer sums


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Moments:
    """Mean and covariance of features [N, D].

    Attributes:
      count: N.
      mean: [D].
      cov: [D, D], unbiased (divided by N - 1), as FID is defined; exactly symmetric.
      stored_digest: the digest by format 1, for moments read from such a file; else "".
    """

    count: int
    mean: MeanD
    cov: CovDD
    stored_digest: str = ""

    @classmethod
    def of(cls, batches: Iterable[np.ndarray]) -> Moments:
        """The moments of all rows of some batches; CHUNK rows are in memory at a time.

        Args:
          batches: floating arrays [n, D].

        Raises:
          ValueError: fewer than two rows in all, another shape or dtype, or a value
            that is not finite.
        """
        count, mean, scatter = 0, np.zeros(()), np.zeros(())
        for rows in _chunks(batches):
            n = len(rows)
            here = rows.mean(axis=0)
            rows -= here
            step = here - mean
            between = np.outer(step, step) * (count * n / (count + n))
            scatter = scatter + rows.T @ rows + between
            mean = mean + step * (n / (count + n))
            count += n
        if count < 2:
            raise ValueError(f"the covariance of {count} feature vectors; 2 are needed")
        return cls(count=count, mean=mean, cov=scatter / (count - 1))

    def digest(self) -> str:
        """SHA-256 in hex of the count, the mean and the covariance."""
        if self.stored_digest:
            return self.stored_digest
        sha = hashlib.sha256(f"{FORMAT} {self.count} {len(self.mean)}".encode())
        for array in (self.mean, self.cov):
            sha.update(np.ascontiguousarray(array, "<f8").data)
        return sha.hexdigest()

    def save(self, path: str | os.PathLike, provenance: dict[str, Any]) -> None:
        """Writes the moments and their provenance (a JSON value) atomically as .npz.

        Raises:
          TypeError, ValueError: a provenance that JSON does not hold.
        """
        text = json.dumps(provenance, sort_keys=True, allow_nan=False)
        arrays = {
            "format": np.int64(FORMAT),
            "count": np.int64(self.count),
            "mean": self.mean,
            "cov": self.cov,
            "provenance": np.frombuffer(text.encode(), np.uint8),
        }
        records.write_file(path, lambda file: np.savez(file, **arrays))

    @classmethod
    def load(cls, path: str | os.PathLike) -> tuple[Moments, dict[str, Any]]:
        """What `save` wrote: the moments and their provenance.

        Raises:
          FileNotFoundError: no such file.
          ValueError: not such a file, or a damaged one.
        """
        try:
            with (
                places.place(path).open("rb") as opened,
                np.load(opened, allow_pickle=False) as file,
            ):
                read = {1: _read_format_1, FORMAT: _read}[int(file["format"])]
                return read(file), json.loads(file["provenance"].tobytes())
        except FileNotFoundError:
            raise
        except (*NO_ARRAYS, OSError) as e:
            raise ValueError(
                f"{path} holds no moments as `Moments.save` writes them"
            ) from e


def _chunks(batches: Iterable[np.ndarray]) -> Iterator[FeaturesND]:
    """The rows of all batches in order, copied to float64, CHUNK at a time."""
    dim, parts, held = 0, [], 0
    for batch in batches:
        features = np.asarray(batch)
        dim = dim or (features.shape[-1] if features.ndim else 0)
        if features.ndim != 2 or not dim or features.shape[1] != dim:
            raise ValueError(f"features of {features.shape}, wanted [N, {dim or 'D'}]")
        if features.dtype.kind != "f" and features.dtype.name != "bfloat16":
            raise ValueError(f"features of {features.dtype}, wanted a floating type")
        check_finite(features, "features")
        while len(features):
            part, features = np.split(features, [CHUNK - held])
            parts.append(part.astype(np.float64))
            held += len(part)
            if held == CHUNK:
                yield np.concatenate(parts)
                parts, held = [], 0
    if parts:
        yield np.concatenate(parts)


def _read(file: Any) -> Moments:
    count, mean, cov = int(file["count"]), file["mean"], file["cov"]
    if cov.shape != (*mean.shape, *mean.shape) or {mean.dtype, cov.dtype} != {
        np.dtype(np.float64)
    }:
        raise ValueError(f"a mean of {mean.shape} and a covariance of {cov.shape}")
    return Moments(count=count, mean=mean, cov=cov)


def _read_format_1(file: Any) -> Moments:
    """Moments from exact integer sums.

    A feature x was the integer x 2^44, in three signed digits of 20 bits, the highest
    first. "sums" [3, D] holds the sum of each digit. "products" [5, D (D + 1) / 2]
    holds the sums of the products of two digits, as upper triangles. Products of equal
    weight are added up, and the highest weight is first.
    """
    n, sums, triangles = int(file["count"]), file["sums"], file["products"]
    dim = sums.shape[-1]
    upper = np.triu_indices(dim)
    if sums.shape != (3, dim) or triangles.shape != (5, len(upper[0])):
        raise ValueError(f"totals of {sums.shape} and {triangles.shape}")
    if {sums.dtype, triangles.dtype} != {np.dtype(np.int64)}:
        raise ValueError(f"totals of {sums.dtype} and {triangles.dtype}")
    products = np.zeros((5, dim, dim), np.int64)
    for total, triangle in zip(products, triangles, strict=True):
        total[upper] = total.T[upper] = triangle
    total = _join(sums)
    cov = np.empty((dim, dim))
    for i in range(dim):  # by rows: Python's integers take much memory
        scaled = n * _join(products[:, i]) - total[i] * total
        cov[i] = scaled.astype(np.float64) * 2.0**-88 / (n * (n - 1.0))
    sha = hashlib.sha256(f"1 {n} {dim}".encode())
    sha.update(sums.astype("<i8").data)
    sha.update(products.astype("<i8").data)
    return Moments(
        count=n,
        mean=np.array([value / (n << 44) for value in total.tolist()]),
        cov=cov,
        stored_digest=sha.hexdigest(),
    )


def _join(digits: np.ndarray) -> np.ndarray:
    """Python integers [D] of int64 [K, D]: signed digits of 20 bits, highest first."""
    whole = np.zeros(digits.shape[1], object)
    for digit in digits:
        whole = (whole << 20) + digit.astype(object)
    return whole
