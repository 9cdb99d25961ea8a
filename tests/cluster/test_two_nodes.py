"""Two nodes as users start them: the same training as on one, restarts, a cut cable, and disks that are not shared."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from rdm_scale.config import to_yaml
from tests.support.launching import Starter, finish, torchrun, wait_for_step
from tests.support.limits import HANG_S
from tests.support.network_nodes import NetworkNodes
from tests.support.small_runs import metrics, run_config, write_latents

Nodes = Callable[[int], NetworkNodes]
STEPS = 6


@pytest.fixture
def config(tmp_path: Path) -> str:
    data = write_latents(tmp_path / "latents")
    path = tmp_path / "run.yaml"
    path.write_text(to_yaml(run_config(tmp_path, data, train__steps=STEPS, parallel__pipeline=2)))
    return str(path)


def two_nodes(
    network: NetworkNodes, start: Starter, *arguments: str, private: Path | None = None, restarts: int = 3
) -> list[subprocess.Popen]:
    """launch/torchrun.sh with two ranks on each of two nodes."""
    variables = {"NODES": "2", "PROCESSES": "2", "MASTER_ADDR": "node1", "RESTARTS": str(restarts)}
    commands = [network.command(node, "launch/torchrun.sh", *arguments, private=private) for node in (1, 2)]
    return [start(*command, NODE_RANK=str(number), **variables) for number, command in enumerate(commands)]


def test_two_nodes_train_what_one_does(nodes: Nodes, start: Starter, config: str, tmp_path: Path) -> None:
    """Also where each host's own name leads to 127.0.1.1, which its peers cannot reach."""
    ended = [finish(process) for process in two_nodes(nodes(2), start, config, f"run.dir={tmp_path}/two")]
    assert [code for code, _ in ended] == [0, 0], ended
    code, output = finish(start(*torchrun(4, config, f"run.dir={tmp_path}/one")))
    assert code == 0, output
    assert metrics(tmp_path / "two") == metrics(tmp_path / "one") and len(metrics(tmp_path / "one")) == STEPS


def test_bare_torchrun_restarts_on_two_nodes(nodes: Nodes, start: Starter, config: str, tmp_path: Path) -> None:
    network = nodes(2)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--max-restarts=2"]
    meeting = ["--rdzv-backend=c10d", "--rdzv-endpoint=node1:29400", "--rdzv-id=job"]
    run = ["-m", "rdm_scale.train", config, "train.steps=120", "checkpoint.every=10"]
    own = [["--local-addr=10.77.0.1", "--rdzv-conf=is_host=1"], ["--local-addr=10.77.0.2", "--rdzv-conf=is_host=0"]]
    processes = [start(*network.command(n, *launcher, *meeting, *own[n - 1], *run)) for n in (1, 2)]
    wait_for_step(tmp_path / "run", 25)
    network.rank_process(2, 1).kill()
    ended = [finish(process) for process in processes]
    assert [code for code, _ in ended] == [0, 0], ended
    assert [record["step"] for record in metrics(tmp_path / "run")] == list(range(1, 121))
    report = next(output for _, output in ended if "was lost" in output)
    assert "node2 (rank" in report and "; starting again from step " in report, report


def test_a_cut_cable_ends_the_ranks_of_both_nodes(nodes: Nodes, start: Starter, config: str, tmp_path: Path) -> None:
    """The connections stay open and silent: only limits of time end the ranks, which say what they lost.

    torchrun itself has no such limit on the node that is cut off from the rendezvous: only its ranks are awaited there.
    """
    network = nodes(2)
    arguments = ("train.steps=1000000", "parallel.timeout_s=20", "checkpoint.every=10")
    processes = two_nodes(network, start, config, *arguments, restarts=0)
    wait_for_step(tmp_path / "run", 15)
    network.cut(2)
    code, output = finish(processes[0])
    assert code == 1, output
    deadline = time.monotonic() + HANG_S
    while network.ranks(2):
        assert time.monotonic() < deadline, "ranks of node2 hang"
        time.sleep(0.2)
    os.killpg(processes[1].pid, signal.SIGKILL)
    # One side has kept the store for reports and misses the other; the other side knows only that it is alone.
    outputs = [output, finish(processes[1])[1]]
    kept, alone = outputs if "was lost in step" in outputs[0] else outputs[::-1]
    assert re.search(
        r"error: node[12] \(ranks? [-\d]+\) was lost in step \d+, during [a-z ]+; the same command ", kept
    ), kept
    assert re.search(r"error: node[12] \(rank \d\) has lost the connection to the other hosts in step \d+", alone), (
        alone
    )


def test_disks_that_are_not_shared_are_refused(nodes: Nodes, start: Starter, config: str, tmp_path: Path) -> None:
    """Before anything is trained; each node would save its part of every checkpoint on a disk of its own."""
    runs = tmp_path / "runs"
    arguments = (config, f"run.dir={runs}/one")
    ended = [finish(each) for each in two_nodes(nodes(2), start, *arguments, private=runs, restarts=0)]
    assert [code for code, _ in ended] == [2, 2], ended
    output = ended[0][1] + ended[1][1]
    message = (
        r"is not the same directory on all hosts: node. \(rank 0\) does not see what node. \(ranks 2-3\) wrote there"
    )
    assert output.count("error: ") == 1 and re.search(message, output), output
