"""What the launcher says in environment variables: the only reader of them."""

import os
import re
import zlib
from typing import NamedTuple

from cli import UserError, command
from distributed.slurm import first_node

# launcher -> the variables of (rank, size, local rank, ranks on this node). The first launcher with
# a rank and a size counts: torchrun sets its own within a batch job, mpirun and mpiexec theirs, and
# SLURM's are there whatever starts the processes, so srun comes last. "variables" is whatever sets
# torchrun's without it, often no more than two: Kubernetes' PyTorchJob, Vertex AI, a script.
TORCH = (("RANK",), ("WORLD_SIZE",), ("LOCAL_RANK",), ("LOCAL_WORLD_SIZE",))
LAUNCHERS = {
    "torchrun": TORCH,
    "variables": TORCH,
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
PLANS = ("PET_NNODES", "PET_NPROC_PER_NODE")  # torchrun's flags as variables, for it to read
NODES = ("SLURM_JOB_NODELIST", "SLURM_NODELIST")
NODE_COUNTS = ("SLURM_STEP_NUM_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES")
# What names one start of a command, the same for all its ranks. A step of SLURM is srun's: under
# mpirun it would be the step of the other nodes' daemons.
JOB = {
    "torchrun": ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT"),
    "variables": (),
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
    local_rank: int | None  # None: the ranks of a node have to count themselves
    address: str  # of the node of rank 0
    port: int
    job: str
    agent: bool  # whether torchrun serves the store, instead of rank 0

    @property
    def host(self):
        """The address of the store; of its own, rank 0's, which a pod's service may not lead to."""
        return "127.0.0.1" if self.rank == 0 and not self.agent else self.address


def read(environ=os.environ):
    """The Launch that the variables describe; LaunchError, which names one, if they do not."""
    environ = _set(environ)
    launcher = _launcher(environ)
    rank, size, local_rank, local_size = (_number(launcher, i, environ) for i in range(4))
    names = [names[0] for names in LAUNCHERS[launcher][:2]]
    if not rank < size:
        raise LaunchError(f"{names[0]} is {rank} and {names[1]} is {size}: ranks run from 0 to one "
                          "less than their number")  # fmt: skip
    if launcher == "variables":
        _check_leftovers(rank, size, environ)
    nodes = next((environ[name] for name in NODE_COUNTS if name in environ), None)
    one_node = size in (1, local_size) or (launcher == "srun" and nodes == "1")
    lists = (("SLURM_STEP_NODELIST",) if launcher == "srun" else ()) + NODES
    listed = next((environ[name] for name in lists if name in environ), "")
    address, of_torch = environ.get("MASTER_ADDR"), launcher in ("torchrun", "variables")
    if not address and (size == 1 or not of_torch):
        address = "127.0.0.1" if one_node else first_node(listed)
    if not address:
        raise _missing(launcher, "MASTER_ADDR", ", the name of the node of rank 0")
    job = "/".join(environ[name] for name in JOB[launcher] if name in environ)
    if not job and one_node and (size == 1 or not of_torch):  # by hand: no parent in common
        job = str(os.getppid())  # the launcher's own process
    port = environ.get("MASTER_PORT")
    if port is None and ((of_torch and size > 1) or not job):
        raise _missing(launcher, "MASTER_PORT", ", a port that is free on the node of rank 0")
    if port is None:
        port = str(FIRST_PORT + zlib.crc32(job.encode()) % PORTS)
    agent = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return Launch(launcher, rank, size, local_rank, address, port_number(port), job, agent)


def port_number(text):
    """The port that MASTER_PORT names; LaunchError where it names none."""
    if re.fullmatch(r"\d{1,5}", text) and 0 < int(text) < 65536:
        return int(text)
    link = "; Kubernetes sets that for a service of the name master" if "://" in text else ""
    raise LaunchError(f"MASTER_PORT is {text!r}, not a port from 1 to 65535{link}: export the "
                      "number of a port")  # fmt: skip


def is_launched(environ=os.environ):
    """Whether a launcher has numbered this process."""
    environ = _set(environ)
    return any(name in environ for quantities in LAUNCHERS.values() for name in quantities[0])


def is_first(environ=os.environ):
    """Whether this process prints what every process finds: rank 0, one that no launcher has
    numbered, and one whose launcher knows of no other on its node, as in a pod: it has a screen of
    its own."""
    environ = _set(environ)
    for rank, _, local_rank, _ in LAUNCHERS.values():
        number = next((environ[name] for name in rank if name in environ), None)
        if number is not None:
            return number.strip() == "0" or not any(name in environ for name in local_rank)
    return True


def check_alone(environ=os.environ):
    """Raise LaunchError where a launcher has started several processes for one command, and each
    would train alone; the message is empty where another one prints it. What is left over in a
    shell and describes no launch is no fault: a run without --distribute needs none of it. Nor are
    srun's tasks, which may each make other runs."""
    environ = _set(environ)
    for launcher, (ranks, sizes, *_) in LAUNCHERS.items():
        rank, size = (_whole(environ.get(names[0])) for names in (ranks, sizes))
        lone = launcher == "variables" and rank is None and "MASTER_ADDR" not in environ
        if launcher == "srun" or lone or not _counts(launcher, any, environ):
            continue
        if (size or 1) > max(rank or 0, 1):
            raise LaunchError(
                f"{size} processes were started to do the same: with --distribute they work "
                f"together (to train alone, unset {sizes[0]})" if is_first(environ) else ""
            )
    if not is_launched(environ):
        for name in PLANS:
            value = environ.get(name, "").rpartition(":")[2]  # 2, or 1:2
            if (_gpus() if value in ("auto", "gpu") else _whole(value) or 1) > 1:
                raise LaunchError(_unstarted(name, environ[name]))


def _gpus():
    import torch  # flags are read without

    return torch.cuda.device_count()


def _set(environ):
    """The variables that hold something: an empty one counts as not set."""
    return {name: value for name, value in environ.items() if value.strip()}


def _whole(text):
    """The whole number that a text spells, or None."""
    return int(text) if re.fullmatch(r"\s*\d{1,9}\s*", text or "") else None


def _counts(launcher, quantifier, environ):
    """Whether all, or any, of a launcher's rank and size are set, and by that launcher."""
    ranks, sizes, local_ranks, _ = LAUNCHERS[launcher]
    if launcher == "torchrun" and "TORCHELASTIC_RUN_ID" not in environ:
        return False
    if launcher == "mpiexec" and "SLURM_PROCID" in environ:  # srun --mpi=pmi2 sets PMI_RANK as well
        return any(name in environ for name in local_ranks)
    return quantifier(any(name in environ for name in names) for names in (ranks, sizes))


def _launcher(environ):
    whole = next((kind for kind in LAUNCHERS if _counts(kind, all, environ)), None)
    tasks = environ.get("SLURM_NTASKS", "1")
    if whole in ("srun", None) and tasks != "1" and "SLURM_STEP_ID" not in environ:
        raise LaunchError(  # within sbatch or salloc
            f"SLURM_NTASKS is {tasks} and no srun has started this process: start with "
            f"`srun {command('main', '--distribute')} ...`"
        )
    # RANK and WORLD_SIZE of Kubernetes' training operator count the nodes, and PLANS the rest.
    for name in {None: PLANS, "variables": PLANS[1:]}.get(whole, ()):
        if environ.get(name, "1") != "1":
            raise LaunchError(_unstarted(name, environ[name]))
    kind = whole or next((kind for kind in LAUNCHERS if _counts(kind, any, environ)), None)
    if kind is None:
        raise LaunchError(
            "--distribute needs a launcher, and none of its variables are set: start with "
            f"`torchrun --nproc_per_node=N {_script()} --distribute ...`, srun or mpirun"
        )
    return kind


def _unstarted(name, value):
    return (f"{name} is {value}, and no torchrun has started this process, which reads that: "
            f"start with `torchrun {_script()} --distribute ...`")  # fmt: skip


def _script():
    return command("main").removeprefix("python ")


def _number(launcher, quantity, environ):
    """A quantity of LAUNCHERS. Where the launcher does not say, None for a local rank and 0 for the
    ranks on this node."""
    names = LAUNCHERS[launcher][quantity]
    name = next((name for name in names if name in environ), None)
    if name is None and quantity > 1:
        return None if quantity == 2 else 0
    if name is None:
        raise _missing(launcher, " or ".join(names))
    number = _whole(environ[name])
    if number is None:
        raise LaunchError(f"{name} is {environ[name]!r}, not a whole number")
    return number


def _missing(launcher, name, what=""):
    of = "by RANK and WORLD_SIZE" if launcher == "variables" else f"under {launcher}"
    return LaunchError(f"--distribute {of} needs the variable {name}: export it{what}")


def _check_leftovers(rank, size, environ):
    """Raise where RANK is left over in a shell, and another launcher has other numbers."""
    for other in ("mpirun", "mpiexec", "srun"):
        names = [names[0] for names in LAUNCHERS[other][:2]]
        theirs = [environ.get(name) for name in names]
        for ours, own, name, value in zip(("RANK", "WORLD_SIZE"), (rank, size), names, theirs):
            if None not in theirs and theirs[1] != "1" and value != str(own):
                raise LaunchError(f"{ours} is {own} and {name} is {value}: unset RANK, WORLD_SIZE "
                                  f"and LOCAL_RANK to run under {other}")  # fmt: skip
