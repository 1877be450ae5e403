"""Studies of four sizes and three budgets that share their training, or do not."""

import contextlib
import functools

import pytest

from scaling_ldm import config, records
from scaling_ldm.stages import plan, train

WEIGHTS = ("raw", "ema", "power_0.1")
SIZES = ((8, 1), (16, 1), (16, 2), (24, 1))
BUDGETS = (2e8, 3e8, 4.5e8)


def study(tiny, reuse, **changes):
    c = tiny.copy_and_resolve_references()
    c.plan.reuse, c.plan.budgets_flops = reuse, BUDGETS
    c.plan.sizes, c.plan.sizes_per_budget = SIZES, 0
    c.optimizer.warmup_fraction, c.optimizer.warmup_steps = 0.0, 5
    c.optimizer.averages = WEIGHTS[1:]
    c.train.steps_per_dispatch, c.train.checkpoints_per_run = 4, 1
    c.train.log_every_steps = 1
    c.validation.samples, c.validation.marks = 24, 3
    c.fit.bootstrap = 50
    c.update_from_flattened_dict(changes)
    return config.resolve(c)


class Killed(BaseException):
    """What ends a process of these tests."""


@contextlib.contextmanager
def killed(place, name, call):
    """In it, a process is killed after a function's call of this number."""
    whole, calls = getattr(place, name), []

    def cut(*arguments):
        found = whole(*arguments)
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, name, cut)
        yield


@functools.cache
def planned(experiment):
    return plan.plan(experiment)


def trained(experiment, workdir, rows=None):
    specs = planned(experiment)
    plan.write(specs, workdir)
    records.write_json(
        workdir / "experiment.json",
        {"config": records.to_json(experiment), "name": experiment.name},
    )
    numbered = [(k, s) for k, s in enumerate(specs) if rows is None or k in rows]
    return train.run(experiment, workdir, numbered, len(specs))
