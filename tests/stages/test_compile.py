"""The stage compile: programs for devices that are not here, and what would fit."""

import dataclasses
import os
import subprocess
import sys

import pytest
from damages import damages, said_about
from processes import ROOT

from scaling_ldm import config, records, study
from scaling_ldm.records.compiled import COMPILED
from scaling_ldm.stages import compile as compile_stage
from scaling_ldm.stages import plan
from scaling_ldm.training import accumulation, capacity, step_memory, topologies
from scaling_ldm.workdir import exit_status


def asked(tiny, **fields):
    c = tiny.copy_and_resolve_references()
    for name, value in fields.items():
        setattr(c.compile, name, value)
    return c


@pytest.mark.parametrize("name", ["", "v9:2x2", "v5p:2xtwo", "h100:0x8"])
def test_an_unknown_topology_is_refused_before_the_plan(tiny, name, tmp_path, capsys):
    status = study.run(
        asked(tiny, topology=name),
        workdir=str(tmp_path / "study"),
        stages=("plan", "compile"),
        only=None,
        cluster=(None, None, None),
    )
    said = capsys.readouterr()
    assert status == exit_status.EXIT["bad configuration"]
    assert "config.compile.topology" in said.err and "v5p:4x8x8" in said.err
    assert not (tmp_path / "study" / "runs.jsonl").exists()


