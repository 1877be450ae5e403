"""Peak rates of devices, and the share of them that is reached."""

import pytest

from scaling_ldm.flops import peaks


def test_every_peak_has_a_source_and_sane_numbers():
    for name, row in peaks.PEAKS.items():
        assert len(row.source) > 10, name
        assert row.device_kinds, name
        assert 8e9 < row.memory_bytes < 300e9, name
        assert row.flops_per_second, name
        for dtype, rate in row.flops_per_second.items():
            assert dtype in ("bfloat16", "float16", "tensorfloat32", "float32"), name
            assert 5e12 < rate < 5e15, (name, dtype)


@pytest.mark.parametrize(
    ("kind", "rate"),
    [
        ("TPU v2", 22.5e12),
        ("TPU v3", 61.5e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5", 459e12),
        ("TPU v5p", 459e12),
        ("TPU v6 lite", 918e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA L4", 121e12),
    ],
)
def test_device_kinds_as_jax_reports_them(kind, rate):
    assert peaks.peak(kind).flops_per_second["bfloat16"] == rate
    share, source = peaks.mfu(rate, kind, 2)
    assert share == 0.5
    assert source == peaks.peak(kind).source


@pytest.mark.parametrize(
    ("kind", "dtype", "reason"),
    [
        ("cpu", "bfloat16", "'cpu'"),
        ("TPU v5 lite pro", "bfloat16", "TPU v5 lite pro"),
        ("NVIDIA H100", "bfloat16", "NVIDIA H100"),
        ("Tesla T4", "bfloat16", "no published bfloat16 rate"),
        ("TPU v4", "float32", "no published float32 rate"),
    ],
)
def test_unknown_peaks_give_a_reason_and_no_number(kind, dtype, reason):
    row = peaks.peak(kind, dtype)
    assert isinstance(row, peaks.UnknownPeak)
    assert reason in row.reason
    assert "PEAKS" in row.reason and len(row.reason) < 150
    assert peaks.mfu(1e12, kind, 1, dtype) == (None, row.reason)


def test_mfu_refuses_the_impossible():
    share, reason = peaks.mfu(700e12, "NVIDIA H200", 1, "float32")
    assert share is None
    assert "number format" in reason
    with pytest.raises(ValueError, match="n_devices"):
        peaks.mfu(1e12, "TPU v4", 0)
