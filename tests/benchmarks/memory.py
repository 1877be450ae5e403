"""Peak memory of generate and evaluate at two numbers of pictures, on the CPU.

python tests/benchmarks/memory.py [--pictures 1000 10000] [--features 16]

Pictures of 32 x 32 by a small network; a stand-in gives the features, whose number
decides what evaluate keeps: all of them, [pictures, features] in float32, from which
intervals, KID and precision are drawn. Pictures are never kept. Peaks are of resident
memory above what the process had before, compiled code and libraries left out.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import pathlib
import sys
import tempfile

import numpy as np

from scaling_ldm import config
from scaling_ldm.evaluation import extractors
from scaling_ldm.models.encoders.features import Features
from scaling_ldm.stages import evaluate, generate, plan, train
from scaling_ldm.workdir import samples

SIDE = 32
WARM = 512  # pictures of the run that compiles


def experiment(pictures: int, metrics: tuple[str, ...]) -> config.Experiment:
    c = config.default()
    c.name = "memory"
    c.data.shape, c.data.text_tokens, c.data.vocab_size = (SIDE, SIDE, 3), 4, 256
    c.model.patch_size, c.model.head_dim = 8, 8
    c.model.text_width = c.model.time_width = 8
    c.model.compute_dtype = "float32"
    c.plan.sizes, c.plan.steps, c.plan.budgets_flops = ((8, 1),), 4, ()
    c.plan.flops_per_second_per_device = 1e9
    c.plan.sizes_per_budget, c.plan.minimum_steps, c.train.batch_size = 0, 4, 8
    c.train.checkpoints_per_run = 1
    c.validation.samples = c.validation.batch_size = 16
    c.generate.images, c.generate.batch_size, c.generate.steps = pictures, 256, 1
    c.generate.sampler = "ddim"
    c.evaluate.network, c.evaluate.metrics = "lite0", metrics
    c.evaluate.batch_size, c.evaluate.reference_images = 256, 512
    c.evaluate.bootstrap = 2
    return config.resolve(c)


def stand_in(features: int) -> extractors.FeatureNetwork:
    import jax

    rng = np.random.default_rng(0)
    params = rng.normal(size=(SIDE * SIDE * 3, features)).astype(np.float32) / 8000

    def apply(params: jax.Array, x: jax.Array) -> Features:
        rows = x.reshape(x.shape[0], SIDE, SIDE * 3).reshape(x.shape[0], -1)
        return Features(jax.numpy.tanh(rows @ params), None)

    here = pathlib.Path(__file__)
    return extractors.FeatureNetwork(apply, params, lambda x: x, "none", here)


def _status(name: str) -> int:
    """A value in bytes from the kernel's statistics of this process."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return next(int(x.split()[1]) for x in lines if x.startswith(name + ":")) * 1024


def _settle() -> int:
    """Frees memory and resets the kernel's peak; returns the bytes in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(workdir: pathlib.Path, e: config.Experiment) -> int:
    """Peak bytes of drawing and measuring all pictures, above those in use before."""
    specs = plan.plan(e)
    before = _settle()
    generate.run(e, workdir, specs)
    (found, *_) = evaluate.run(e, workdir, specs)
    most = _status("VmHWM") - before
    held = sum(len(x) for x in samples.read_images(workdir))
    assert found.images == held == e.generate.images
    return most


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, nargs=2, default=(1000, 10_000))
    parser.add_argument("--features", type=int, default=16)
    parser.add_argument("--metrics", nargs="+", default=("fd",))
    args = parser.parse_args()
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    extractors._LOADERS["lite0"] = lambda cfg: stand_in(args.features)
    extractors.weights_path = lambda cfg: pathlib.Path(__file__)
    with tempfile.TemporaryDirectory() as name:
        workdir = pathlib.Path(name)
        e = experiment(WARM, tuple(args.metrics))
        specs = plan.plan(e)
        plan.write(specs, workdir)
        train.run(e, workdir, list(enumerate(specs)), len(specs))
        peak(workdir, e)
        found = {}
        for pictures in args.pictures:
            how = dataclasses.replace(e.generate, images=pictures)
            found[pictures] = peak(workdir, dataclasses.replace(e, generate=how))
    few, many = args.pictures
    more = many - few
    print(
        json.dumps(
            {
                "peak_bytes": found,
                "growth_bytes": found[many] - found[few],
                "features_bytes": more * args.features * 4,
                "pictures_bytes": more * SIDE * SIDE * 3,
            }
        )
    )
    sys.stdout.flush()


if __name__ == "__main__":
    main()
