"""What the compiler for TPUs makes of offloading, and of passes over a batch."""

import json
import os
import subprocess
import sys

import pytest
from processes import ROOT

COMPILED = """
import dataclasses, json, sys
import jax, jax.numpy as jnp
from scaling_ldm import config
from scaling_ldm.diffusion.losses import denoise
from scaling_ldm.flops.collectives import collectives
from scaling_ldm.models import denoisers
from scaling_ldm.models.denoisers import dit
from scaling_ldm.training import accumulation, mesh, objective, topologies

policy, microbatch = sys.argv[1], int(sys.argv[2])
network = denoisers.transformer(dit.DiTConfig(
    architecture="in_context", width=256, depth=3, heads=4, image_shape=(16, 16, 4),
    patch_size=2, text_tokens=4, text_width=64, time_width=64, vocab_size=0,
    dtype=jnp.bfloat16, remat=policy,
))
def of_rows(params, averages, aux, batch, uncond, step, drawn):
    cond = {name: batch[name] for name in ("text", "mask")}
    out = network.apply(params, batch["x"] + drawn["noise"], drawn["drop"], cond)
    return jnp.mean((out - batch["x"]) ** 2), aux, {}
learnt = objective.Objective(
    init=network.init, loss=objective.MeanLoss(denoise.draw, of_rows),
    per_example_loss=of_rows, conditioning=("text", "mask"), image_tokens=64,
    other_tokens=4, embeddings=(),
)
topology = topologies.describe("v5e:2x2")
device_mesh = mesh.build(config.MeshConfig(fsdp=4), {}, use=topology.devices)
with jax.set_mesh(device_mesh):
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0)))
    where = mesh.shardings(device_mesh, shapes)
    rows = mesh.named_sharding(device_mesh, mesh.BATCH)
    of = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    params = jax.tree.map(of, shapes, where)
    batch = {
        "x": jax.ShapeDtypeStruct((64, 16, 16, 4), jnp.float32, sharding=rows),
        "text": jax.ShapeDtypeStruct((64, 4, 64), jnp.float32, sharding=rows),
        "mask": jax.ShapeDtypeStruct((64, 4), jnp.bool_, sharding=rows),
    }
    key = of(jax.eval_shape(lambda: jax.random.key(0)),
             mesh.named_sharding(device_mesh, mesh.REPLICATED))
    gradient = accumulation.gradient(learnt, microbatch, lambda *_: None)
    step = lambda params, batch, key: gradient(params, {}, {}, batch, {}, 0, key)[1]
    compiled = jax.jit(step, out_shardings=where).trace(params, batch, key).lower(
        lowering_platforms=("tpu",)
    ).compile()
text, memory = compiled.as_text(), compiled.memory_analysis()
print(json.dumps({
    "host": text.count("S(5)"),
    "host_bytes": memory.host_temp_size_in_bytes,
    "bytes": memory.peak_memory_in_bytes,
    "collectives": {f"{o.kind} {o.dtype}": [o.count, o.nbytes]
                    for o in collectives(text)},
}))
"""


def compiled(policy, microbatch=0):
    pytest.importorskip("libtpu")  # the extra `tpu`
    done = subprocess.run(
        [sys.executable, "-c", COMPILED, policy, str(microbatch)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_offload_keeps_the_inputs_of_blocks_in_the_hosts_memory():
    found, before = compiled("offload"), compiled("blocks")
    assert before["host"] == before["host_bytes"] == 0
    assert found["host"] > 0
    rows, tokens, width, depth = 64 // 4, 64 + 4, 256, 3
    assert found["host_bytes"] >= depth * rows * tokens * width * 2  # bfloat16


@pytest.mark.slow
def test_each_pass_gathers_weights_and_scatters_gradients():
    whole, parts = compiled("blocks"), compiled("blocks", 16)
    before, after = whole["collectives"], parts["collectives"]
    assert before["reduce-scatter f32"][0] >= 3 * 4  # blocks, and their kernels
    # What stands around the blocks may be gathered and scattered once for all passes.
    assert after["reduce-scatter f32"][0] >= 4 * 3 * 4
    assert after["all-gather bf16"][0] > 3 * before["all-gather bf16"][0]
    assert set(after) <= set(before)  # no row moves
    assert parts["bytes"] < whole["bytes"]