@pytest.mark.parametrize(
    ("name", "package"), [("v5p:2x2x2", "libtpu"), ("h100:1x8", "jax-cuda13-plugin")]
)
def test_a_compiler_that_is_not_installed_is_named(monkeypatch, name, package):
    monkeypatch.setattr(topologies.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(config.ConfigError, match=package):
        topologies.describe(name)


def test_slices_of_gpus_are_refused():
    with pytest.raises(config.ConfigError, match="slices are of TPUs"):
        topologies.describe("h100:8x8", slices=4)


def test_programs_are_checked(tiny):
    with pytest.raises(config.ConfigError, match="train, loss"):
        config.resolve(asked(tiny, programs=("train", "los")))


def spec_of(state, activations, batch=64):
    known = {
        "study": "s",
        "run_id": "r",
        "state_bytes": state,
        "activation_bytes": activations,
        "batch_size": batch,
    }
    kinds = {"float": 0.0, "int": 0, "str": ""}
    fields = records.RunSpec.__dataclass_fields__.values()
    rest = {f.name: kinds[f.type] for f in fields if f.type in kinds}
    return records.RunSpec(**rest | known)


def test_what_fits_is_said_with_the_least_change_first(tiny):
    asked_for = []

    def ways(state, activations, remat=0.0, passes=True):
        spec = spec_of(state, activations)

        def held(experiment, devices, fsdp):
            asked_for.append((experiment.model.remat, devices, fsdp))
            kept = spec.activation_bytes * (remat if experiment.model.remat else 1)
            part = experiment.train.microbatch or spec.batch_size
            kept *= part / spec.batch_size if passes else 1
            return capacity.step_bytes(state, int(kept), devices, fsdp)

        return capacity.ways_to_fit(config.resolve(tiny), spec, 8, 150, held)

    # A copy of 800 bytes and activations of 80 in all, on 8 devices of 150 bytes.
    assert ways(800, 80)[0] == "mesh.fsdp = 8"
    assert asked_for[0] == (False, 8, 8)  # with less the state alone does not fit
    # Activations alone are too many: 1,600 on 8 devices.
    assert ways(800, 1600) == [
        "train.microbatch = 16 with mesh.fsdp = 8",  # 100 of state, a quarter of 200
        "model.remat = True with mesh.fsdp = 8",
        "16 devices with mesh.fsdp = 16",
    ]
    assert ways(800, 1600, remat=0.9, passes=False) == [
        "16 devices with mesh.fsdp = 16"
    ]
    asked_for.clear()
    assert ways(8 * 10**9, 0) == [] and asked_for == []


def test_passes_are_proposed_where_the_sum_of_gradients_fits_too(tiny):
    """On one device: state, its share of activations, 4 bytes of each parameter."""
    spec = dataclasses.replace(spec_of(800, 1600), params=10)

    def proposed(there, **train):
        c = tiny.copy_and_resolve_references()
        c.train.batch_size = 64
        c.train.update(train)
        now = accumulation.passes(config.resolve(c).train)

        def held(experiment, devices, fsdp):
            passes = accumulation.passes(experiment.train)
            state = spec.state_bytes // fsdp
            if passes > 1 and now == 1:  # a sum of gradients beside those of a pass
                state += 4 * spec.params // fsdp
            return state + spec.activation_bytes * now // passes // devices

        ways = capacity.ways_to_fit(config.resolve(c), spec, 1, there, held)
        return [way for way in ways if "microbatch" in way]

    assert proposed(800 + 40 + 800) == ["train.microbatch = 32"]
    assert proposed(800 + 40 + 799) == ["train.microbatch = 16"]
    assert proposed(800 + 40 + 24) == []  # a row has 25
    # Passes that the plan knows already have their sum in the state.
    assert proposed(800 + 800, microbatch=32) == ["train.microbatch = 16"]
    assert proposed(800 + 800, microbatch=2) == ["train.microbatch = 1"]


def of_architecture(tiny, architecture, **train):
    e = config.resolve(tiny)
    model = dataclasses.replace(e.model, architecture=architecture, remat=True)
    return dataclasses.replace(
        e, model=model, train=dataclasses.replace(e.train, **train)
    )


@pytest.mark.parametrize("architecture", ["in_context", "unet"])
@pytest.mark.parametrize("there", range(10, 420, 25))
def test_of_settings_that_hold_less_and_less_the_first_is_found(
    architecture, there, tiny
):
    """Every setting is compared with a search that asks for all of them."""
    spec, asked_for = spec_of(2000, 12_800, batch=1024), []
    e = of_architecture(tiny, architecture, batch_size=1024)

    def held(experiment, devices, fsdp):
        asked_for.append((experiment.train.microbatch, devices, fsdp))
        kept = spec.activation_bytes // accumulation.passes(experiment.train)
        return capacity.step_bytes(spec.state_bytes, kept, devices, fsdp)

    ways = capacity.ways_to_fit(e, spec, 64, there, held)
    shards = (1, 2, 4, 8, 16, 32, 64)
    expected = [f"mesh.fsdp = {n}" for n in shards[1:] if 2000 // n + 200 <= there][:1]
    expected += [
        f"train.microbatch = {part}" + (f" with mesh.fsdp = {n}" if n > 1 else "")
        for part in (512, 256, 128, 64)
        for n in shards
        if 2000 // n + 12_800 // (1024 // part) // 64 <= there
    ][:1]
    expected += [
        f"{64 * n} devices with mesh.fsdp = {64 * n}"
        for n in (2, 4, 8, 16)  # 1,024 pictures are not for 2,048 devices
        if 2000 // (64 * n) + 200 // n <= there
    ][:1]
    assert ways == expected
    assert 0 < len(set(asked_for)) <= 13  # each is a trace of seconds


def test_autoencoders_are_not_traced_for_what_fits(tiny):
    def held(*_):
        raise AssertionError

    e = of_architecture(tiny, "autoencoder_kl", batch_size=64)
    ways = capacity.ways_to_fit(e, spec_of(800, 80), 8, 150, held)
    assert ways[0] == "mesh.fsdp = 8"


@pytest.mark.slow
def test_what_fits_of_a_u_net_is_by_its_traced_step():
    c = config.load("experiments/unet_family.py")
    c.plan.sizes, c.data.shape = ((64, 4),), (32, 32, 4)
    c.train.batch_size = c.validation.batch_size = 64
    c.plan.devices, c.mesh.fsdp = 4, 1
    e = config.resolve(c)
    (spec,) = plan.plan(e)

    def held(changed, devices, fsdp):
        found = step_memory.step_memory(changed, 64, 4, devices, fsdp, "tpu-v5e")
        return found.total

    there = held(e, 4, 4)
    assert there < held(e, 4, 2) < held(e, 4, 1)
    ways = capacity.ways_to_fit(e, spec, 4, there, held)
    assert ways[0] == "mesh.fsdp = 4" and ways[-1] == "8 devices with mesh.fsdp = 8"


def row(**fields):
    known = {
        "run_id": "r",
        "study": "s",
        "program": "train",
        "topology": "v5p:2x2x2",
        "accelerator": "tpu-v5p",
        "devices": 8,
        "fsdp": 1,
        "remat": "none",
        "device_bytes": 95 * 2**30,
        "planned_bytes": 2**30,
        "seconds": 1.0,
        "peak_bytes": 2 * 2**30,
        "collectives": (
            records.Collective(kind="all-gather", dtype="bf16", count=3, nbytes=2**20),
        ),
    }
    return records.CompiledProgram(**known | fields)


def test_a_line_compares_with_the_plan_and_names_collectives():
    first, second = compile_stage.lines(row())
    assert "2 GiB at most" in first and "planned 1 GiB, 0.50 of it" in first
    assert second.strip() == "all-gather of bf16: 1 MiB in 3 arrays"
    (said,) = compile_stage.lines(row(refusal="too large", peak_bytes=0))
    assert "refuses it: too large" in said


def test_the_file_holds_the_last_of_each_program(tmp_path):
    path = tmp_path / COMPILED
    compile_stage._keep(path, row())
    compile_stage._keep(path, row(program="loss"))
    compile_stage._keep(path, row(fsdp=8))
    compile_stage._keep(path, row(seconds=2.0))
    found = records.read_jsonl(path, records.CompiledProgram)
    assert [(one.program, one.fsdp, one.seconds) for one in found] == [
        ("loss", 1, 1.0),
        ("train", 8, 1.0),
        ("train", 1, 2.0),
    ]
    assert found[1].collectives[0].nbytes == 2**20


def compiled(tmp_path, topology, *more):
    command = [
        *(sys.executable, "-m", "scaling_ldm.main", "--workdir", str(tmp_path)),
        *("--config", "experiments/dit_1e21.py", "--stages", "plan,compile"),
        "--config.plan.sizes=((512, 4),)",
        f"--config.compile.topology={topology}",
        *more,
    ]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )


@damages
def test_a_damaged_file_is_named_before_anything_is_compiled(damage, tiny, tmp_path):
    path = tmp_path / COMPILED
    records.write_jsonl(path, [row()])
    path.write_bytes(damage(path.read_bytes()))
    if not path.read_bytes():
        return  # as before the first call
    # The experiment has no topology, which would be refused next.
    given = config.resolve(tiny)
    assert said_about(path, lambda: compile_stage.run(given, tmp_path, ()))


@pytest.mark.slow
def test_a_pod_gathers_weights_by_block_and_scatters_their_gradients(tmp_path):
    pytest.importorskip("libtpu")  # the extra `tpu`
    done = compiled(
        tmp_path, "v5p:4x4x4", "--config.mesh.fsdp=8", "--config.plan.devices=64"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = records.read_jsonl(tmp_path / COMPILED, records.CompiledProgram)
    assert [one.program for one in found] == ["train", "loss", "sample"]
    depth, kernels = 4, 4  # q k v, out, up, down
    train = {(one.kind, one.dtype): one for one in found[0].collectives}
    # Each block's kernels twice; six tables and kernels of the ends once.
    assert train["all-gather", "bf16"].count == 2 * depth * kernels + 6
    assert train["reduce-scatter", "f32"].count == depth * kernels + 4
    # What is left to add up on every device is small: parts, vectors, and numbers.
    block = 12 * 512 * 512 * 4
    assert train["all-reduce", "f32"].nbytes < depth * block / 4
    others = {kind for kind, _ in train} - {"all-gather", "reduce-scatter"}
    assert others == {"all-reduce"}
    loss = {(one.kind, one.dtype) for one in found[1].collectives}
    assert ("all-gather", "bf16") in loss
    assert not any(kind == "reduce-scatter" for kind, _ in loss)
    for one in found:
        assert 0 < one.peak_bytes < one.device_bytes
        assert one.devices == 64 and one.fsdp == 8


@pytest.mark.slow
def test_a_network_that_is_too_large_is_refused_with_what_fits(tmp_path):
    pytest.importorskip("libtpu")
    done = compiled(
        tmp_path,
        "v5e:2x2",
        "--config.plan.sizes=((2048, 24),)",
        "--config.mesh.fsdp=1",
        "--config.plan.devices=4",
        '--config.compile.programs=("train",)',
    )
    assert done.returncode == exit_status.EXIT["bad configuration"], done.stderr[-2000:]
    assert "does not fit on v5e:2x2" in done.stderr
    assert "mesh.fsdp" in done.stderr.split("this may fit:")[1]
    assert "Traceback" not in done.stderr


# The text of the step, for two images of 24 x 24 tokens: as the stage compiles it.
STEP_FOR_A_TOPOLOGY = """
import sys
import jax
from scaling_ldm import config
from scaling_ldm.training import ahead_of_time, mesh, topologies
from scaling_ldm.records import RunSpec
topology = topologies.describe(sys.argv[1])
c = config.load("experiments/tiny.py")
c.data.shape = (48, 48, 4)
c.model.compute_dtype = "bfloat16"
c.model.attention = sys.argv[2]
c.model.head_dim = 40
c.model.remat = sys.argv[3] == "remat"
c.plan.sizes = ((80, 2),)
c.train.batch_size = c.validation.batch_size = 4
experiment = config.resolve(c)
kinds = {"float": 0.0, "int": 0, "str": ""}
fields = RunSpec.__dataclass_fields__.values()
given = {f.name: kinds[f.type] for f in fields if f.type in kinds}
given |= {"width": 80, "depth": 2, "batch_size": 4, "steps": 10}
spec = RunSpec(**given)
devices = mesh.build(experiment.mesh, {}, use=topology.devices[: int(sys.argv[4])])
with jax.set_mesh(devices):
    function, arguments = ahead_of_time._train(experiment, spec, devices)
    lowered = function.trace(*arguments).lower(lowering_platforms=(topology.platform,))
    options = ahead_of_time._NO_TIMING if topology.platform == "cuda" else None
    print(lowered.compile(compiler_options=options).as_text())
"""


def step_for(topology, attention, remat="no", devices=4):
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            STEP_FOR_A_TOPOLOGY,
            topology,
            attention,
            remat,
            f"{devices}",
        ],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["no", "remat"])
