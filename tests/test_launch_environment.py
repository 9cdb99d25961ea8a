"""Ranks from the environment of srun, with the variables that Slurm 22.05 sets."""

import pytest

from rdm_scale.launch_environment import adopt_slurm_task, first_host

TASK = {
    "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "5", "SLURM_PROCID": "4", "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2", "SLURM_STEP_NODELIST": "gpu[07-09]", "SLURM_STEP_TASKS_PER_NODE": "1,2(x2)",
}  # fmt: skip


def test_a_task_of_srun_is_a_rank() -> None:
    environment = dict(TASK)
    adopt_slurm_task(environment)
    expected = {"RANK": "4", "WORLD_SIZE": "5", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "gpu07"}
    assert {name: environment[name] for name in expected} == expected
    other = TASK | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
    adopt_slurm_task(other)
    assert other["MASTER_PORT"] == environment["MASTER_PORT"] and other["LOCAL_WORLD_SIZE"] == "1"


@pytest.mark.parametrize(
    "given",
    [
        {"RANK": "1", "WORLD_SIZE": "2"},  # torchrun inside of a task of srun
        {"SLURM_NTASKS": "1"},  # a single task
    ],
)
def test_a_launcher_wins_and_one_task_is_no_world(given: dict[str, str]) -> None:
    environment = TASK | given
    adopt_slurm_task(environment)
    assert environment == TASK | given


def test_the_batch_script_itself_is_no_task() -> None:
    environment = {"SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "node1"}
    adopt_slurm_task(environment)
    assert "RANK" not in environment


def test_a_given_meeting_point_wins() -> None:
    environment = TASK | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"}
    adopt_slurm_task(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("head", "1234")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("node1", "node1"), ("a,b", "a"), ("gpu[07-09,12],login1", "gpu07"), ("r[1-2]n[3,5]", "r1n3"), ("n[4]x", "n4x")],
)
def test_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first
