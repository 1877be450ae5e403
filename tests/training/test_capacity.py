"""What is refused before anything is encoded: memory, devices, runs without a row."""

import dataclasses
import pathlib

import jax
import pytest

from scaling_ldm import config, records
from scaling_ldm.stages import train
from scaling_ldm.training import capacity
from scaling_ldm.workdir import runs

STUDY = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "tiny_study"
GIB = 2**30


@pytest.fixture
def specs():
    return records.read_plan(STUDY)


@pytest.fixture
def host(monkeypatch):
    monkeypatch.setattr(capacity, "host_bytes", lambda: GIB)


def changed(tiny, **sections):
    c = tiny.to_dict()
    for section, values in sections.items():
        c[section].update(values)
    return config.resolve(c)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"train": {"steps_per_dispatch": 10**9}}, "steps_per_dispatch +"),
        ({"data": {"prefetch_batches": 10**9}}, "data.prefetch_batches)"),
        ({"train": {"batch_size": 8 * 10**7}}, "train.batch_size"),
        ({"validation": {"samples": 10**9}}, "config.validation.samples = 1000000000"),
        ({"generate": {"batch_size": 10**9}}, "config.generate.batch_size"),
        ({"encode": {"batch_size": 10**9}, "data": {"source": "memory"}}, "encode.b"),
        ({"data": {"text_tokens": 10**9}}, "config.validation.samples"),
    ],
)
def test_pictures_that_memory_cannot_hold_are_refused(tiny, specs, host, change, said):
    every = ("plan", "encode", "train", "generate")
    capacity.check(config.resolve(tiny), specs, every, 1)  # all is well without it
    with pytest.raises(config.ConfigError, match="does not fit into memory") as e:
        capacity.check(changed(tiny, **change), specs, every, 1)
    assert said in str(e.value) and "a host has 1 GiB" in str(e.value)


def test_what_a_stage_holds_counts_where_it_runs(tiny, specs, host):
    e = changed(tiny, generate={"batch_size": 10**9})
    capacity.check(e, specs, ("plan", "train"), 1)
    row = 8 * 8 * 3 * 4 + 4 * 4 + 4 + 4  # x, text, mask, label
    held = capacity.of_pictures(e, ("train",), processes=2)
    queued = e.train.batch_size * (e.train.steps_per_dispatch + e.data.prefetch_batches)
    assert [one.nbytes for one in held] == [
        queued * row // 2,
        e.validation.samples * row // 2,
    ]


def test_a_state_that_devices_cannot_hold_is_refused(tiny, specs, host):
    """Gradients are not counted: 4 bytes of parameters are not held between steps."""
    e, spec = config.resolve(tiny), specs[0]
    devices = jax.local_device_count()
    assert devices > 2
    params = GIB // 4 // devices  # 5 copies of 4 bytes on every device: 5 GiB
    large = dataclasses.replace(
        spec, params=params, state_bytes=6 * 4 * params, run_id="large"
    )
    assert capacity.state_bytes(large, 1) == 5 * GIB // devices
    with pytest.raises(config.ConfigError, match="5 GiB for state of large"):
        capacity.check(e, [spec, large], ("train",), 1)
    with pytest.raises(config.ConfigError, match="2.5 GiB for state of large"):
        capacity.check(e, [large], ("train",), 2)
    capacity.check(e, [large], ("train",), 6)
    capacity.check(e, [large], ("plan", "fit"), 1)
    # A run may be continued with another number of passes than it was planned with.
    passes = changed(tiny, train={"microbatch": e.train.batch_size // 2})
    with pytest.raises(config.ConfigError, match="5 GiB for state of large"):
        capacity.check(passes, [large], ("train",), 1)


def test_rows_that_do_not_fit_the_devices_are_refused(tiny, specs, tmp_path):
    e = config.resolve(tiny)
    train.check_rows(e, tmp_path, specs, ("train",))
    odd = dataclasses.replace(specs[2], batch_size=13)
    with pytest.raises(config.ConfigError, match="batch_size of .* = 13 is not divis"):
        train.check_rows(e, tmp_path, [*specs[:2], odd], ("train",))
    with pytest.raises(config.ConfigError, match="3 does not divide the"):
        train.check_rows(changed(tiny, mesh={"fsdp": 3}), tmp_path, specs, ("train",))


def test_a_run_to_sample_is_one_of_the_plan(tiny, specs):
    named = changed(tiny, generate={"run": specs[3].run_id})
    runs.check_run_to_sample(named, specs)
    runs.check_run_to_sample(config.resolve(tiny), specs)
    other = changed(tiny, generate={"run": specs[3].run_id + "0"})
    with pytest.raises(config.ConfigError, match=f"did you mean {specs[3].run_id}"):
        runs.check_run_to_sample(other, specs)
