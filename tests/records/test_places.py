"""Working directories: a URL is never taken for the name of a local folder."""

import os
import pathlib

import pytest

import scaling_ldm
from scaling_ldm import config, records, report, study
from scaling_ldm.records import places
from scaling_ldm.records.errors import ConfigError
from scaling_ldm.workdir import exit_status

UNSUPPORTED = ["hdfs://bucket/x", "az://bucket/x", "https://host/x", "S9://bucket/x"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("url", UNSUPPORTED)
def test_an_unknown_url_is_refused_in_one_line_and_nothing_is_written(
    here, capsys, url
):
    status = study.run(
        config.default(),
        workdir=url,
        stages=None,
        only=None,
        cluster=(None, None, None),
    )
    said = capsys.readouterr().err
    assert status == exit_status.EXIT["bad configuration"]
    assert said.startswith(f"error: {url}: ") and said.count("\n") == 1
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    "read",
    [report.write, records.read_table, records.read_evaluations, scaling_ldm.load],
)
def test_readers_refuse_an_unknown_url(here, read):
    with pytest.raises(ConfigError, match="hdfs://bucket/x: .* is not supported"):
        read("hdfs://bucket/x")
    assert os.listdir(here) == []


def test_a_url_that_pathlib_has_cut_is_refused(here):
    with pytest.raises(ConfigError, match="gs:/bucket/x: .* gs://bucket/x"):
        report.write(pathlib.Path("gs://bucket/x"))
    assert os.listdir(here) == []


def test_a_local_url_is_a_folder():
    assert places.local("file:///a/b", "--workdir") == pathlib.Path("/a/b")
    with pytest.raises(ConfigError, match="three slashes"):
        places.local("file://a/b", "--workdir")


@pytest.mark.parametrize("name", ["runs/x", "a:b/c", "/gs:/x/y", "x//y", "./gs:/b"])
def test_other_names_are_local(name):
    assert places.scheme(name) == ""
    assert places.local(name, "--workdir") == pathlib.Path(name)
