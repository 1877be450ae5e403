"""Two hosts on one machine: network namespaces, joined by a cable that can be pulled.

It needs Linux, `ip`, and the right to make namespaces (root).
"""

import contextlib
import os
import shutil
import subprocess

from processes import MAIN

ADDRESSES = ("10.77.0.1", "10.77.0.2")
PORT = 7777  # free: nobody else is in these namespaces


def _run(*command):
    return subprocess.run(command, capture_output=True, text=True)


class TwoHosts:
    """Two namespaces.

    Args:
      folder: for their files of host names.
    """

    def __init__(self, folder):
        self._names = [f"scaling-{os.getpid()}-{i}" for i in range(2)]
        self.coordinator = f"{ADDRESSES[0]}:{PORT}"
        self.programs = []
        for i, (name, address) in enumerate(zip(self._names, ADDRESSES, strict=True)):
            hosts = folder / f"hosts{i}"
            hosts.write_text(f"127.0.0.1 localhost\n{address} {os.uname().nodename}\n")
            inside = (
                f"mount --bind {hosts} /etc/hosts && "
                f'exec nsenter --net=/run/netns/{name} "$@"'
            )
            own = ("unshare", "--mount", "bash", "-c", inside, "bash", *MAIN)
            self.programs.append(own)

    def make(self):
        """Makes the namespaces and the cable; returns why not, "" if it did."""
        if not all(map(shutil.which, ("ip", "nsenter", "unshare"))):
            return "ip, nsenter or unshare is missing"
        first, second = self._names
        commands = [["netns", "add", name] for name in self._names]
        peer = ["peer", "name", "cable", "netns", second]
        commands.append(["-n", first, "link", "add", "cable", "type", "veth", *peer])
        for name, address in zip(self._names, ADDRESSES, strict=True):
            commands.append(
                ["-n", name, "addr", "add", f"{address}/24", "dev", "cable"]
            )
            commands += [
                ["-n", name, "link", "set", link, "up"] for link in ("lo", "cable")
            ]
        for command in commands:
            done = _run("ip", *command)
            if done.returncode:
                return f"ip {' '.join(command)}: {done.stderr.strip()}"
        return ""

    def pull(self, number):
        """The cable of a host is pulled."""
        done = _run("ip", "-n", self._names[number], "link", "set", "cable", "down")
        assert done.returncode == 0, done.stderr

    def remove(self):
        """The namespaces, and with them the cable, are gone."""
        for name in self._names:
            _run("ip", "netns", "del", name)


@contextlib.contextmanager
def two_hosts(folder):
    """(the hosts, why they cannot be made: "" if they are there)."""
    hosts = TwoHosts(folder)
    try:
        yield hosts, hosts.make()
    finally:
        hosts.remove()
