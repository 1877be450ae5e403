"""Flags for collectives: where they are set, whose value stays, who accepts them."""

import json
import os
import subprocess
import sys

import pytest
from processes import ROOT

from scaling_ldm import config
from scaling_ldm.training import xla_flags

ON = config.MeshConfig()
OFF = config.MeshConfig(overlap_collectives=False)
LATENCY = "xla_tpu_enable_latency_hiding_scheduler"


@pytest.fixture
def machine(monkeypatch):
    """(platforms that jax is asked for, what is installed, whether a GPU is there)."""

    def become(asked="", installed=(), gpu=False):
        monkeypatch.delenv("XLA_FLAGS", raising=False)
        monkeypatch.delenv("LIBTPU_INIT_ARGS", raising=False)
        monkeypatch.setattr(xla_flags, "_asked", lambda: asked)
        monkeypatch.setattr(xla_flags, "_find", lambda name: name in installed)
        monkeypatch.setattr(xla_flags, "_NVIDIA", (os.devnull,) if gpu else ("/none",))
        return monkeypatch

    return become


def set_now(cfg=ON):
    xla_flags.set_for_devices(cfg)
    return os.environ.get("LIBTPU_INIT_ARGS"), os.environ.get("XLA_FLAGS")


def all_of(platform):
    return " ".join(f"--{name}=true" for name in xla_flags.FLAGS[platform])


def test_flags_are_set_for_the_devices_that_will_be_used(machine):
    machine(installed=("libtpu",))
    assert set_now() == (all_of("tpu"), None)
    assert set_now() == (all_of("tpu"), None)  # again: nothing is said twice
    machine(installed=("jax_cuda13_plugin",), gpu=True)
    assert set_now() == (None, all_of("cuda"))
    machine(asked="cuda", installed=("jax_cuda12_plugin", "libtpu"), gpu=True)
    assert set_now() == (None, all_of("cuda"))


def test_nothing_is_set_elsewhere_or_when_turned_off(machine):
    machine(asked="cpu", installed=("libtpu", "jax_cuda13_plugin"), gpu=True)
    assert set_now() == (None, None)
    machine(installed=("jax_cuda13_plugin",))  # a compiler without a GPU
    assert set_now() == (None, None)
    machine(installed=("libtpu",))
    assert set_now(OFF) == (None, None)
    assert xla_flags.options(OFF, "tpu") == xla_flags.options(ON, "cpu") == {}


@pytest.mark.parametrize("variable", ["XLA_FLAGS", "LIBTPU_INIT_ARGS"])
def test_the_value_of_a_user_stays(machine, variable):
    given = f"--{LATENCY}=false --xla_dump_to=x"
    machine(installed=("libtpu",)).setenv(variable, given)
    options = xla_flags.options(ON, "tpu")
    assert {LATENCY, *options} == {*xla_flags.FLAGS["tpu"]} and LATENCY not in options
    found = dict(zip(("LIBTPU_INIT_ARGS", "XLA_FLAGS"), set_now(), strict=True))
    assert found[variable].startswith(given)
    assert f"--{LATENCY}=true" not in " ".join(filter(None, found.values()))
    said = " ".join(filter(None, found.values()))
    assert all(said.count(f"--{name}=") == 1 for name in xla_flags.FLAGS["tpu"])


def test_a_file_of_flags_is_left_alone(machine):
    machine(installed=("libtpu",)).setenv("LIBTPU_INIT_ARGS", "flags.txt")
    assert set_now() == ("flags.txt", None)


def test_the_documentation_has_every_flag():
    text = (ROOT / "docs" / "clusters.md").read_text()
    for platform, name in (("TPU", "tpu"), ("GPU", "cuda")):
        for flag, does in xla_flags.FLAGS[name].items():
            assert f"| {platform} | `{flag}` | {does} |" in text


# Compilers take locks and read variables once: a process of its own.
ACCEPTS = """
import json, sys
import jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from scaling_ldm import config
from scaling_ldm.training import mesh, topologies, xla_flags
devices = topologies.describe(sys.argv[1])
on = mesh.build(config.MeshConfig(fsdp=4), {}, use=devices.devices)
options = xla_flags.options(config.MeshConfig(), devices.platform)
tiles = {"xla_gpu_enable_triton_gemm": False} if devices.platform == "cuda" else {}
def loss(w, x):
    return jnp.sum((x @ jax.reshard(w, P())) ** 2)
with jax.set_mesh(on):
    w, x = (
        jax.ShapeDtypeStruct((256, 256), jnp.float32, sharding=where)
        for where in (
            mesh.named_sharding(on, spec) for spec in (P(None, "fsdp"), mesh.BATCH)
        )
    )
    lowered = jax.jit(jax.grad(loss)).trace(w, x).lower(
        lowering_platforms=(devices.platform,)
    )
    refused = []
    for more in [options, *({name: True} for name in options), {"xla_no_such": True}]:
        try:
            lowered.compile(compiler_options=tiles | more)
        except jax.errors.JaxRuntimeError as e:
            refused.append([list(more), str(e)])
print(json.dumps([list(options), refused]))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "compiler", "platform"),
    [("v5e:2x2", "libtpu", "tpu"), ("h100:1x4", "jax_cuda13_plugin", "cuda")],
)
def test_compilers_accept_every_flag(topology, compiler, platform):
    pytest.importorskip(compiler)
    done = subprocess.run(
        [sys.executable, "-c", ACCEPTS, topology],
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "LIBTPU_INIT_ARGS": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    options, refused = json.loads(done.stdout)
    assert options == list(xla_flags.FLAGS[platform])
    (unknown,) = refused  # of a flag that does not exist, they say so
    assert unknown[0] == ["xla_no_such"] and "xla_no_such" in unknown[1]


STARTS = """
import os
from unittest import mock
from scaling_ldm import config
from scaling_ldm.training import mesh, xla_flags
with mock.patch.object(xla_flags, "_is_used", lambda platform: platform == "cuda"):
    xla_flags.set_for_devices(config.MeshConfig())
assert os.environ["XLA_FLAGS"].count("--") == len(xla_flags.FLAGS["cuda"])
import jax
print(int(jax.numpy.arange(3).sum()))
"""


@pytest.mark.slow
def test_jaxlib_starts_with_the_flags_for_gpus():
    """It parses XLA_FLAGS itself, and ends a process that names an unknown flag."""
    done = subprocess.run(
        [sys.executable, "-c", STARTS],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr[-2000:]