@pytest.mark.parametrize(
    ("topology", "devices"), [("v5e:2x2", 4), ("v5p:2x2x1", 4), ("v5e:2x2", 1)]
)
def test_a_step_for_tpus_has_the_kernel(topology, devices, remat):
    pytest.importorskip("libtpu")
    text = step_for(topology, "auto", remat, devices)
    assert 'custom_call_target="tpu_custom_call"' in text


@pytest.mark.slow
def test_a_plain_step_for_tpus_has_no_kernel():
    pytest.importorskip("libtpu")
    assert "tpu_custom_call" not in step_for("v5e:2x2", "plain")


@pytest.mark.slow
def test_a_step_for_gpus_has_the_attention_of_cudnn():
    versions = pytest.importorskip("jax_cuda13_plugin._versions")
    try:
        versions.cudnn_get_version()
    except RuntimeError:
        pytest.skip("cuDNN is not installed")
    text = step_for("h100:1x4", "auto")
    assert "__cudnn$fmhaSoftmaxBackward" in text


def test_an_attention_that_the_topology_cannot_run_is_refused(tiny, monkeypatch):
    c = asked(tiny, topology="v5e:2x2")
    c.model.attention = "cudnn"
    there = topologies.Topology(
        name="v5e:2x2", platform="tpu", accelerator="tpu-v5e", devices=()
    )
    monkeypatch.setattr(topologies, "describe", lambda *_: there)
    with pytest.raises(config.ConfigError, match="'cudnn' runs on gpu, not on tpu"):
        compile_stage.check(config.resolve(c))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "package", "more"),
    [
        ("h100:1x2", "jax_cuda13_plugin", ("--config.model.attention=plain",)),
        (
            "h100:1x2",
            "jax_cuda13_plugin",
            # Scores of 1,101 tokens are most of what a step holds.
            (
                "--config.model.attention=plain",
                "--config.model.architecture=mmdit",
                "--config.model.head_dim=64",
                "--config.data.shape=(64, 64, 3)",
            ),
        ),
    ],
    ids=["in_context", "scores"],
)
def test_the_estimate_is_near_to_the_compilers_peak(tmp_path, topology, package, more):
    pytest.importorskip(package)
    done = compiled(
        tmp_path,
        topology,
        "--config.plan.sizes=((768, 8),)",
        '--config.compile.programs=("train",)',
        "--config.mesh.fsdp=2",
        "--config.plan.devices=2",
        f"--config.train.batch_size={32 if len(more) > 1 else 64}",
        "--config.mesh.overlap_collectives=False",
        "--config.validation.batch_size=64",
        *more,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (found,) = records.read_jsonl(tmp_path / COMPILED, records.CompiledProgram)
    assert 0.85 < found.planned_bytes / found.peak_bytes < 1.15
