"""Checkpoints on s3://, which orbax 0.12 does not write by itself.

Tensorstore has a driver for s3://, and etils opens such paths with s3fs. Orbax asks at
two places alone whether a path is on gs://: where it chooses between renaming a
complete checkpoint and writing `commit_success.txt` into it, and where it describes the
place of arrays to tensorstore. Here both answer for s3:// as well.
"""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

from orbax.checkpoint._src.path import gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from scaling_ldm.records import backends
from scaling_ldm.records.objects import ObjectPath

_S3 = "s3://"


def enable_for(folder: pathlib.Path) -> None:
    """Lets orbax, in this process, write into this folder, if it is on s3://."""
    if isinstance(folder, ObjectPath) and folder.scheme == "s3":
        _enable()


@functools.cache
def _enable() -> None:
    """Lets orbax treat s3:// as it treats gs://."""
    endpoint = backends.endpoint_of_s3()
    google, local = gcs_utils.get_kvstore_for_gcs, tensorstore_utils._normalize_path

    def place(ckpt_path: str) -> dict[str, Any]:
        far = ckpt_path.startswith(_S3)
        return kvstore(ckpt_path, endpoint) if far else google(ckpt_path)

    def normal(path: str) -> str:
        if path.startswith(_S3):
            return _S3 + os.path.normpath(path.removeprefix(_S3))
        return local(path)

    stores = ("gs://", _S3)

    def is_far(directory: str) -> bool:
        return directory.startswith(stores)

    # is_gcs_path reads it; what is asked of Google alone looks at the scheme again.
    gcs_utils._GCS_PATH_PREFIX = stores  # pyrefly: ignore[bad-assignment]
    gcs_utils.get_kvstore_for_gcs = place
    tensorstore_utils._normalize_path = normal
    tensorstore_utils._use_gcs_driver = is_far


def kvstore(path: str, endpoint: backends.Endpoint) -> dict[str, Any]:
    """What tensorstore opens for s3://bucket/folder/: the store that s3fs asks."""
    bucket, _, name = path.removeprefix(_S3).partition("/")
    found: dict[str, Any] = {"driver": "s3", "bucket": bucket, "path": name}
    if endpoint.url:
        found |= {"endpoint": endpoint.url, "aws_region": endpoint.region}
    if "AWS_ACCESS_KEY_ID" in os.environ:  # else it complains of files that are missing
        found["aws_credentials"] = {"type": "environment"}
    return found
