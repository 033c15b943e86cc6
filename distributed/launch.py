"""What the launcher says in environment variables: the only reader of them."""

import os
import re
import zlib
from typing import NamedTuple

from cli import UserError
from distributed.slurm import first_node

# launcher -> the variables of (rank, size, local rank, ranks on this node); the first that is set
# counts. torchrun sets its own within a batch job, mpirun and mpiexec theirs, and SLURM's are there
# whatever starts the processes: so srun comes last.
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
# What names one start of a command, the same for all its ranks. A step of SLURM is srun's: under
# mpirun it would be the step of the other nodes' daemons.
JOB = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    "mpirun": ("SLURM_JOB_ID", "PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    "mpiexec": ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "PMI_JOBID"),
    "srun": ("SLURM_JOB_ID", "SLURM_STEP_ID"),
}
FIRST_PORT, PORTS = 20000, 10000  # below those that systems hand out themselves


class LaunchError(UserError):
    """The launcher's variables do not describe a run; the message names them."""


class Launch(NamedTuple):
    """This process among the `size` of a run, and where they meet."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    address: str  # of the node of rank 0
    port: int
    job: str
    agent: bool  # whether torchrun serves the store, instead of rank 0


def read(environ=os.environ):
    """The Launch that the variables describe; LaunchError, which names one, if they do not."""
    launcher = _launcher(environ)
    rank, size, local_rank, local_size = (_number(launcher, i, environ) for i in range(4))
    names = [names[0] for names in LAUNCHERS[launcher][:2]]
    if not rank < size:
        raise LaunchError(f"{names[0]} is {rank} and {names[1]} is {size}: ranks run from 0 to one "
                          "less than their number")  # fmt: skip
    if launcher == "torchrun" and "TORCHELASTIC_RUN_ID" not in environ:
        _check_leftovers(rank, size, environ)
    nodes = next((environ[name] for name in NODE_COUNTS if name in environ), None)
    one_node = local_size == size or (launcher == "srun" and nodes == "1")
    lists = (("SLURM_STEP_NODELIST",) if launcher == "srun" else ()) + NODES
    listed = next((environ[name] for name in lists if environ.get(name)), "")
    address = environ.get("MASTER_ADDR")
    if not address and launcher != "torchrun":
        address = "127.0.0.1" if one_node else first_node(listed)
    if not address:
        raise _missing(launcher, "MASTER_ADDR", ", the name of the node of rank 0")
    job = "/".join(environ[name] for name in JOB[launcher] if environ.get(name))
    if not job and one_node and launcher != "torchrun":  # by hand: no parent in common
        job = str(os.getppid())  # the launcher's own process
    port = environ.get("MASTER_PORT")
    if port is None and (launcher == "torchrun" or not job):
        raise _missing(launcher, "MASTER_PORT", ", a port that is free on the node of rank 0")
    if port is None:
        port = str(FIRST_PORT + zlib.crc32(job.encode()) % PORTS)
    if not re.fullmatch(r"\d{1,5}", port) or not 0 < int(port) < 65536:
        raise LaunchError(f"MASTER_PORT is {port!r}, not a port from 1 to 65535")
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(launcher, rank, size, local_rank, address, int(port), job, agent)


def is_first():
    """Whether this process is rank 0, or no launcher has numbered it."""
    names = [name for kinds in LAUNCHERS.values() for name in kinds[0]]
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


def siblings():
    """The number of processes that torchrun or mpirun has started for one command."""
    names = ["OMPI_COMM_WORLD_SIZE"]
    names += ["WORLD_SIZE"] if "TORCHELASTIC_RUN_ID" in os.environ else []
    return max(int(os.environ.get(name, "1")) for name in names)


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


def _number(launcher, quantity, environ):
    """A quantity of LAUNCHERS; 0 ranks on this node where the launcher does not say."""
    names = LAUNCHERS[launcher][quantity]
    name = next((name for name in names if name in environ), None)
    if name is None and quantity == 3:
        return 0
    if name is None:
        raise _missing(launcher, " or ".join(names))
    if not re.fullmatch(r"\s*\d+\s*", environ[name]):
        raise LaunchError(f"{name} is {environ[name]!r}, not a whole number")
    return int(environ[name])


def _missing(launcher, name, what=""):
    return LaunchError(f"--distribute under {launcher} needs the variable {name}: export it{what}")


def _check_leftovers(rank, size, environ):
    """Raise where RANK is left over in a shell, and another launcher has other numbers."""
    for other in ("mpirun", "srun"):
        names = [names[0] for names in LAUNCHERS[other][:2]]
        theirs = [environ.get(name) for name in names]
        for ours, own, name, value in zip(("RANK", "WORLD_SIZE"), (rank, size), names, theirs):
            if None not in theirs and theirs[1] != "1" and value != str(own):
                raise LaunchError(f"{ours} is {own} and {name} is {value}: unset RANK, WORLD_SIZE "
                                  f"and LOCAL_RANK to run under {other}")  # fmt: skip
