from __future__ import annotations

import pytest

from everest_ds.schedulers import adopt, first_host, of_slurm

TASK = {
    "SLURM_JOB_ID": "1234567", "SLURM_STEP_ID": "0", "SLURM_PROCID": "9", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "12", "SLURM_STEP_NUM_NODES": "2", "SLURM_NNODES": "4",
    "SLURM_STEP_TASKS_PER_NODE": "8,4", "SLURM_STEP_NODELIST": "gpu[07,09]-ib", "SLURM_JOB_NODELIST": "gpu[01-09]",
}  # fmt: skip


def without(*names: str, **changed: str) -> dict[str, str]:
    return {name: value for name, value in TASK.items() if name not in names} | changed


def test_task_of_srun_is_a_rank_of_its_step() -> None:
    assert of_slurm(TASK) == {
        "RANK": "9", "WORLD_SIZE": "12", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "gpu07-ib",
        "MASTER_PORT": str(20000 + 1234567 % 20000),
    }  # fmt: skip
    alone = of_slurm(without("SLURM_STEP_NODELIST", SLURM_STEP_NUM_NODES="1", SLURM_STEP_TASKS_PER_NODE="12"))
    assert (alone["MASTER_ADDR"], alone["LOCAL_WORLD_SIZE"]) == ("127.0.0.1", "12")
    other_step = of_slurm(TASK | {"SLURM_STEP_ID": "1"})
    assert other_step["MASTER_PORT"] != of_slurm(TASK)["MASTER_PORT"]


def test_every_task_has_the_same_place_to_meet() -> None:
    tasks = [of_slurm(TASK | {"SLURM_PROCID": str(task), "SLURM_NODEID": str(int(task > 7))}) for task in range(12)]
    assert [task["RANK"] for task in tasks] == [str(rank) for rank in range(12)]
    assert len({(task["MASTER_ADDR"], task["MASTER_PORT"], task["WORLD_SIZE"]) for task in tasks}) == 1
    assert [task["LOCAL_WORLD_SIZE"] for task in tasks] == ["8"] * 8 + ["4"] * 4


@pytest.mark.parametrize(
    "given",
    [
        {},
        without("SLURM_STEP_ID", SLURM_PROCID="0"),  # a batch script
        without(SLURM_STEP_ID="4294967291", SLURM_PROCID="0"),  # a batch script in newer versions
        without(SLURM_STEP_ID="4294967290", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"),  # the shell of salloc
        without(SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0"),  # srun -n 1 in a job of 16 tasks
        without(SLURM_PTY_PORT="40000", SLURM_PROCID="0"),  # srun --pty bash
        without("SLURM_PROCID"),
        without(SLURM_STEP_NUM_TASKS="many", SLURM_NTASKS="1"),
    ],
)
def test_single_tasks_and_shells_are_no_ranks(given: dict[str, str]) -> None:
    assert of_slurm(given) == {}


@pytest.mark.parametrize("given", [{"RANK": "3", "WORLD_SIZE": "4"}, {"WORLD_SIZE": "1"}])
def test_variables_of_a_launcher_come_first(given: dict[str, str]) -> None:
    environment = TASK | given | {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}
    before = dict(environment)
    adopt(environment)
    assert environment == before


def test_own_place_to_meet_comes_first() -> None:
    environment = TASK | {"MASTER_ADDR": "gpu08", "MASTER_PORT": "1"}
    adopt(environment)
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"], environment["RANK"]) == ("gpu08", "1", "9")


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("a", "a"),
        ("a,b", "a"),
        ("n[001-003,7],m", "n001"),
        ("n[1-2]-r[3,4]", "n1-r3"),
        ("x-1,x-2", "x-1"),
    ],
)
def test_first_host_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def of_mpi(kind: str, **numbers: int) -> dict[str, str]:
    return {f"{kind}_COMM_WORLD_{name.upper()}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {f"OMPI_COMM_WORLD_{k}": v for k, v in (("SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "1"))},
            ("3", "4", "1"),
        ),
        (
            {f"MV2_COMM_WORLD_{k}": v for k, v in (("SIZE", "2"), ("RANK", "0"), ("LOCAL_RANK", "0"))},
            ("0", "2", "0"),
        ),
        ({"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALRANKID": "1"}, ("1", "2", "1")),
        ({"PMI_SIZE": "1", "PMI_RANK": "0"}, (None, None, None)),
    ],
)
def test_processes_of_mpi_are_ranks_that_know_no_address(
    given: dict[str, str], expected: tuple[str | None, ...]
) -> None:
    adopt(given)
    assert tuple(given.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) == expected
    assert "MASTER_ADDR" not in given
