"""Mean and covariance of streamed features, the same to the last bit in any order.

Floating sums depend on the order of their terms, so shards merged differently would
give other statistics. Here every feature is an integer number of QUANTUM = 2^-44,
written in three signed digits of 20 bits:

    x = h 2^-4 + m 2^-24 + l 2^-44,    |h|, |m|, |l| <= 2^19.

A product of two digits is at most 2^38, so float64 BLAS sums 2^13 rows of up to three
of them without rounding (2^53), and int64 then sums 2^23 rows (2^63). Products of equal
weight share one total; the totals are integers, whence the order does not matter.

Range: |x| <= LIMIT = 2^15; more is refused, as is what is not finite. Rounding: none
for a float32 of at least 2^-21 (its last bit there is 2^-44), below at most 2^-45.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable
from typing import Any

import numpy as np

from scaling_ldm import records

BITS = 20
DIGITS = 3
QUANTUM = 2.0**-44
LIMIT = 2.0**15
MAX_COUNT = 2**23
CHUNK = 2048  # rows; a flush multiplies fewer than twice as many, 2^13 at most
FORMAT = 1

# The pairs of digits whose products have one weight, from the heaviest down.
_PAIRS = [
    [(i, k - i) for i in range(DIGITS) if i <= k - i < DIGITS]
    for k in range(2 * DIGITS - 1)
]


class Moments:
    """Exact sums of features [N, D] and of their products.

    Attributes:
      dim: D.
      count: N so far.
    """

    def __init__(
        self, count: int, sums: np.ndarray, products: np.ndarray, dim: int
    ) -> None:
        """From totals: `sums` int64 [3, D], `products` int64 [5, D, D]. See `empty`."""
        self.dim = dim
        self.count = count
        self._sums = sums
        self._products = products
        self._waiting: list[np.ndarray] = []
        self._rows = 0

    @classmethod
    def empty(cls, dim: int) -> Moments:
        """Of no feature yet; holds 40 D^2 bytes."""
        if dim < 1:
            raise ValueError(f"features of {dim} dimensions; at least 1 is needed")
        sums = np.zeros((DIGITS, dim), np.int64)
        products = np.zeros((2 * DIGITS - 1, dim, dim), np.int64)
        return cls(0, sums, products, dim)

    def add(self, features_ND: np.ndarray) -> None:
        """Takes in the rows of a floating array [N, D].

        Raises:
          ValueError: another shape or dtype, a value that is not finite or beyond LIMIT
            (nothing is taken in then), or more than MAX_COUNT rows in all.
        """
        features = np.asarray(features_ND)
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise ValueError(f"features of {features.shape}, wanted [N, {self.dim}]")
        if features.dtype.kind != "f" and features.dtype.name != "bfloat16":
            raise ValueError(f"features of {features.dtype}, wanted a floating type")
        check_finite(features, "features")
        if features.size:
            largest = max(float(features.max()), -float(features.min()))
            if largest > LIMIT:
                raise ValueError(
                    f"a feature of magnitude {largest:.6g}; at most {LIMIT:.0f} is "
                    "represented. Scale the features, and those they are compared with"
                )
        self._check_count(self.count + len(features))
        self.count += len(features)
        for start in range(0, len(features), CHUNK):
            rows = features[start : start + CHUNK].astype(np.float64)  # never a view
            self._waiting.append(rows)
            self._rows += len(rows)
            if self._rows >= CHUNK:
                self._flush()

    def merge(self, others: Moments | Iterable[Moments]) -> Moments:
        """Takes in the rows of others too, and returns itself.

        Raises:
          ValueError: features of another dimension, or too many rows.
        """
        for other in [others] if isinstance(others, Moments) else others:
            if other.dim != self.dim:
                raise ValueError(f"moments of {self.dim} and {other.dim} dimensions")
            self._check_count(self.count + other.count)
            sums, products = other._totals()
            self._sums += sums
            self._products += products
            self.count += other.count
        return self

    @property
    def mean(self) -> np.ndarray:
        """Float64 [D], correctly rounded.

        Raises:
          ValueError: no rows.
        """
        if not self.count:
            raise ValueError("the mean of no features")
        return np.array([s / (self.count << 44) for s in self._integers()])

    @property
    def cov(self) -> np.ndarray:
        """Float64 [D, D], unbiased (N - 1), as FID is defined; symmetric to the bit.

        N sum(x y) - sum(x) sum(y) cancels where means are large against deviations, so
        it is formed from pairs of float64 (Dekker 1971), to about 2^-100 of its terms.

        Raises:
          ValueError: fewer than two rows.
        """
        n = self.count
        if n < 2:
            raise ValueError(f"the covariance of {n} feature vectors; 2 are needed")
        _, products = self._totals()
        integers = self._integers()
        high = np.array([float(s) for s in integers])
        low = np.array([float(s - int(h)) for s, h in zip(integers, high, strict=True)])
        high, low = high * QUANTUM, low * QUANTUM
        out = np.empty((self.dim, self.dim))
        step = max(1, 2**18 // self.dim)
        for start in range(0, self.dim, step):
            rows = slice(start, start + step)
            p, p_low = _pair(products[:, rows])
            p, error = _two_product(p, float(n))
            p_low = p_low * n + error
            a, a_low = high[rows, None], low[rows, None]
            s, error = _two_product(a, high[None])
            s_low = error + (a * low[None] + a_low * high[None])
            difference, error = _two_sum(p, -s)
            out[rows] = (difference + (error + (p_low - s_low))) / (n * (n - 1.0))
        return out

    def digest(self) -> str:
        """SHA-256 in hex of the count and the totals."""
        sums, products = self._totals()
        sha = hashlib.sha256(f"{FORMAT} {self.count} {self.dim}".encode())
        sha.update(sums.astype("<i8").tobytes())
        for total in products:
            sha.update(np.ascontiguousarray(total, "<i8"))
        return sha.hexdigest()

    def save(self, path: str | os.PathLike, provenance: dict[str, Any]) -> None:
        """Writes totals and provenance (what JSON holds) atomically as .npz.

        Raises:
          TypeError, ValueError: a provenance that JSON does not hold.
        """
        text = json.dumps(provenance, sort_keys=True, allow_nan=False)
        sums, products = self._totals()
        upper = np.triu_indices(self.dim)
        arrays = {
            "format": np.int64(FORMAT),
            "count": np.int64(self.count),
            "sums": sums,
            "products": np.stack([total[upper] for total in products]),
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
            with np.load(path, allow_pickle=False) as file:
                if int(file["format"]) != FORMAT:
                    raise ValueError(f"format {int(file['format'])}, wanted {FORMAT}")
                count, sums = int(file["count"]), file["sums"]
                triangles = file["products"]
                provenance = json.loads(file["provenance"].tobytes())
            dim = sums.shape[-1]
            if sums.shape != (DIGITS, dim) or triangles.shape != (
                2 * DIGITS - 1,
                dim * (dim + 1) // 2,
            ):
                raise ValueError(f"totals of {sums.shape} and {triangles.shape}")
            if {sums.dtype, triangles.dtype} != {np.dtype(np.int64)}:
                raise ValueError(f"totals of {sums.dtype} and {triangles.dtype}")
        except FileNotFoundError:
            raise
        except (
            ValueError,
            TypeError,
            KeyError,
            OSError,
            EOFError,
            zipfile.BadZipFile,
        ) as e:
            raise ValueError(
                f"{path} holds no moments as `Moments.save` writes them"
            ) from e
        moments = cls.empty(dim)
        rows, columns = np.triu_indices(dim)
        for total, triangle in zip(moments._products, triangles, strict=True):
            total[rows, columns] = triangle
            total[columns, rows] = triangle
        moments.count = count
        moments._sums[:] = sums
        return moments, provenance

    def _check_count(self, count: int) -> None:
        if count > MAX_COUNT:
            raise ValueError(f"{count} rows; at most {MAX_COUNT} are summed exactly")

    def _integers(self) -> list[int]:
        """Sum of each feature in QUANTUMs."""
        sums, _ = self._totals()
        totals = [0] * self.dim
        for digit in sums.tolist():
            totals = [(t << BITS) + d for t, d in zip(totals, digit, strict=True)]
        return totals

    def _totals(self) -> tuple[np.ndarray, np.ndarray]:
        self._flush()
        return self._sums, self._products

    def _flush(self) -> None:
        """Sums the rows that wait."""
        if not self._rows:
            return
        waiting = self._waiting
        self._waiting, self._rows = [], 0
        rest = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)
        digits, unit = [], QUANTUM * 2.0 ** (BITS * DIGITS)
        for i in range(DIGITS):
            unit *= 2.0**-BITS
            digit = np.rint(rest / unit)  # exact but for the rounding: powers of two
            rest = rest - digit * unit  # exact: both are multiples of rest's last bit
            self._sums[i] += digit.sum(axis=0).astype(np.int64)
            digits.append(digit if digit.any() else None)
        for total, pairs in zip(self._products, _PAIRS, strict=True):
            found = None
            for i, j in pairs:
                if digits[i] is None or digits[j] is None:
                    continue
                product = digits[i].T @ digits[j]
                if i != j:
                    product = product + product.T
                found = product if found is None else found + product
            if found is not None:
                total += found.astype(np.int64)


def check_finite(values: np.ndarray, what: str) -> None:
    """Raises ValueError if a value is not finite, saying how many and where first."""
    finite = np.isfinite(values)
    if not finite.all():
        wrong = np.argwhere(~finite)
        raise ValueError(
            f"{len(wrong)} of {values.size} {what} are not finite, the first at "
            f"{tuple(int(i) for i in wrong[0])}"
        )


def _pair(totals: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The sum of int64 totals [5, ...] by their weights, as a pair of float64."""
    high = np.zeros(totals.shape[1:])
    low = np.zeros(totals.shape[1:])
    unit = (QUANTUM * 2.0 ** (BITS * (DIGITS - 1))) ** 2
    for total in totals:
        for part in ((total >> 32) * 2.0**32, (total & 0xFFFFFFFF).astype(np.float64)):
            high, error = _two_sum(high, part * unit)
            low += error
        unit *= 2.0**-BITS
    return _two_sum(high, low)


def _two_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """a + b as (rounded, rest), exactly (Knuth)."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def _two_product(a: Any, b: Any) -> tuple[np.ndarray, np.ndarray]:
    """a b as (rounded, rest), exactly (Dekker), for magnitudes below 2^480."""
    product = a * b
    a_high, a_low = _halves(a)
    b_high, b_low = _halves(b)
    rest = a_high * b_high - product
    rest = (rest + a_high * b_low) + a_low * b_high
    return product, rest + a_low * b_low


def _halves(a: Any) -> tuple[Any, Any]:
    """a as a sum of two numbers of 26 bits (Veltkamp)."""
    scaled = a * (2.0**27 + 1)
    high = scaled - (scaled - a)
    return high, a - high
