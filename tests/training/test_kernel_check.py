"""A kernel that is wrong on a device is refused before anything is trained with it."""

import dataclasses
import functools
import pathlib

import jax
import pytest

from scaling_ldm import config, study
from scaling_ldm.models import attention_backends
from scaling_ldm.training import jobs, kernel_check

SMALL = config.ModelConfig(head_dim=16, compute_dtype="bfloat16")
INTERPRETED = functools.partial(attention_backends._pallas, interpret=True)


def with_kernel(monkeypatch, apply):
    """The device's kernel is this one; its device is called a TPU."""
    monkeypatch.setitem(attention_backends.KERNELS, "pallas", apply)
    monkeypatch.setattr(kernel_check, "_QUERIES", 16)
    monkeypatch.setattr(kernel_check, "_KEYS", 19)
    monkeypatch.setattr(attention_backends, "_backend", lambda platform: "tpu")


def test_a_right_kernel_is_used(monkeypatch):
    with_kernel(monkeypatch, INTERPRETED)
    kernel_check.check(SMALL)
    found = kernel_check.difference("pallas", "bfloat16", 16)
    assert 0 < found < kernel_check.LARGEST_DIFFERENCE / 2


def one_gradient_is_off(q, k, v, mask):
    @jax.custom_vjp
    def off(v):
        return v

    off.defvjp(lambda v: (v, None), lambda _, g: (1.1 * g,))
    return INTERPRETED(q, k, off(v), mask)


@pytest.mark.parametrize(
    "apply",
    [
        lambda q, k, v, mask: INTERPRETED(q, k, v, None),
        lambda q, k, v, mask: INTERPRETED(q, k, v, mask) * float("nan"),
        one_gradient_is_off,
    ],
    ids=["sees padding", "nan", "a gradient"],
)
def test_a_wrong_kernel_is_refused_by_name(monkeypatch, apply):
    with_kernel(monkeypatch, apply)
    with pytest.raises(config.ConfigError, match="'pallas' is wrong on this cpu"):
        kernel_check.check(SMALL)


def test_nothing_is_computed_where_attention_is_plain(monkeypatch):
    monkeypatch.setattr(kernel_check, "difference", None)
    kernel_check.check(SMALL)  # on a CPU
    with_kernel(monkeypatch, None)
    kernel_check.check(dataclasses.replace(SMALL, attention="plain"))
    monkeypatch.setattr(kernel_check.jax, "local_devices", None)
    plain = dataclasses.replace(SMALL, architecture="autoencoder_kl")
    kernel_check.check(plain)  # it has no kernels


def test_a_kernel_that_the_device_cannot_run_is_refused(monkeypatch):
    def broken(q, k, v, mask):
        raise jax.errors.JaxRuntimeError("INTERNAL: no valid engine")

    with_kernel(monkeypatch, broken)
    with pytest.raises(config.ConfigError, match="cannot run on this cpu: INTERNAL: "):
        kernel_check.check(SMALL)


@pytest.mark.parametrize(
    ("stages", "checked"),
    [
        (("encode", "export"), False),
        (("plan", "train"), True),
        (("generate",), True),
        (("evaluate",), True),
    ],
)
def test_only_stages_that_use_a_denoiser_check_it(monkeypatch, tiny, stages, checked):
    tiny = tiny.copy_and_resolve_references()
    tiny.evaluate.network = "lite0"
    seen, cluster = [], (None, None, None)
    found = study._Study(
        config.resolve(tiny), pathlib.Path("w"), stages, True, None, cluster
    )
    monkeypatch.setattr(jobs, "start", lambda *_: None)
    monkeypatch.setattr(kernel_check, "check", seen.append)
    found._start_devices()
    assert bool(seen) == checked
