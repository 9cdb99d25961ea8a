"""Nodes of a cluster for tests: network namespaces with host names of their own, on a virtual switch.

Everything is inside of namespaces, so that tests neither meet the machine's own network nor each other. Needs root, and
what `make cluster-tools` installs.
"""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import psutil

from tests.support.limits import HANG_S

NETWORK = "10.77.0"
_SETUP = 'hostname "$1"; mount --bind "$2" /etc/hosts; [ -z "$3" ] || mount --bind "$3" "$4"; shift 4; exec "$@"'


def missing_tools(*tools: str) -> str:
    """Reason why nodes cannot be made here; empty if they can."""
    absent = [tool for tool in ("ip", "unshare", *tools) if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} missing: run `make cluster-tools`"
    probe = f"rdm{os.getpid()}probe"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False, timeout=HANG_S).returncode:
        return "network namespaces need root and a kernel that allows them"
    run("ip", "netns", "del", probe)
    return ""


def run(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


class NetworkNodes:
    """Hosts node1, node2, ... at 10.77.0.1, .2, ...; each resolves its own name to 127.0.1.1, as on Debian."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._name = f"rdm{os.getpid()}"
        self._switch = f"{self._name}s"
        run("ip", "netns", "add", self._switch)
        run("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", self._switch, "link", "set", "br0", "up")
        for node in range(1, count + 1):
            self._add(node)

    def _add(self, node: int) -> None:
        namespace = self._namespace(node)
        run("ip", "netns", "add", namespace)
        run("ip", "-n", self._switch, "link", "add", f"p{node}", "type", "veth", "peer", "eth0", "netns", namespace)
        run("ip", "-n", self._switch, "link", "set", f"p{node}", "master", "br0", "up")
        run("ip", "-n", namespace, "addr", "add", f"{NETWORK}.{node}/24", "dev", "eth0")
        run("ip", "-n", namespace, "link", "set", "eth0", "up")
        run("ip", "-n", namespace, "link", "set", "lo", "up")
        others = [f"{NETWORK}.{each} node{each}" for each in range(1, self.count + 1) if each != node]
        self._hosts(node).write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 node{node}", *others, ""]))

    def _namespace(self, node: int) -> str:
        return f"{self._name}n{node}"

    def _hosts(self, node: int) -> Path:
        return self.folder / f"hosts{node}"

    def command(self, node: int, *command: str, private: Path | None = None) -> list[str]:
        """`command` as a process of a node. What lies in `private` is on a disk of its own there."""
        disk = ""
        if private is not None:
            own = self.folder / f"disk{node}"
            own.mkdir(exist_ok=True)
            private.mkdir(exist_ok=True)
            disk = str(own)
        enter = ["ip", "netns", "exec", self._namespace(node), "unshare", "--uts", "--mount", "bash", "-ec", _SETUP]
        return [*enter, "_", f"node{node}", str(self._hosts(node)), disk, str(private or ""), *command]

    def cut(self, node: int) -> None:
        """Pull the plug of a node."""
        run("ip", "-n", self._switch, "link", "set", f"p{node}", "down")

    def processes(self, node: int) -> list[psutil.Process]:
        pids = run("ip", "netns", "pids", self._namespace(node)).split()
        return [psutil.Process(int(pid)) for pid in pids if psutil.pid_exists(int(pid))]

    def ranks(self, node: int) -> dict[str, psutil.Process]:
        """Ranks that run on a node, by local rank."""
        found = {}
        for process in self.processes(node):
            with contextlib.suppress(psutil.NoSuchProcess):
                local_rank = process.environ().get("LOCAL_RANK")
                if local_rank is not None and "rdm_scale.train" in process.cmdline():
                    found[local_rank] = process
        return found

    def rank_process(self, node: int, local_rank: int) -> psutil.Process:
        return self.ranks(node)[str(local_rank)]

    def remove(self) -> None:
        """End what still runs on the nodes, and remove them."""
        for node in range(1, self.count + 1):
            for process in self.processes(node):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            run("ip", "netns", "del", self._namespace(node))
        run("ip", "netns", "del", self._switch)
