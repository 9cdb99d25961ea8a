"""launch/: scripts that shellcheck accepts, manifests whose parts fit, help without a configuration."""

import re
import shutil
import subprocess
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
    rules = {rule["action"]: rule.get("onExitCodes", {}).get("values") for rule in job["podFailurePolicy"]["rules"]}
    assert rules["FailJob"] == [2]


def test_slurm_warns_the_ranks_and_requeues() -> None:
    text = (LAUNCH / "slurm.sbatch").read_text()
    assert re.search(r"^#SBATCH --signal=USR1@\d+$", text, re.MULTILINE)  # without B: to the ranks, not to the shell
    assert re.search(r"^#SBATCH --requeue$", text, re.MULTILINE)
