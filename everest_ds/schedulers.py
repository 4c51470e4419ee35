"""Rank and world size of processes that Slurm or MPI starts directly, without a launcher. A leaf.

`srun -n 8 everest pretrain ...` is one training of eight ranks, not eight trainings: Slurm's variables are copied
to the ones that a launcher sets. If a launcher has set them, they are kept.
"""

from collections.abc import Mapping, MutableMapping

# Step numbers from here on are not from srun: the batch script, an interactive shell.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_FIRST_PORT, _NUM_PORTS = 20000, 20000
_MPI = (
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_RANK"),
    ("PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID"),
)


def adopt(environment: MutableMapping[str, str]) -> None:
    """Set a launcher's variables if Slurm or MPI has started several processes without one."""
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return
    for name, value in (of_slurm(environment) or of_mpi(environment)).items():
        environment.setdefault(name, value)


def of_slurm(given: Mapping[str, str]) -> dict[str, str]:
    """Return a launcher's variables for a task of `srun`; empty for a single task and outside srun.

    A batch script and an interactive shell also see the job's number of tasks, but are not tasks themselves.
    """
    step = _number(given, "SLURM_STEP_ID", "SLURM_STEPID")
    size = _number(given, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS")
    rank = _number(given, "SLURM_PROCID")
    if rank is None or size is None or size < 2 or "SLURM_PTY_PORT" in given:
        return {}
    if (step is None and rank == 0) or (step or 0) >= _FIRST_SPECIAL_STEP:
        return {}
    num_nodes = _number(given, "SLURM_STEP_NUM_NODES", "SLURM_NNODES") or 1
    sizes = _expand(given.get("SLURM_STEP_TASKS_PER_NODE") or given.get("SLURM_TASKS_PER_NODE", ""))
    node = _number(given, "SLURM_NODEID") or 0
    own_size = sizes[node] if len(sizes) > node and sum(sizes) == size else -(-size // num_nodes)
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_JOB_NODELIST") or given.get("SLURM_NODELIST", "")
    job = (_number(given, "SLURM_JOB_ID", "SLURM_JOBID") or 0) + 7919 * (step or 0)
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(_number(given, "SLURM_LOCALID") or 0),
        "LOCAL_WORLD_SIZE": str(own_size),
        "MASTER_ADDR": "127.0.0.1" if num_nodes == 1 else first_host(nodes),
        "MASTER_PORT": str(_FIRST_PORT + job % _NUM_PORTS),
    }


def of_mpi(given: Mapping[str, str]) -> dict[str, str]:
    """Return a launcher's variables for a process of `mpirun`, without the address, which MPI does not give."""
    for size, rank, local_size, local_rank in _MPI:
        if (_number(given, size) or 1) > 1 and rank in given:
            names = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local_rank, "LOCAL_WORLD_SIZE": local_size}
            return {name: given[source] for name, source in names.items() if source in given}
    return {}


def first_host(nodes: str) -> str:
    """Return the first name of a Slurm list of nodes: `gpu[07-09,12]-ib,login` gives `gpu07-ib`."""
    name, rest = "", nodes
    while rest and not rest.startswith(","):
        if rest.startswith("["):
            group, _, rest = rest[1:].partition("]")
            name += group.split(",")[0].split("-")[0]
        else:
            name, rest = name + rest[0], rest[1:]
    return name


def _expand(text: str) -> list[int]:
    """Return the tasks of every node: `8(x2),4` gives 8, 8, 4."""
    sizes: list[int] = []
    for part in filter(None, text.split(",")):
        count, _, times = part.partition("(x")
        times = times.rstrip(")") or "1"
        if not (count.isdigit() and times.isdigit()):
            return []
        sizes += [int(count)] * int(times)
    return sizes


def _number(given: Mapping[str, str], *names: str) -> int | None:
    """Return the value of the first of these variables that is a number."""
    return next((int(given[name]) for name in names if given.get(name, "").isdigit()), None)
