"""What the launcher says in environment variables: the only reader of them."""

import os
import re
import zlib
from typing import NamedTuple

from cli import UserError

# launcher -> the variables that give (rank, size, local rank, ranks on this node); of several names
# the first that is set counts. torchrun sets its own within a batch job, mpirun and mpiexec theirs,
# and SLURM's are there whatever starts the processes: so srun comes last.
LAUNCHERS = {
    "torchrun": (("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",)),
    "mpirun": (
        ("OMPI_COMM_WORLD_RANK",), ("OMPI_COMM_WORLD_SIZE",), ("OMPI_COMM_WORLD_LOCAL_RANK",),
        ("OMPI_COMM_WORLD_LOCAL_SIZE",),
    ),
    "mpiexec": (
        ("PMI_RANK",), ("PMI_SIZE",), ("MPI_LOCALRANKID", "PMI_LOCAL_RANK"),
        ("MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"),
    ),
    "srun": (("SLURM_PROCID",), ("SLURM_NTASKS",), ("SLURM_LOCALID",), ()),
}  # fmt: skip
NODES = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
NODE_COUNTS = ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
# What names the job of a launcher, the same for all its ranks. A step of SLURM is srun's: under
# mpirun it would be that of the daemons of the other nodes.
JOB = {
    "srun": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
    "mpirun": ("SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    "mpiexec": ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "PMI_JOBID"),
    "torchrun": (),
}
FIRST_PORT, PORTS = 20000, 10000  # below those that systems hand out themselves
TRIES = 16


class LaunchError(UserError):
    """The launcher's variables do not describe a run; the message names them."""


class Launch(NamedTuple):
    """This process among the `size` of a run, and where they meet."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int  # 0 where the launcher does not say
    address: str  # of the node of rank 0
    ports: tuple  # to be tried in this order
    job: str = ""  # of the launcher, as far as it is known
    agent: bool = False  # torchrun's own store is there to be used


def read(environ=None):
    """The Launch that the variables describe.

    Raises LaunchError, one sentence with the variable in it, where they do not.
    """
    environ = os.environ if environ is None else environ
    launcher = _launcher(environ)
    rank, size, local_rank, local_size = _numbers(launcher, environ)
    _contradictions(launcher, rank, size, local_rank, local_size, environ)
    agent = "TORCHELASTIC_RUN_ID" in environ
    address = environ.get("MASTER_ADDR") or _address(launcher, size, local_size, environ)
    port, job = environ.get("MASTER_PORT"), _job(launcher, environ)
    if not job and launcher != "torchrun" and local_size == size:
        job = str(os.getppid())  # on one node: the launcher's own process
    if port is not None:
        if not port.isdigit() or not 0 < int(port) < 65536:
            raise LaunchError(f"MASTER_PORT is {port!r}, not a port from 1 to 65535")
        ports = (int(port),)
    elif launcher == "torchrun":
        raise LaunchError(
            "RANK is set and MASTER_PORT is not: torchrun sets both; export MASTER_PORT too"
        )
    elif not job:
        raise LaunchError(
            f"--distribute under {launcher} over several nodes needs the variable MASTER_PORT: "
            "export it, a port that is free on the node of rank 0"
        )
    else:
        ports = _ports(job)
    return Launch(launcher, rank, size, local_rank, local_size, address, ports, job, agent)


def _launcher(environ):
    def is_set(kind, quantity):
        return any(name in environ for name in LAUNCHERS[kind][quantity])

    tasks = environ.get("SLURM_NTASKS", "1")
    for launcher in LAUNCHERS:
        if launcher == "srun" and tasks != "1" and "SLURM_STEP_ID" not in environ:
            raise LaunchError(  # within sbatch or salloc
                f"SLURM_NTASKS is {tasks} and no srun has started this process: start with "
                "`srun python main.py --distribute ...`"
            )
        if launcher == "mpiexec" and is_set("srun", 0) and not is_set("mpiexec", 2):
            continue  # srun --mpi=pmi2 sets PMI_RANK as well
        if any(is_set(launcher, quantity) for quantity in range(3)):
            return launcher
    raise LaunchError(
        "--distribute needs a launcher, and none of its variables are set: start with "
        "`torchrun --nproc_per_node=N main.py --distribute ...`, srun or mpirun"
    )


def is_first(environ=None):
    """Whether this process is rank 0, or nobody says that it is another."""
    environ = os.environ if environ is None else environ
    names = [name for kinds in LAUNCHERS.values() for name in kinds[0]]
    return next((environ[name] for name in names if name in environ), "0") == "0"


def siblings(environ=None):
    """The number of processes that torchrun or mpirun has started for one command."""
    environ = os.environ if environ is None else environ
    names = ["OMPI_COMM_WORLD_SIZE"]
    names += ["WORLD_SIZE"] if "TORCHELASTIC_RUN_ID" in environ else []
    return max(int(environ.get(name, "1")) for name in names)


def _numbers(launcher, environ):
    """(rank, size, local rank, ranks on this node or 0)."""
    numbers = []
    for i, names in enumerate(LAUNCHERS[launcher]):
        name = next((name for name in names if name in environ), None)
        if name is None and i == 3:
            numbers.append(0)
        elif name is None:
            raise LaunchError(
                f"--distribute under {launcher} needs the variable {' or '.join(names)}: export it"
            )
        elif not re.fullmatch(r"\s*\d+\s*", environ[name]):
            raise LaunchError(f"{name} is {environ[name]!r}, not a whole number")
        else:
            numbers.append(int(environ[name]))
    return numbers


def _contradictions(launcher, rank, size, local_rank, local_size, environ):
    names = [names[0] if names else None for names in LAUNCHERS[launcher]]
    if not rank < size:
        raise LaunchError(f"{names[0]} is {rank} and {names[1]} is {size}: ranks run from 0 "
                          "to one less than their number")  # fmt: skip
    if local_rank > rank:
        raise LaunchError(f"{names[2]} is {local_rank} and {names[0]} only {rank}: a rank on its "
                          "node is at most the rank")  # fmt: skip
    if local_size and not local_rank < local_size <= size:
        raise LaunchError(f"{names[3]} is {local_size}, which goes neither with {names[2]} "
                          f"{local_rank} nor with {names[1]} {size}")  # fmt: skip
    # RANK left over in a shell, under a launcher that has other numbers.
    if launcher == "torchrun" and "TORCHELASTIC_RUN_ID" not in environ:
        for other in ("mpirun", "srun"):
            theirs = [environ.get(names[0]) for names in LAUNCHERS[other][:2]]
            if None in theirs or theirs[1] == "1":
                continue
            for i, ours in enumerate((rank, size)):
                if theirs[i] != str(ours):
                    raise LaunchError(
                        f"{names[i]} is {ours} and {LAUNCHERS[other][i][0]} is {theirs[i]}: unset "
                        f"RANK, WORLD_SIZE and LOCAL_RANK to run under {other}"
                    )


def _address(launcher, size, local_size, environ):
    """Where rank 0 is."""
    if launcher != "torchrun":
        nodes = next((environ[name] for name in NODE_COUNTS if name in environ), None)
        if local_size == size or (launcher == "srun" and nodes == "1"):
            return "127.0.0.1"
        step = ("SLURM_STEP_NODELIST",) if launcher == "srun" else ()
        for name in (*step, *NODES):
            if environ.get(name):
                return first_node(environ[name])
    raise LaunchError(
        f"--distribute under {launcher} over several nodes needs the variable MASTER_ADDR: export "
        "it, the name of the node of rank 0"
    )


def first_node(nodes):
    """The first of SLURM's list of nodes: gpu[003-007,12],cpu1 is gpu003 and others."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def _job(launcher, environ):
    return "/".join(environ[name] for name in JOB[launcher] if environ.get(name))


def _ports(job):
    """Ports that the ranks of one job agree on and those of another hardly share."""
    start = zlib.crc32(job.encode())
    return tuple(FIRST_PORT + (start + 619 * i) % PORTS for i in range(TRIES))
