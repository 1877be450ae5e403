"""What a step holds on one device, and which runs of a plan are traced."""

import dataclasses

import pytest

from scaling_ldm import config
from scaling_ldm.stages import plan
from scaling_ldm.training import step_memory
from scaling_ldm.workdir import plan_table


def on(tiny, **model):
    c = tiny.copy_and_resolve_references()
    with c.unlocked():
        c.plan.accelerator, c.plan.devices = "h100-sxm", 4
        c.train.batch_size = 16
        for name, value in model.items():
            setattr(c.model, name, value)
    return config.resolve(c)


def held(experiment, devices=4, fsdp=1, accelerator="h100-sxm", depth=8):
    return step_memory.step_memory(experiment, 128, depth, devices, fsdp, accelerator)


def test_sharing_saves_state_and_remat_saves_activations(tiny):
    e = on(tiny)
    one, shared, remat = held(e), held(e, fsdp=4), held(on(tiny, remat=True))
    # Parameters, averages and moments are inputs; four devices share most of them.
    assert 0.25 * one.inputs < shared.inputs < 0.35 * one.inputs
    assert shared.temporaries < one.temporaries
    assert held(e, fsdp=4, accelerator="tpu-v5p").inputs > shared.inputs  # padded
    assert remat.inputs == one.inputs
    assert remat.temporaries < 0.8 * one.temporaries


def test_flags_for_overlap_hold_more_on_gpus(tiny):
    e = on(tiny, remat=True)
    mesh = dataclasses.replace(e.mesh, overlap_collectives=False)
    without = dataclasses.replace(e, mesh=mesh)
    assert held(without, fsdp=4).temporaries < held(e, fsdp=4).temporaries
    on_tpu = {"fsdp": 4, "accelerator": "tpu-v5p"}
    assert held(without, **on_tpu) == held(e, **on_tpu)


def test_devices_that_do_not_divide_are_refused(tiny):
    with pytest.raises(ValueError, match="16 rows in passes of 0 on 3 devices"):
        held(on(tiny), devices=3)
    e = on(tiny)
    passes = dataclasses.replace(e, train=dataclasses.replace(e.train, microbatch=4))
    with pytest.raises(ValueError, match="16 rows in passes of 4 on 8 devices"):
        held(passes, devices=8)


def test_a_plan_traces_its_largest_networks_once(tiny, monkeypatch):
    e = on(tiny)
    (row, *_) = plan.plan(e)
    sizes = [(64, 2), (64, 4), (64, 6), (64, 8)]
    rows = [
        dataclasses.replace(
            row, run_id=f"{i}", width=w, depth=d, memory_bytes_per_device=100 * d
        )
        for i, (w, d) in enumerate([*sizes, sizes[-1]])
    ]
    traced = []

    def peak(experiment, width, depth, *devices):
        traced.append((width, depth, *devices))
        return step_memory.memory.PeakMemory(inputs=1, temporaries=depth)

    monkeypatch.setattr(step_memory, "step_memory", peak)
    assert step_memory.estimated(e, rows) == rows  # all are small
    monkeypatch.setattr(step_memory, "LARGE", 300)
    found = step_memory.estimated(e, rows)
    assert traced == [(64, d, 4, 1, "h100-sxm") for d in (8, 6, 4)]
    got = [one.memory_bytes_per_device for one in found]
    assert got == [200, 5, 7, 9, 9]
    traced.clear()
    monkeypatch.setattr(step_memory, "LARGE", 0)
    monkeypatch.setattr(step_memory, "TRACED", 1)
    got = [one.memory_bytes_per_device for one in step_memory.estimated(e, rows)]
    assert got == [200, 400, 600, 9, 9] and len(traced) == 1

    def no_kernel(*_):
        raise config.ConfigError("cuDNN is not found")

    monkeypatch.setattr(step_memory, "step_memory", no_kernel)
    assert step_memory.estimated(e, rows) == rows
    elsewhere = dataclasses.replace(e.plan, accelerator="2-core CPU")
    on_cpu = dataclasses.replace(e, plan=elsewhere)
    assert step_memory.estimated(on_cpu, rows) == rows


@pytest.mark.parametrize(
    ("architecture", "count"), [("unet", 3), ("autoencoder_kl", 0)]
)
def test_u_nets_are_traced_and_autoencoders_are_not(
    architecture, count, tiny, monkeypatch, capsys
):
    e = on(tiny)
    (row, *_) = plan.plan(e)
    e = dataclasses.replace(
        e, model=dataclasses.replace(e.model, architecture=architecture)
    )
    rows = [
        dataclasses.replace(row, width=w, memory_bytes_per_device=w)
        for w in (32, 64, 96, 128)
    ]
    monkeypatch.setattr(step_memory, "LARGE", 0)
    monkeypatch.setattr(
        step_memory,
        "step_memory",
        lambda *_: step_memory.memory.PeakMemory(inputs=999, temporaries=0),
    )
    clock = iter(range(0, 600, 6))
    monkeypatch.setattr(step_memory.progress.time, "perf_counter", lambda: next(clock))
    found = step_memory.estimated(e, rows)
    assert [one.memory_bytes_per_device == 999 for one in found].count(True) == count
    assert found[0] == rows[0]  # the smallest of four
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == count and all("of 3 steps traced" in one for one in lines)


def test_the_table_marks_what_is_only_parts(tiny):
    e = on(tiny)
    (row, *_) = plan.plan(e)
    big = dataclasses.replace(row, memory_bytes_per_device=3 * 2**30)
    marked = plan_table.table(e, [row, big]).splitlines()[2:4]
    assert ">0.0" in marked[0] and "3.00" in marked[1] and ">" not in marked[1]


def test_the_kernels_of_a_backend_hold_no_scores(tiny):
    """12 x 12 image tokens and five others, of two pictures on each device."""

    def largest(attention):
        c = tiny.copy_and_resolve_references()
        with c.unlocked():
            c.data.shape, c.model.head_dim = (48, 48, 3), 32
            c.plan.sizes = ((128, 2),)
            c.model.attention, c.model.compute_dtype = attention, "bfloat16"
            c.train.batch_size = 8
        found = held(config.resolve(c), accelerator="tpu-v5p", depth=2)
        return [shape for _, _, shape in found.largest]

    def scores(shapes):
        return [s for s in shapes if s[-2:] == (149, 149)]

    assert scores(largest("plain")) and not scores(largest("pallas"))
