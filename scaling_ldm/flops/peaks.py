"""Peak arithmetic rates of accelerators, and model FLOPs utilisation (MFU).

Rates are dense: rates for structured sparsity in a data sheet are halved. They are per
JAX device: a TPU v2, v3 or v7x chip appears as two devices, so those rows hold half a
chip. A device that is not in the table is `UnknownPeak` with a reason, and so is a
number format without a published rate. Nothing is guessed from a similar name.

Choosing the format: JAX's default precision runs float32 matrix products in one
bfloat16 pass on TPUs, and in TF32 on NVIDIA GPUs since Ampere. So "bfloat16" and
"tensorfloat32" are the formats to ask for there, unless the precision was raised.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

GIB = 2**30
GB = 10**9


@dataclass(frozen=True, kw_only=True)
class Peak:
    """What one JAX device can do.

    Attributes:
      device_kinds: regular expressions; one of them matches all of
        `jax.Device.device_kind`.
      flops_per_second: dense peak of each number format, FLOP/s (2 x MAC).
      memory_bytes: device memory as the data sheet states it.
      source: title of the vendor's document.
    """

    device_kinds: tuple[str, ...]
    flops_per_second: Mapping[str, float]
    memory_bytes: int
    source: str


@dataclass(frozen=True, kw_only=True)
class UnknownPeak:
    """No peak is known; `reason` says why, in one sentence."""

    reason: str


def _tpu(kinds: str, bf16: float, memory: float, source: str) -> Peak:
    return Peak(
        device_kinds=tuple(kinds.split("|")),
        flops_per_second={"bfloat16": bf16},
        memory_bytes=int(memory * GIB),
        source=f"Google Cloud documentation, {source}",
    )


def _gpu(
    kind: str,
    memory: int,
    source: str,
    *,
    bf16: float | None = None,
    fp16: float | None = None,
    tf32: float | None = None,
    fp32: float | None = None,
) -> Peak:
    rates = {
        "bfloat16": bf16,
        "float16": fp16 if bf16 is None else bf16,
        "tensorfloat32": tf32,
        "float32": fp32,
    }
    return Peak(
        device_kinds=(kind,),
        flops_per_second={name: rate for name, rate in rates.items() if rate},
        memory_bytes=memory * GB,
        source=source,
    )


_A100 = {"bf16": 312e12, "tf32": 156e12, "fp32": 19.5e12}
_HOPPER_SXM = {"bf16": 989.5e12, "tf32": 494.7e12, "fp32": 67e12}
_HOPPER_NVL = {"bf16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12}

PEAKS: dict[str, Peak] = {
    "tpu-v2": _tpu("TPU v2", 22.5e12, 8, "TPU v2 (45 TFLOPS and 16 GiB a chip)"),
    "tpu-v3": _tpu("TPU v3", 61.5e12, 16, "TPU v3 (123 TFLOPS and 32 GiB a chip)"),
    "tpu-v4": _tpu("TPU v4", 275e12, 32, "TPU v4"),
    "tpu-v5e": _tpu("TPU v5 lite|TPU v5e", 197e12, 16, "TPU v5e"),
    "tpu-v5p": _tpu("TPU v5|TPU v5p", 459e12, 95, "TPU v5p"),
    "tpu-v6e": _tpu("TPU v6 lite|TPU v6e", 918e12, 32, "TPU v6e (Trillium)"),
    "tpu-v7x": _tpu(
        "TPU7x", 1153.5e12, 96, "TPU7x (Ironwood; 2307 TFLOPS and 192 GiB a chip)"
    ),
    "a100-40gb": _gpu(
        r"NVIDIA A100-(SXM4|PCIE)-40GB|A100-(SXM4|PCIE)-40GB",
        40,
        "NVIDIA A100 Tensor Core GPU data sheet",
        **_A100,
    ),
    "a100-80gb": _gpu(
        r"NVIDIA A100-SXM4-80GB|NVIDIA A100 80GB PCIe",
        80,
        "NVIDIA A100 Tensor Core GPU data sheet",
        **_A100,
    ),
    "h100-sxm": _gpu(
        r"NVIDIA H100 80GB HBM3",
        80,
        "NVIDIA H100 Tensor Core GPU data sheet (SXM; sparse rates halved)",
        **_HOPPER_SXM,
    ),
    "h100-pcie": _gpu(
        r"NVIDIA H100 PCIe",
        80,
        "NVIDIA H100 Tensor Core GPU data sheet, first edition (PCIe; sparse halved)",
        bf16=756.5e12,
        tf32=378e12,
        fp32=51e12,
    ),
    "h100-nvl": _gpu(
        r"NVIDIA H100 NVL",
        94,
        "NVIDIA H100 Tensor Core GPU data sheet (NVL; sparse rates halved)",
        **_HOPPER_NVL,
    ),
    "h200-sxm": _gpu(
        r"NVIDIA H200",
        141,
        "NVIDIA H200 Tensor Core GPU data sheet (SXM; sparse rates halved)",
        **_HOPPER_SXM,
    ),
    "h200-nvl": _gpu(
        r"NVIDIA H200 NVL",
        141,
        "NVIDIA H200 Tensor Core GPU data sheet (NVL; sparse rates halved)",
        **_HOPPER_NVL,
    ),
    "b200": _gpu(
        r"NVIDIA B200",
        180,
        "NVIDIA Blackwell data sheet (HGX B200, an eighth; sparse rates halved)",
        bf16=2250e12,
        tf32=1125e12,
        fp32=75e12,
    ),
    "gb200": _gpu(
        r"NVIDIA GB200",
        186,
        "NVIDIA GB200 NVL72 data sheet (per GPU; sparse rates halved)",
        bf16=2500e12,
        tf32=1250e12,
        fp32=80e12,
    ),
    "l4": _gpu(
        r"NVIDIA L4",
        24,
        "NVIDIA L4 Tensor Core GPU data sheet (sparse rates halved)",
        bf16=121e12,
        tf32=60e12,
        fp32=30.3e12,
    ),
    "l40s": _gpu(
        r"NVIDIA L40S",
        48,
        "NVIDIA L40S data sheet",
        bf16=362.05e12,
        tf32=183e12,
        fp32=91.6e12,
    ),
    "a10": _gpu(
        r"NVIDIA A10",
        24,
        "NVIDIA A10 Tensor Core GPU data sheet",
        bf16=125e12,
        tf32=62.5e12,
        fp32=31.2e12,
    ),
    "v100-sxm2": _gpu(
        r"Tesla V100-SXM2-16GB",
        16,
        "NVIDIA V100 Tensor Core GPU data sheet (NVLink)",
        fp16=125e12,
        fp32=15.7e12,
    ),
    "v100-sxm2-32gb": _gpu(
        r"Tesla V100-SXM2-32GB",
        32,
        "NVIDIA V100 Tensor Core GPU data sheet (NVLink)",
        fp16=125e12,
        fp32=15.7e12,
    ),
    "v100-pcie": _gpu(
        r"Tesla V100-PCIE-16GB",
        16,
        "NVIDIA V100 Tensor Core GPU data sheet (PCIe)",
        fp16=112e12,
        fp32=14e12,
    ),
    "t4": _gpu(
        r"Tesla T4",
        16,
        "NVIDIA T4 Tensor Core GPU data sheet",
        fp16=65e12,
        fp32=8.1e12,
    ),
}


def peak(device_kind: str, dtype: str = "bfloat16") -> Peak | UnknownPeak:
    """The row of a device, if it has a rate for `dtype`.

    Args:
      device_kind: `jax.Device.device_kind`, as reported.
      dtype: "bfloat16", "float16", "tensorfloat32" or "float32".

    Returns:
      A `Peak` whose `flops_per_second` has `dtype`, or `UnknownPeak` with the reason.
    """
    for name, row in PEAKS.items():
        if any(re.fullmatch(kind, device_kind) for kind in row.device_kinds):
            if dtype in row.flops_per_second:
                return row
            have = ", ".join(row.flops_per_second)
            return UnknownPeak(
                reason=f"no published {dtype} rate for {device_kind!r} ({name}); "
                f"its row in scaling_ldm.flops.peaks.PEAKS has {have}"
            )
    return UnknownPeak(
        reason=f"no published peak for device kind {device_kind!r} in "
        "scaling_ldm.flops.peaks.PEAKS"
    )


def mfu(
    flops_per_second: float,
    device_kind: str,
    n_devices: int,
    dtype: str = "bfloat16",
) -> tuple[float | None, str]:
    """The share of the peak that a measured rate reaches.

    Args:
      flops_per_second: measured rate over all devices, FLOP/s (2 x MAC). Model FLOPs
        give MFU, hardware FLOPs give HFU.
      device_kind: `jax.Device.device_kind`.
      n_devices: number of JAX devices that took part, at least 1.
      dtype: number format of the matrix products; see the module's docstring.

    Returns:
      (share, source of the peak), or (None, reason). There is no share if the device is
      unknown, or if it exceeds 1, which means that one of the arguments is wrong.

    Raises:
      ValueError: fewer than one device.

    Example:
      >>> mfu(137.5e12, "TPU v4", 1)
      (0.5, 'Google Cloud documentation, TPU v4')
    """
    if n_devices < 1:
        raise ValueError(f"n_devices must be at least 1, got {n_devices}")
    row = peak(device_kind, dtype)
    if isinstance(row, UnknownPeak):
        return None, row.reason
    share = flops_per_second / (n_devices * row.flops_per_second[dtype])
    if share > 1:
        return None, (
            f"{flops_per_second:.3g} FLOP/s is {share:.2f} x the {dtype} peak of "
            f"{n_devices} x {device_kind!r}: check the number format, the device "
            "count and the timing"
        )
    return share, row.source
