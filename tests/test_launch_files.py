"""launch/: scripts that shellcheck accepts, manifests whose parts fit, help without a configuration."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.limits import HANG_S

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
NAME = "rdm-train"


def documents(name: str) -> dict[str, dict[str, Any]]:
    """Documents of a manifest by kind."""
    return {document["kind"]: document for document in yaml.safe_load_all((LAUNCH / name).read_text())}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck(script: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is missing: run `make cluster-tools`")
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_without_a_configuration(script: Path) -> None:
    done = subprocess.run([script], capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 2 and "launch/" in done.stdout and "#" not in done.stdout


@pytest.mark.parametrize("name", ["kubernetes.yaml", "jobset.yaml"])
def test_the_parts_of_a_manifest_fit(name: str) -> None:
    """The nodes that the pods wait for are as many as the Job makes, and their meeting point is a pod's host name."""
    found = documents(name)
    if name == "kubernetes.yaml":
        assert found["Service"]["spec"]["clusterIP"] == "None"
        assert found["Service"]["spec"]["selector"] == {"job-name": found["Job"]["metadata"]["name"]}
        job, subdomain, first = found["Job"]["spec"], found["Service"]["metadata"]["name"], f"{NAME}-0"
        assert job["template"]["spec"]["subdomain"] == subdomain
    else:
        replicated = found["JobSet"]["spec"]["replicatedJobs"][0]
        job, subdomain = replicated["template"]["spec"], found["JobSet"]["spec"]["network"]["subdomain"]
        first = f"{found['JobSet']['metadata']['name']}-{replicated['name']}-0-0"
    container = job["template"]["spec"]["containers"][0]
    variables = {entry["name"]: entry.get("value") for entry in container["env"]}
    assert int(variables["NODES"]) == job["completions"] == job["parallelism"]
    assert variables["MASTER_ADDR"] == f"{first}.{subdomain}"
    assert (LAUNCH.parent / container["command"][0]).exists() and (LAUNCH.parent / container["args"][0]).exists()
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in job["template"]["spec"]["volumes"]}
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in job["podFailurePolicy"]["rules"]]
    assert rules == [("FailJob", [2]), ("Ignore", [75]), ("Ignore", None)]
    if name == "jobset.yaml":  # without a rule it would start a Job that failed for good again
        policy = found["JobSet"]["spec"]["failurePolicy"]
        assert policy["rules"] == [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}]


def test_slurm_warns_the_ranks_and_requeues() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert re.search(r"^#SBATCH --signal=USR1@\d+$", text, re.MULTILINE)  # without B: to the ranks, not to the shell
    assert re.search(r"^#SBATCH --requeue$", text, re.MULTILINE)


class SlurmJob:
    """launch/slurm.sbatch with stand-ins for Slurm's commands: srun ends with a given code and leaves a status."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.requeued = folder, folder / "requeued"
        tools = folder / "tools"
        tools.mkdir()
        for name, text in {
            "srun": 'exit "$CODE"',
            "scontrol": 'echo "$@" >>requeued; exit "${REFUSED:-0}"',
            "sleep": "",
        }.items():
            (tools / name).write_text(f"#!/bin/bash\n{text}\n")
            (tools / name).chmod(0o755)
        path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
        self.variables = os.environ | {"PATH": path, "PYTHONPATH": str(LAUNCH.parent), "VENV": "none"}
        self.variables |= {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "RESTARTS": "1"}

    def attempt(self, code: int, checkpoint: int | None = None, **variables: str) -> tuple[int, int]:
        """Exit code of the script, and how often the job has been requeued by now."""
        (self.folder / "status.json").write_text(json.dumps({"checkpoint": checkpoint}))
        command = [LAUNCH / "slurm.sbatch", LAUNCH.parent / "configs/quickstart.yaml", f"run.dir={self.folder}"]
        environment = self.variables | {"CODE": str(code)} | variables
        done = subprocess.run(command, cwd=self.folder, env=environment, timeout=HANG_S, check=False)
        return done.returncode, len(self.requeued.read_text().splitlines()) if self.requeued.exists() else 0


def test_slurm_requeues_a_stopped_job_while_it_comes_further(tmp_path: Path) -> None:
    """Attempts that save something new are not counted; of the others RESTARTS are started again."""
    job = SlurmJob(tmp_path)
    for number, checkpoint in enumerate([5, 9, 12], 1):
        assert job.attempt(75, checkpoint) == (75, number)
    assert job.attempt(75, 12) == (75, 4)
    assert job.attempt(75, 13) == (75, 5)
    assert job.attempt(75, None) == (75, 5)


def test_slurm_ends_with_the_code_of_the_ranks_where_a_requeue_is_refused(tmp_path: Path) -> None:
    job = SlurmJob(tmp_path)
    assert job.attempt(1, 5, REFUSED="1") == (1, 1)
    assert job.attempt(75, 5, REFUSED="1") == (75, 2)
    assert job.attempt(0) == (0, 2) and not list(tmp_path.glob("slurm-7.*"))


def test_torchrun_waits_for_the_name_of_the_meeting_point(tmp_path: Path) -> None:
    """The name of a pod is known some time after its start. Code 2 would end the Job for good."""
    (tmp_path / "sleep").write_text(f"#!/bin/bash\necho waited >>{tmp_path}/waits\nexec /bin/sleep 0.2\n")
    (tmp_path / "sleep").chmod(0o755)
    variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PROCESSES": "1", "START_TIMEOUT": "1"}
    variables |= {"NODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "nowhere.invalid"}
    command, environment = [LAUNCH / "torchrun.sh", "configs/quickstart.yaml"], os.environ | variables
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False)
    assert done.returncode == 1 and (tmp_path / "waits").exists()
    assert re.fullmatch(r"error: the host nowhere\.invalid is unknown .*\n", done.stderr)


def test_ranks_may_take_as_long_to_stop_as_the_pod() -> None:
    """torchrun kills them a little before Kubernetes would kill the pod, so that the exit code is that of the ranks."""
    (grace,) = re.findall(r'--shutdown-timeout "\$\{GRACE:-(\d+)\}"', (LAUNCH / "torchrun.sh").read_text())
    for name in ("kubernetes.yaml", "jobset.yaml"):
        (pod,) = re.findall(r"terminationGracePeriodSeconds: (\d+)", (LAUNCH / name).read_text())
        assert 0 < int(pod) - int(grace) <= 30
