"""The clients of object stores: how each is opened, and what it is asked on condition.

Every request goes through fsspec: gcsfs on gs://, s3fs on s3://. A store gives each
object that is written a version. On gs:// it is a number that counts up (its
generation). On s3:// it is the checksum of the content (its ETag), so two writes of the
same bytes have the same version. May import: fsspec, gcsfs and s3fs, when a store is
first used.
"""

from __future__ import annotations

import functools
import json
import logging
import os
from typing import Any, NamedTuple

from scaling_ldm.records.errors import ConfigError

# What pip installs for a scheme, if fsspec finds no backend.
PACKAGES = {
    "gs": "'scaling_ldm[gcs]'",
    "gcs": "'scaling_ldm[gcs]'",
    "s3": "'scaling_ldm[s3]'",
    "s3a": "'scaling_ldm[s3]'",
    "az": "adlfs",
    "abfs": "adlfs",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
    "hf": "huggingface_hub",
}
# Seconds to connect, and without a byte. gcsfs asks six times, about 35 s apart in all.
CONNECT, SILENT = 10.0, 60.0
# How often botocore asks s3://, 15 s apart in all at most, and how often s3fs asks it
# where a connection is cut.
ATTEMPTS, REPEATS = 5, 2


class Endpoint(NamedTuple):
    """Where requests to s3:// go. "": AWS, which finds the region by itself."""

    url: str
    region: str


def backend(scheme: str, url: str) -> Any:
    """The fsspec file system of a scheme.

    Raises:
      ConfigError: its package is not installed.
    """
    try:
        return _file_system(scheme)
    except ImportError as e:
        raise not_installed(url, e) from e


def not_installed(url: str, error: ImportError) -> ConfigError:
    """The refusal of a URL whose backend cannot be imported."""
    scheme = url.partition("://")[0].lower()
    package = PACKAGES.get(scheme, "its fsspec backend")
    return ConfigError(
        f"{url}: {scheme}:// needs {package} ({error}): pip install {package}"
    )


@functools.cache
def _file_system(scheme: str) -> Any:
    given = options(scheme)
    import fsspec
    import fsspec.config

    if given:  # so that what orbax opens is told the same
        for name in ("gs", "gcs") if scheme in ("gs", "gcs") else (scheme,):
            fsspec.config.conf.setdefault(name, {}).update(given)
    found = fsspec.filesystem(scheme, **given)
    if scheme == "s3":
        found.retries = REPEATS
    return found


def options(scheme: str) -> dict[str, Any]:
    """What fsspec is given for a scheme: limits of time, and no cache of listings.

    Raises:
      ImportError: the package of the scheme is not installed.
    """
    if scheme in ("gs", "gcs"):
        return _prepare_google()
    return _prepare_amazon() if scheme in ("s3", "s3a") else {}


def _prepare_google() -> dict[str, Any]:
    """Options for gcsfs; must run before it is imported."""
    # Orbax reaches gs:// through etils, which prefers TensorFlow where it is installed.
    os.environ.setdefault("EPATH_USE_TF", "false")
    if emulator := os.environ.get("STORAGE_EMULATOR_HOST"):
        # An emulator does not say of which kind a bucket is, and each question warns.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        os.environ.setdefault("TENSORSTORE_GCS_HTTP_URL", emulator)
    # It prints a traceback before it raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    import aiohttp  # pyrefly: ignore[missing-import]  # of the extra gcs
    import gcsfs  # noqa: F401  # pyrefly: ignore[missing-import]

    limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=SILENT)
    return {"use_listings_cache": False, "session_kwargs": {"timeout": limits}}


def _prepare_amazon() -> dict[str, Any]:
    """Options for s3fs."""
    os.environ.setdefault("EPATH_USE_TF", "false")  # as on gs://
    import s3fs  # noqa: F401  # pyrefly: ignore[missing-import]  # of the extra s3

    return {
        "use_listings_cache": False,
        "config_kwargs": {
            "connect_timeout": CONNECT,
            "read_timeout": SILENT,
            "retries": {"mode": "standard", "max_attempts": ATTEMPTS},
        },
    }


def endpoint_of_s3() -> Endpoint:
    """Where s3fs sends its requests, as the environment or AWS's files say.

    Raises:
      ConfigError: s3fs is not installed.
    """
    meta = backend("s3", "s3://").connect().meta
    host = meta.endpoint_url.partition("://")[2].partition("/")[0]
    if host.endswith((".amazonaws.com", ".amazonaws.com.cn")):
        return Endpoint("", "")
    region = meta.region_name
    return Endpoint(
        meta.endpoint_url, "us-east-1" if region == "aws-global" else region
    )


def version_of(info: dict[str, Any]) -> str | None:
    """The version of an object, of what fsspec knows of it; None: it has none."""
    return info.get("generation") or info.get("ETag")


def write_over(
    scheme: str, fs: Any, key: str, version: str, data: bytes, seconds: float
) -> None:
    """Writes an object if it still is this version; see `ObjectPath.write_over`."""
    bucket, _, name = key.partition("/")
    if scheme == "s3":
        fs.call_s3(
            "put_object",
            Bucket=bucket,
            Key=name,
            Body=data,
            IfMatch=version,
            timeout=seconds,
        )
        return
    mark = os.urandom(16).hex()
    head = (
        f"--{mark}\r\nContent-Type: application/json; charset=UTF-8\r\n\r\n"
        f"{json.dumps({'name': name})}\r\n--{mark}\r\n"
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    fs.call(
        "POST",
        f"{fs.base.replace('/storage/', '/upload/storage/')}b/{{}}/o",
        bucket,
        uploadType="multipart",
        ifGenerationMatch=version,
        headers={"Content-Type": f"multipart/related; boundary={mark}"},
        data=head.encode() + data + f"\r\n--{mark}--".encode(),
        timeout=seconds,
    )


def unlink_version(
    scheme: str, fs: Any, key: str, version: str, seconds: float
) -> None:
    """Removes an object if it still is this version."""
    bucket, _, name = key.partition("/")
    if scheme == "s3":
        given = {"Bucket": bucket, "Key": name, "IfMatch": version}
        fs.call_s3("delete_object", **given, timeout=seconds)
        return
    condition = {"ifGenerationMatch": version, "timeout": seconds}
    fs.call("DELETE", "b/{}/o/{}", bucket, name, **condition)
