"""Mean and covariance of features from batches, and the files that hold them."""

import subprocess
import sys

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from scaling_ldm.metrics import Moments


def features(seed, count, dim):
    """Correlated rows whose dimensions differ in scale and offset, float32."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(dim, dim)) * np.geomspace(0.05, 4, dim)
    rows = rng.normal(size=(count, dim)) @ mix + rng.normal(size=dim) * 5
    return rows.astype(np.float32)


@pytest.mark.parametrize("batches", [1, 2, 7, 5000])
def test_moments_are_those_of_numpy(batches):
    rows = features(0, 5000, 12)
    found = Moments.of(iter(np.array_split(rows, batches)))
    exact = rows.astype(np.float64)
    assert found.count == 5000
    assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-13)
    cov = np.cov(exact, rowvar=False)
    scale = np.sqrt(np.outer(np.diag(cov), np.diag(cov)))
    assert (np.abs(found.cov - cov) / scale).max() < 1e-13
    assert_array_equal(found.cov, found.cov.T)


@pytest.mark.parametrize("batch", [1, 100, 1024, 1500, 5003])
def test_batches_of_any_size_give_the_same_bits(batch):
    """As after an interruption; and an array may be overwritten once it is added."""
    rows = features(1, 5003, 17)
    buffer = np.empty((batch, 17), np.float32)

    def batches():
        yield rows[:0]
        for start in range(0, len(rows), batch):
            part = buffer[: len(rows[start : start + batch])]
            part[:] = rows[start : start + batch]
            yield part

    once, again = Moments.of([rows]), Moments.of(batches())
    assert_array_equal(once.mean, again.mean)
    assert_array_equal(once.cov, again.cov)
    assert once.digest() == again.digest()
    assert once.digest() != Moments.of([rows[:-1]]).digest()


@pytest.mark.parametrize("count", [500, 5000])  # in one chunk and in several
def test_a_covariance_does_not_cancel(count):
    """Deviations of 1e-3 around 30000: differences of sums that agree to 15 digits."""
    steps = np.random.default_rng(4).integers(-(2**20), 2**20, (count, 2)) * 2.0**-30
    exact = np.cov(steps.T)
    found = Moments.of([30000 + steps])
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    assert (np.abs(found.cov - exact) / scale).max() < 1e-8
    plain = (30000 + steps).T @ (30000 + steps) - count * 30000.0**2
    plain /= count - 1
    assert np.abs(plain / exact - 1).max() > 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused(value):
    rows = features(6, 10, 4)
    rows[7, 2] = value
    with pytest.raises(ValueError, match=r"1 of 40 features are not finite.*\(7, 2\)"):
        Moments.of([features(5, 10, 4), rows])


def test_what_cannot_be_summed_is_refused():
    with pytest.raises(ValueError, match=r"wanted \[N, 3\]"):
        Moments.of([np.zeros((2, 3)), np.zeros((2, 4))])
    with pytest.raises(ValueError, match=r"wanted \[N, D\]"):
        Moments.of([np.zeros((2, 0))])
    with pytest.raises(ValueError, match="floating"):
        Moments.of([np.zeros((2, 3), np.int32)])
    with pytest.raises(ValueError, match="1 feature vectors; 2 are needed"):
        Moments.of([np.zeros((1, 3))])
    with pytest.raises(ValueError, match="0 feature vectors"):
        Moments.of([])


def test_saved_moments_are_read_to_the_bit(tmp_path):
    path = tmp_path / "statistics" / "reference.npz"
    wanted = Moments.of([features(8, 100, 5)])
    wanted.save(path, {"network": "lite0", "sha256": "ab", "resize": ["pil", 3]})
    found, provenance = Moments.load(path)
    assert provenance == {"network": "lite0", "sha256": "ab", "resize": ["pil", 3]}
    assert [p.name for p in path.parent.iterdir()] == ["reference.npz"]
    assert found.count == 100
    assert_array_equal(found.mean, wanted.mean)
    assert_array_equal(found.cov, wanted.cov)
    assert found.digest() == wanted.digest()
    with pytest.raises(ValueError, match="JSON"):
        found.save(path, {"value": float("nan")})


# Of the float32 rows [1.5, -2.25, 0.1], [3, 1e-3, 7], [0.125, 100, -0.3] and
# [30000.5, 2, 1], by the version that wrote this format.
FORMAT_1 = {
    "format": np.int64(1),
    "count": np.int64(4),
    "sums": np.array([[480082, 1596, 125], [0, 16777, -209715], [0, 227328, -393216]]),
    "products": np.array(
        [
            [230407682948, 15362592, 7685542, 2562320, -7560, 12829],
            [0, 805296, -9646890, 0, 352522504, -3774870],
            [0, 10911744, -9437184, 281467729, 39616512, 219900333261],
            [0, 0, 0, 7627763712, 0, 329853173760],
            [0, 0, 0, 51678019584, 0, 154618822656],
        ]
    ),
    "provenance": np.frombuffer(b'{"k": 1}', np.uint8),
}


def test_files_of_exact_sums_are_read_to_the_bit(tmp_path):
    path = tmp_path / "old.npz"
    np.savez(path, **FORMAT_1)
    found, provenance = Moments.load(path)
    assert (found.count, provenance) == (4, {"k": 1})
    assert found.mean.tolist() == [7501.28125, 24.937750000011874, 1.9499999973922968]
    assert found.cov.tolist() == [
        [224984376.6497396, -229416.72598970204, -9496.127057251599],
        [-229416.72598970204, 2507.165666915877, -74.24415031169492],
        [-9496.127057251599, -74.24415031169492, 11.630000016043583],
    ]
    assert found.digest() == (
        "9d0fee14a4db77bb1ecc6a69314422788a620e676052170089e60587ea187413"
    )
    for part, spoilt in (
        ("sums", FORMAT_1["sums"][:2]),
        ("products", FORMAT_1["products"][:, :5]),
        ("products", FORMAT_1["products"].astype(float)),
        ("format", np.int64(3)),
    ):
        np.savez(path, **FORMAT_1 | {part: spoilt})
        with pytest.raises(ValueError, match="no moments"):
            Moments.load(path)


def test_another_file_is_not_read(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="no moments"):
        Moments.load(path)
    Moments.of([features(0, 10, 4)]).save(path, {})
    whole = path.read_bytes()
    entry = whole.index(b"PK\x01\x02")  # of the first array, in the list of all
    for damaged in (
        whole[:-300],
        whole[: entry + 8] + b"\x01" + whole[entry + 9 :],  # "it is encrypted"
        whole[: entry + 10] + b"\x61" + whole[entry + 11 :],  # another compression
    ):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="no moments"):
            Moments.load(path)
    with pytest.raises(FileNotFoundError):
        Moments.load(tmp_path / "none.npz")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="array.npy holds no moments"):
        Moments.load(tmp_path / "array.npy")


def test_ten_thousand_rows_stay_within_bounded_memory():
    """Five times as many rows need no more memory: sums and a chunk are kept."""
    code = """
import tracemalloc
import numpy as np
from scaling_ldm.metrics import Moments
rng = np.random.default_rng(0)
tracemalloc.start()
for count in (20, 100):
    tracemalloc.reset_peak()
    found = Moments.of(rng.random((100, 256), np.float32) for _ in range(count))
    print(tracemalloc.get_traced_memory()[1])
print(found.count)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, timeout=120
    )
    first, second, count = map(int, out.stdout.split())
    assert count == 10000
    assert first < 40e6
    assert second < first + 3e6, f"{first / 1e6:.1f} and {second / 1e6:.1f} MB"
