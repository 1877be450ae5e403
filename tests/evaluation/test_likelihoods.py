"""Likelihoods of held-out data at the ends of runs, as rows of the table."""

import dataclasses
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_ldm import config, records
from scaling_ldm.diffusion import noise
from scaling_ldm.evaluation import likelihoods
from scaling_ldm.models import denoisers, from_config
from scaling_ldm.records import measurements, table
from scaling_ldm.training import held_out, held_out_bound, mesh
from scaling_ldm.training.trained_model import TrainedModel

TINY = pathlib.Path(__file__).parents[2] / "experiments" / "results" / "tiny_study"
SPEC = records.read_jsonl(TINY / "runs.jsonl")[0]


def changed(experiment, **sections):
    return dataclasses.replace(
        experiment,
        **{
            name: dataclasses.replace(getattr(experiment, name), **fields)
            for name, fields in sections.items()
        },
    )


@pytest.fixture
def gaussian(tiny, monkeypatch):
    """The held-out data are of N(0, 0.5^2), and the network knows that, times `width`.

    The ideal network of N(0, s^2) predicts x0 = x alpha s^2 / (alpha^2 s^2 + sigma^2).
    """
    x = 0.5 * np.random.default_rng(0).normal(size=(64, 4, 4, 2)).astype(np.float32)
    schedules = []

    def network(params, x, t, cond):
        del cond
        schedule = schedules[-1]
        discrete = isinstance(schedule, noise.Discrete)
        at = jnp.round(t * schedule.steps) if discrete else t
        alpha, sigma = schedule.alpha(at), schedule.sigma(at)
        alpha, sigma = (v.reshape(-1, 1, 1, 1) for v in (alpha, sigma))
        share = alpha * params**2 / (alpha**2 * params**2 + sigma**2)
        return share * x

    def batches(experiment, device_mesh, source, names):
        assert names == ("x",)
        return [
            held_out.HeldOutBatch(
                batch={"x": jnp.asarray(x[start : start + 32])},
                times=jnp.zeros(32),
                indices=jnp.arange(start, start + 32),
                key=jax.random.key(0),
                samples=32,
            )
            for start in (0, 32)
        ]

    def denoiser(*_, **__):
        return denoisers.Denoiser(
            init=lambda key: {},
            apply=network,
            conditioning=(),
            image_tokens=1,
            other_tokens=0,
            embeddings=(),
        )

    monkeypatch.setattr(from_config, "denoiser", denoiser)
    monkeypatch.setattr(held_out, "held_out_batches", batches)
    monkeypatch.setattr(held_out_bound.data, "sources", lambda *_: (None, None))
    real = held_out_bound.diffusion_objective

    def objective(cfg):
        schedules.append(real(cfg).schedule)
        return real(cfg)

    monkeypatch.setattr(held_out_bound, "diffusion_objective", objective)
    return x


def model(width=0.5):
    return TrainedModel(
        run_id=SPEC.run_id,
        width=8,
        depth=1,
        step=SPEC.steps,
        train_flops=1.0,
        load=lambda device_mesh: jnp.float32(width),
        weights="ema",
    )


def resolved(tiny, **sections):
    e = changed(
        config.resolve(tiny),
        objective={"prediction": "x0", **sections.pop("objective", {})},
        evaluate={"held_out": ("vlb",), "held_out_draws": 64},
    )
    return changed(e, **sections)


@pytest.mark.parametrize("schedule", ["vp_cosine", "cosine"])
def test_the_bound_of_the_ideal_network_is_the_entropy(tiny, gaussian, schedule):
    """A density, in bits per dim; a network that is wrong has a higher one."""
    held_out_bound._compiled.cache_clear()
    e = resolved(tiny, objective={"schedule": schedule})
    device_mesh = mesh.build(e.mesh, {})
    given = e, TINY, model(), device_mesh
    with jax.set_mesh(device_mesh):
        found = held_out_bound.bits_per_dim(*given)
        wrong = held_out_bound.bits_per_dim(e, TINY, model(2.0), device_mesh)
    assert found.shape == (64,) and found.dtype == np.float64
    exact = np.mean(0.5 * np.log(2 * np.pi * 0.25) + gaussian**2 / 0.5) / math.log(2)
    assert found.mean() == pytest.approx(exact, abs=0.05)  # measured: 0.004, 0.009
    assert wrong.mean() > found.mean() + 1


def test_a_row_at_the_end_of_each_run_with_its_interval(tiny, monkeypatch, tmp_path):
    values = np.random.default_rng(1).normal(3.0, 0.5, size=400)
    calls = []
    monkeypatch.setitem(
        likelihoods.METRICS, "vlb", lambda *_: calls.append(1) or values
    )
    e, path = resolved(tiny), tmp_path / table.FILE
    before = measurements.measurement(
        SPEC, step=3, metric="loss", value=1.0, weights="raw", protocol_hash="p"
    )
    table.append_rows(path, [before])
    (row,) = likelihoods.measure(e, TINY, [(SPEC, path, model())])
    assert (row.metric, row.step, row.weights) == ("vlb", SPEC.steps, "ema")
    assert row.value == pytest.approx(values.mean()) and row.level == 0.9
    half = 1.645 * values.std(ddof=1) / 20
    assert row.high - row.value == pytest.approx(half, rel=1e-3)
    assert row.value - row.low == pytest.approx(half, rel=1e-3)
    assert table.read_rows(path)[0] == [before, row]
    again = likelihoods.measure(e, TINY, [(SPEC, path, model())])
    assert again == [row] and len(calls) == 1  # what is there is kept
    more = changed(e, evaluate={"held_out_draws": 8})
    (other,) = likelihoods.measure(more, TINY, [(SPEC, path, model())])
    assert other.protocol_hash != row.protocol_hash and len(calls) == 2


def test_bounds_of_other_weightings_compare_and_of_other_data_do_not(tiny):
    e = resolved(tiny)

    def protocol(**sections):
        return table.loss_protocol_hash(
            "vlb", records.to_json(changed(e, **sections)), {}
        )

    same = {"weighting": "truncated_snr", "prediction": "v", "caption_dropout": 0.5}
    assert protocol(objective=same) == protocol()
    others = (
        {"objective": {"schedule": "cosine"}},
        {"evaluate": {"held_out_draws": 1}},
        {"validation": {"samples": 8}},
        {"encode": {"autoencoder": "icons_f4"}},
        {"data": {"seed": 1}},
        {"data": {"shuffle_window": 4}},
    )
    assert len({protocol(), *(protocol(**other) for other in others)}) == 7
