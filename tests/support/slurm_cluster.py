"""A real Slurm on the nodes of a test: munged, slurmctld on the first node, a slurmd on each of the others."""

import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.limits import HANG_S
from tests.support.network_nodes import NETWORK, NetworkNodes, run

TOOLS = ("slurmctld", "slurmd", "munged", "mungekey", "sbatch")
# The least that runs jobs: no cgroups, no accounting, everything as root.
CONFIG = """
ClusterName=test
SlurmctldHost=node1({network}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerParameters=sched_interval=1,batch_sched_delay=0
MinJobAge=3600
KillWait=60
SlurmdTimeout=600
SlurmctldTimeout=600
JobRequeue=1
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=60 State=UP
"""
NODE = "NodeName=node{n} NodeAddr={network}.{n} CPUs=2 Boards=1 SocketsPerBoard=1 CoresPerSocket=2 RealMemory=4000"


class SlurmCluster:
    """Slurm with a head, node1, and computing nodes of 2 CPUs each, node2 and on.

    Its files are in a temporary folder of their own: slurmstepd's sockets are among them, and the path of a socket has
    at most 108 characters, which the folders of tests exceed.
    """

    def __init__(self, network: NetworkNodes) -> None:
        self._temporary = tempfile.TemporaryDirectory(prefix="slurm-", ignore_cleanup_errors=True)
        self.network, self.folder = network, Path(self._temporary.name)
        folder = self.folder
        for name in ("state", "spool"):
            (folder / name).mkdir(parents=True)
        nodes = "\n".join(NODE.format(n=n, network=NETWORK) for n in range(2, network.count + 1))
        (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, network=NETWORK, nodes=nodes))
        (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # unused, but slurmd wants to know
        self.environment = os.environ | {"SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []
        run("mungekey", "--create", "--keyfile", folder / "munge.key")
        places = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log"}
        options = [f"--{name}={folder / place}" for name, place in places.items()]
        self._daemon("munged", "--foreground", "--force", f"--seed-file={folder}/munge.seed", *options)
        self._daemon(*network.command(1, "slurmctld", "-D"))
        for node in range(2, network.count + 1):
            (folder / "spool" / f"node{node}").mkdir()
            self._daemon(*network.command(node, "slurmd", "-D", "-N", f"node{node}"))
        self._until(lambda: set(self.call("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"})

    def _daemon(self, *command: str) -> None:
        log = (self.folder / "daemons.log").open("ab")
        self._daemons.append(subprocess.Popen(command, env=self.environment, stdout=log, stderr=log))

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + HANG_S
        while not condition():
            assert time.monotonic() < deadline, (self.folder / "daemons.log").read_text()[-3000:]
            time.sleep(0.2)

    def call(self, *command: str) -> str:
        """Output of a command of Slurm on the head node; empty if it fails."""
        inside = self.network.command(1, *command)
        done = subprocess.run(inside, env=self.environment, capture_output=True, text=True, timeout=HANG_S, check=False)
        return done.stdout if done.returncode == 0 else ""

    def state(self, job: str) -> dict[str, str]:
        """Fields of a job, as `scontrol show job` names them."""
        fields = self.call("scontrol", "-o", "show", "job", job).split()
        return dict(field.split("=", 1) for field in fields if "=" in field)

    def wait_for(self, job: str, *states: str) -> dict[str, str]:
        """Fields of a job that has come to one of `states`."""
        self._until(lambda: self.state(job).get("JobState") in states)
        return self.state(job)

    def end(self) -> None:
        for daemon in reversed(self._daemons):
            daemon.kill()
            daemon.wait()
        self._temporary.cleanup()
