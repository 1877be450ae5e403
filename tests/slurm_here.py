"""A Slurm of one node on this machine, from a folder of its own; needs root.

Debian: apt-get install slurmctld slurmd slurm-client munge
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time

DAEMONS = ("munged", "slurmctld", "slurmd")
CONF = """\
ClusterName=here
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
PreemptMode=REQUEUE
PreemptType=preempt/partition_prio
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 State=UP PreemptMode=REQUEUE
PartitionName=high Nodes={host} PriorityTier=10 State=UP
"""


def why_not():
    """Why there can be no Slurm here; "": there can."""
    if os.geteuid():
        return "slurmd needs root"
    found = [shutil.which(name, path=_path()) for name in (*DAEMONS, "sbatch")]
    return "" if all(found) else "slurmctld, slurmd, slurm-client or munge is missing"


def _path():
    return f"{os.environ['PATH']}:/usr/sbin:/sbin"


def _free_ports(count):
    with contextlib.ExitStack() as open_ones:
        found = [open_ones.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in found]


@contextlib.contextmanager
def running():
    """Starts the daemons; gives the variables of a user's shell; ends them."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host = socket.gethostname().partition(".")[0]
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(folder=folder, host=host, ports=_free_ports(2)))
    shell = {"SLURM_CONF": str(conf), "PATH": _path()}
    munge = {"socket": "munge.socket", "key-file": "munge.key", "seed-file": "seed"}
    munge |= {"log-file": "munged.log", "pid-file": "munged.pid"}
    files = [f"--{option}={folder / name}" for option, name in munge.items()]
    commands = (
        ["munged", "--foreground", "--force", *files],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", host],
    )
    daemons = []
    try:
        for command in commands:
            with (folder / f"{command[0]}.out").open("w") as log:
                one = subprocess.Popen(
                    command, env=os.environ | shell, stdout=log, stderr=log
                )
            daemons.append(one)
            time.sleep(1)
        wait_for(lambda: "idle" in told(shell, "sinfo", "-h", "-o", "%T"), 60)
        yield shell
    finally:
        told(shell, "scancel", "--user=root")
        wait_for(lambda: not told(shell, "squeue", "-h"), 60)
        for daemon in reversed(daemons):
            daemon.terminate()
            daemon.wait(30)
        shutil.rmtree(folder, ignore_errors=True)


def told(shell, *command):
    """What a command of Slurm prints; "" if it fails."""
    done = subprocess.run(
        command, env=os.environ | shell, stdout=subprocess.PIPE, text=True
    )
    return "" if done.returncode else done.stdout.strip()


def wait_for(true, seconds):
    """Waits until a function returns something true, and returns that."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.5)
    return found
