"""Jobs of several processes: what describes one, and who never comes."""

import socket
import threading

import jax
import pytest

from scaling_ldm import config
from scaling_ldm.training import jobs, native_stderr, progress

VARIABLES = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_JOB_ID",
    "SLURM_STEP_NODELIST",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "TPU_WORKER_HOSTNAMES",
    "MEGASCALE_COORDINATOR_ADDRESS",
)


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No variable of a job; this process keeps its handlers and standard error."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(jobs, "_on_abort", lambda _: None)
    monkeypatch.setattr(native_stderr, "hold_back", lambda: None)


def refused(*flags):
    with pytest.raises(config.ConfigError) as e:
        jobs.join(*flags, lost=lambda _: None)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_flags_of_a_job_belong_together():
    assert "belong together" in refused("127.0.0.1:1", None, 0)


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("host", 2, 0), "--coordinator=host: must be host:port"),
        (("host:x", 2, 0), "must be host:port"),
        (("host:1", 2, 2), "has the processes 0 to 1"),
        (("host:1", 2, -1), "has the processes 0 to 1"),
    ],
)
def test_flags_that_describe_no_job_are_refused(flags, text):
    assert text in refused(*flags)


@pytest.mark.parametrize("tasks", [None, "", "1"])
def test_a_process_alone_joins_nothing(monkeypatch, tasks):
    if tasks is not None:
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
    monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
    assert jobs.join(None, None, None, lost=pytest.fail) is None


@pytest.mark.parametrize(
    ("environment", "texts"),
    [
        ({"SLURM_STEP_NUM_TASKS": "x"}, ["'x' is not a number", "srun"]),
        (
            {"SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0"},
            ["SLURM_STEP_NODELIST, SLURM_NTASKS, SLURM_LOCALID are not set", "unset"],
        ),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ["unset TPU_WORKER_HOSTNAMES"]),
    ],
)
def test_a_part_of_an_environment_is_one_line(monkeypatch, environment, texts):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def initialize(*_, **__):
        raise ValueError("coordinator_address should be\ndefined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    said = refused(None, None, None)
    assert all(text in said for text in texts), said


def test_a_port_in_use_is_refused_before_jax_opens_it(monkeypatch):
    monkeypatch.setattr(jax.distributed, "initialize", pytest.fail)
    with socket.create_server(("", 0)) as server:
        where = f"127.0.0.1:{server.getsockname()[1]}"
        assert "cannot open this port" in refused(where, 2, 0)


def test_who_never_comes_is_told_before_jax_aborts(monkeypatch):
    lost, said, over = [], [], threading.Event()
    monkeypatch.setattr(jobs, "WAIT", 0.12)
    monkeypatch.setattr(progress, "say", said.append)

    def give_up(why):
        lost.append(why)
        over.set()

    def initialize(*_, initialization_timeout, **__):
        assert over.wait(5)
        raise RuntimeError("jax would not have ended by itself")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(config.ConfigError):
        jobs.join("host:1", 2, 1, lost=give_up)
    (why,) = lost
    assert "at host:1 were not all there" in why and "on every host" in why
    assert len(said) == 1 and said[0].startswith("waiting for the processes")


class Store:
    """jax's key-value store, for two processes in one."""

    def __init__(self):
        self.values, self.index = {}, 0

    def key_value_set(self, key, value):
        if key in self.values:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def key_value_try_get(self, key):
        if key not in self.values:
            raise RuntimeError("NOT_FOUND")
        return self.values[key]

    def key_value_dir_get(self, folder):
        return [item for item in self.values.items() if item[0].startswith(folder)]


def test_one_process_tells_and_the_other_hears(monkeypatch):
    store = Store()
    one, other = jobs.JaxJob(store), jobs.JaxJob(store)
    assert other.told() == ""
    one.tell("SIGTERM")
    other.tell("SIGINT")  # the first one counts
    assert other.told() == "SIGTERM to process 0"


@pytest.mark.parametrize("first", [0, 1])
def test_at_a_stop_each_waits_for_the_other_but_not_for_ever(monkeypatch, first):
    """Who goes first would be missed in a collective."""
    store, order = Store(), []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    index = threading.local()
    monkeypatch.setattr(jax, "process_index", lambda: index.value)

    def leave(number, before):
        index.value = number
        before()
        jobs.JaxJob(store).leave("SIGTERM")
        order.append(number)

    late = threading.Event()
    processes = [
        threading.Thread(target=leave, args=(first, lambda: None)),
        threading.Thread(target=leave, args=(1 - first, lambda: late.wait(5))),
    ]
    for process in processes:
        process.start()
    processes[0].join(0.2)
    assert order == []
    late.set()
    for process in processes:
        process.join(5)
    assert sorted(order) == [0, 1]

    monkeypatch.setattr(jobs, "LEAVE", 0.1)
    index.value = 0
    jobs.JaxJob(Store()).leave("SIGTERM")  # the other one never comes
