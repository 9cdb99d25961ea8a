"""launch/slurm.sbatch on a real Slurm: a job that is warned saves, is requeued and goes on to its end."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rdm_scale.config import to_yaml
from rdm_scale.run_status import read_status
from tests.support.launching import wait_for_step
from tests.support.network_nodes import NetworkNodes, missing_tools
from tests.support.slurm_cluster import TOOLS, SlurmCluster
from tests.support.small_runs import metrics, run_config, write_latents


def test_a_warned_job_saves_and_is_requeued(nodes: Callable[[int], NetworkNodes], tmp_path: Path) -> None:
    reason = missing_tools(*TOOLS)
    if reason:
        pytest.skip(f"Slurm: {reason}")
    data = write_latents(tmp_path / "latents")
    config = tmp_path / "run.yaml"
    config.write_text(to_yaml(run_config(tmp_path, data, parallel__pipeline=2)))
    cluster = SlurmCluster(nodes(3))
    output = tmp_path / "job.out"
    try:
        size = ["--nodes=2", "--ntasks-per-node=2", "--time=30", f"--output={output}"]
        job = cluster.call(
            "sbatch", "--parsable", *size, "launch/slurm.sbatch", str(config), "train.steps=1000000"
        ).strip()
        wait_for_step(tmp_path / "run", 5)
        cluster.call("scancel", "--signal=USR1", job)  # as Slurm does before the time limit
        cluster.wait_for(job, "PENDING", "COMPLETING")
        stopped = len(metrics(tmp_path / "run"))
        assert f"stopped on request after step {stopped}" in output.read_text()
        assert read_status(tmp_path / "run")["state"] == "stopped"
        state = cluster.wait_for(job, "RUNNING", "COMPLETED", "FAILED")
        assert int(state["Restarts"]) == 1
        wait_for_step(tmp_path / "run", stopped + 5)
        cluster.call("scancel", job)
        cluster.wait_for(job, "CANCELLED", "FAILED", "COMPLETED")
        steps = [record["step"] for record in metrics(tmp_path / "run")]
        assert steps == list(range(1, len(steps) + 1)) and len(steps) >= stopped + 5
    finally:
        cluster.end()
