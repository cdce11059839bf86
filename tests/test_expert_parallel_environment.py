"""Rank and address from a launcher's environment."""

import pytest

from moecore.expert_parallel.environment import Launch, first_node, launch_from_environment

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "job",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08,12]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


def test_torchrun_says_rank_address_and_that_it_serves_the_store():
    assert launch_from_environment(TORCHRUN) == Launch(3, 4, 1, "node0", 29500, "job-2", True)


def test_without_a_launcher_there_is_none():
    assert launch_from_environment({}) is None
    assert launch_from_environment({"RANK": "0", "WORLD_SIZE": "1"}) is None


def test_slurms_step_names_its_first_node_and_a_port_of_its_own():
    found = launch_from_environment(SLURM)
    assert found == Launch(5, 8, 1, "gpu07", found.port, "0-0")
    other = launch_from_environment({**SLURM, "SLURM_JOB_ID": "12346"})
    assert 20000 <= found.port < other.port < 40000


def test_variables_of_torch_come_before_slurms():
    found = launch_from_environment({**SLURM, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (found.rank, found.address, found.port) == (5, "10.0.0.1", 1234)


def test_a_batch_script_of_slurm_outside_of_a_step_is_no_launch():
    alone = {k: v for k, v in SLURM.items() if not k.startswith("SLURM_STEP")}
    assert launch_from_environment({**alone, "SLURM_NTASKS": "8"}) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[01-03,05]", "n01"),
        ("n[4],m", "n4"),
        ("a[1-2]-ib,b", "a1-ib"),
    ],
)
def test_the_first_node_of_a_list(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": None}, r"RANK must be an integer in \[0, 3\], got nothing"),
        ({"RANK": "4"}, r"RANK must be an integer in \[0, 3\], got '4'"),
        ({"RANK": "x"}, r"RANK must be an integer in \[0, 3\], got 'x'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE must be an integer >= 1, got '0'"),
        ({"LOCAL_RANK": "-1"}, r"LOCAL_RANK must be an integer in \[0, 3\], got '-1'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR must be the host of rank 0, got nothing"),
        ({"MASTER_PORT": "70000"}, r"MASTER_PORT must be an integer in \[1, 65535\], got '70000'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_variable_that_is_wrong_is_named(change, message):
    given = {k: v for k, v in {**TORCHRUN, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=f"environment variable {message}"):
        launch_from_environment(given)
