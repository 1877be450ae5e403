"""Every test runs on four simulated CPU devices; ranks are never promoted.

Most of the time of the tests is compilation. So programs are compiled without
optimisations, and once for all tests, workers and processes of a session: they share a
folder of compiled programs, JAX_COMPILATION_CACHE_DIR. It is removed at the end, unless
the caller has set that variable. XLA's fusion emitters for CPUs are off, too: with them
a program for many devices takes twice as long to compile. Without them such a program
has more steps that wait for other devices, and XLA needs more threads than there are
cores, or all of its threads wait: PJRT_NPROC.

Workers and processes share Python's compiled modules in the same way, where the caller
lets Python write none beside the sources. Otherwise each process compiles the library.
"""

import atexit
import functools
import gc
import os
import shutil
import sys
import tempfile


def _session_folder(variable):
    """A folder that workers and processes inherit; it is removed at the end."""
    folder = os.environ[variable] = tempfile.mkdtemp(prefix="compiled-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1",
)
os.environ.setdefault("PJRT_NPROC", "32")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _session_folder("JAX_COMPILATION_CACHE_DIR")
# Writing a program down takes longer than compiling most of them.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

if sys.dont_write_bytecode:
    sys.pycache_prefix = _session_folder("PYTHONPYCACHEPREFIX")
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import annotations  # noqa: E402

annotations.install(annotations.CHECKED)

import jax  # noqa: E402
import pytest  # noqa: E402

# Tracing makes many objects and few cycles. At Python's own threshold, the collector
# takes a twelfth of the time of the tests.
gc.set_threshold(200_000, 20, 100)

jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", autouse=True)
def _collect_less():
    """What a file leaves behind is not looked at again by the garbage collector.

    A worker holds millions of objects of compiled programs by the end of a run.
    """
    yield
    gc.freeze()


# Files that take longest come first, so that no worker begins one when others are done.
LONGEST = (
    "test_evaluate",
    "test_multiprocess",
    "test_faults",
    "test_train",
    "test_main",
    "test_notebooks",
    "test_denoisers_contract",
    "test_autoencoder_training",
)


def pytest_collection_modifyitems(config, items):
    """Puts the longest first; studies of ten minutes are run if -m names them."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)
    if "study" not in config.option.markexpr:
        items[:] = [item for item in items if not item.get_closest_marker("study")]


@pytest.fixture
def unchecked():
    """Annotations are not checked; for tests that give what these would refuse."""
    with annotations.unchecked():
        yield


@pytest.fixture(scope="module")
def one_device():
    """Programs of the file are for one of the four devices: they compile faster."""
    from scaling_ldm.training import mesh

    build = functools.partial(mesh.build, use=jax.devices()[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "build", build)
        yield


@pytest.fixture(scope="session")
def tiny():
    """An Experiment small enough to compile in a second or two."""
    from scaling_ldm import config

    c = config.default()
    c.name = "tiny"
    c.data.shape = (8, 8, 3)
    c.data.text_tokens = 4
    c.data.vocab_size = 256
    c.model.patch_size = 4
    c.model.head_dim = 8
    c.model.text_width = c.model.time_width = 8
    c.model.compute_dtype = "float32"
    c.optimizer.averages = ("ema",)  # the tests name it
    c.optimizer.learning_rate = 1e-2
    c.plan.budgets_flops = (3e8,)
    c.plan.sizes = ((16, 2),)
    c.plan.sizes_per_budget = 1
    c.plan.minimum_steps = 10
    c.plan.flops_per_second_per_device = 1e9
    c.train.batch_size = 8
    c.train.checkpoints_per_run = 2
    c.train.log_every_steps = 5
    c.validation.samples = c.validation.batch_size = 16
    c.lock()
    return c


@pytest.fixture(scope="session")
def evaluated():
    """evaluated(field=...): an EvalRecord of a run, with an interval around its value.

    Of a protocol that is given, its digest is the hash.
    """
    from scaling_ldm import records

    def make(**given):
        if "protocol" in given and "protocol_hash" not in given:
            given["protocol_hash"] = records.digest(given["protocol"])
        fields = {
            "run_id": "a",
            "checksum": "",
            "step": 1,
            "train_flops": 1.0,
            "metric": "fd_lite0",
            "value": 0.5,
            "low": 0.0,
            "high": 1.0,
            "level": 0.9,
            "doubt": "",
            "images": 4,
            "nfe": 2,
            "flops": 1.0,
            "protocol": {},
            "protocol_hash": "0123456789abcdef",
        }
        return records.Evaluation(**fields | given)

    return make


@pytest.fixture(scope="session")
def write_clip():
    """write_clip(folder, seed): a random CLIP and its tokenizer, as published."""
    import json

    import numpy as np

    from scaling_ldm.models.encoders import clip, clip_features
    from scaling_ldm.models.weights import clip as weights
    from scaling_ldm.models.weights import layout

    special = ("<|startoftext|>", "<|endoftext|>")
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,"
    merges = ["r e", "re d</w>"]
    vocabulary = [*letters, *(f"{c}</w>" for c in letters), "re", "red</w>", *special]
    tower = {"width": 64, "depth": 2, "heads": 2, "hidden": 64, "projection": 16}
    image = clip.ClipVisionConfig(**tower, image_size=16, patch_size=8)
    text = clip.ClipTextConfig(
        **tower,
        vocab_size=len(vocabulary),
        max_tokens=24,
        end_token=len(vocabulary) - 1,
    )

    def write(folder, seed):
        """As transformers saves a CLIPModel and its tokenizer."""
        folder.mkdir()
        tensors = {}
        for init, tower in ((clip.init, text), (clip_features.init, image)):
            shapes = jax.eval_shape(lambda i=init, s=tower: i(s, jax.random.key(0)))
            rng = np.random.default_rng(seed)
            params = jax.tree.map(
                lambda s, rng=rng: rng.normal(scale=0.15, size=s.shape).astype("f"),
                shapes,
            )
            tensors |= weights.tensors(params, tower)
        layout.save(tensors, folder / "model.safetensors")
        common = {
            "hidden_size": text.width,
            "num_hidden_layers": text.depth,
            "num_attention_heads": text.heads,
            "intermediate_size": text.hidden,
        }
        words = {
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.max_tokens,
            "eos_token_id": text.end_token,
        }
        sides = {"image_size": image.image_size, "patch_size": image.patch_size}
        stated = {
            "model_type": "clip",
            "projection_dim": text.projection,
            "text_config": common | words,
            "vision_config": common | sides,
        }
        ids = {word: i for i, word in enumerate(vocabulary)}
        settings = {"tokenizer_class": "CLIPTokenizer"}
        for name, value in (
            ("config.json", stated),
            ("vocab.json", ids),
            ("tokenizer_config.json", settings),
        ):
            (folder / name).write_text(json.dumps(value))
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
        return folder

    return write
