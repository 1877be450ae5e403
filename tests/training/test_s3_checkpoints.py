"""What orbax and tensorstore are told of checkpoints on s3://."""

import pathlib
import types

import pytest
import tensorstore
from etils import epath
from orbax.checkpoint._src.path import atomicity, atomicity_defaults, gcs_utils
from orbax.checkpoint._src.serialization import tensorstore_utils

from scaling_ldm.records import backends
from scaling_ldm.records.objects import ObjectPath
from scaling_ldm.training import checkpoint, s3_checkpoints

PLACES = ("gs://bucket/a/b", "s3://bucket/a/b", "/a/b")


@pytest.fixture
def enabled(monkeypatch):
    """orbax as it is after `enable_for`, for this test alone."""
    for module, name in (
        (gcs_utils, "_GCS_PATH_PREFIX"),
        (gcs_utils, "get_kvstore_for_gcs"),
        (tensorstore_utils, "_normalize_path"),
        (tensorstore_utils, "_use_gcs_driver"),
    ):
        monkeypatch.setattr(module, name, getattr(module, name))
    here = backends.Endpoint("http://127.0.0.1:9", "eu-west-1")
    monkeypatch.setattr(backends, "endpoint_of_s3", lambda: here)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    s3_checkpoints._enable.__wrapped__()


def described():
    """What tensorstore opens for each of the places."""
    return [
        tensorstore_utils.build_kvstore_tspec(place, ocdbt_process_spec=None)["base"]
        for place in PLACES
    ]


def test_a_checkpoint_on_s3_is_complete_with_its_commit_file(enabled):
    chosen = [
        ask(epath.Path(place))
        for place in PLACES
        for ask in (
            atomicity_defaults.get_default_temporary_path_class,
            atomicity_defaults.get_item_default_temporary_path_class,
        )
    ]
    by_file, by_name = (
        atomicity.CommitFileTemporaryPath,
        atomicity.AtomicRenameTemporaryPath,
    )
    assert chosen == [by_file] * 4 + [by_name] * 2
    assert not gcs_utils.is_hierarchical_namespace_enabled("s3://bucket/a")


def test_arrays_on_s3_go_where_s3fs_goes(enabled):
    google, amazon, local = described()
    assert google == {"driver": "gcs", "bucket": "bucket", "path": "a/b"}
    assert amazon == {
        "driver": "s3",
        "bucket": "bucket",
        "path": "a/b",
        "endpoint": "http://127.0.0.1:9",
        "aws_region": "eu-west-1",
    }
    assert local["driver"] == "file" and local["path"] == "/a/b/"
    tensorstore.KvStore.Spec(amazon)


def test_aws_itself_is_left_to_tensorstore(monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    found = s3_checkpoints.kvstore("s3://bucket/a/", backends.Endpoint("", ""))
    assert found == {
        "driver": "s3",
        "bucket": "bucket",
        "path": "a/",
        "aws_credentials": {"type": "environment"},
    }
    tensorstore.KvStore.Spec(found)


def test_other_stores_and_folders_leave_orbax_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(s3_checkpoints, "_enable", pytest.fail)
    s3_checkpoints.enable_for(tmp_path)


class Failed(Exception):
    """As botocore says that a connection was cut."""

    __module__ = "botocore.exceptions"


@pytest.mark.parametrize(
    "url, expected", [("memory://b/x", OSError), ("/nowhere/x", Failed)]
)
def test_a_store_that_fails_while_the_last_write_ends_is_storage(url, expected):
    def close():
        raise Failed("the connection was closed")

    kept = object.__new__(checkpoint.Checkpoints)
    kept._directory = ObjectPath.of(url) if "://" in url else pathlib.Path(url)
    kept._manager = types.SimpleNamespace(close=close)
    with pytest.raises(expected, match="the connection was closed") as raised:
        kept.close()
    assert getattr(raised.value, "filename", url) == url
