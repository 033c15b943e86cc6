"""One process of a run on many devices: from the launcher's variables to a World, and back.

The only reader of launcher variables. Started by torchrun, SLURM's srun or Open MPI's mpirun.
"""

import os

import torch
import torch.distributed as dist

# launcher -> the variables that give (rank, size, local rank). A batch job has SLURM's variables
# whatever starts its processes, so srun comes last.
LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "srun": ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
}


class LaunchError(RuntimeError):
    """The launcher's variables do not describe a run; the message names them."""


class World:
    """The ranks of a run: this one's `rank`, `local_rank` and `device`, and their number `size`."""

    def __init__(self, device, rank=0, local_rank=0, size=1):
        self.device, self.rank, self.local_rank, self.size = device, rank, local_rank, size

    def wrap(self, net):
        """`net` with its gradients averaged over the ranks."""
        if self.size == 1:
            return net
        ids = [self.device] if self.device.type == "cuda" else None
        return torch.nn.parallel.DistributedDataParallel(net, device_ids=ids)

    def sum(self, tensor):
        """Add `tensor` up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def share(self, tensors):
        """Give every rank the tensors of rank 0, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def agree(self, value=None):
        """`value`, any picklable object, of rank 0. Waits for all the ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0)
        return box[0]

    def stop(self):
        if dist.is_initialized():
            dist.destroy_process_group()


def start(device, distribute=False):
    """The World of this process; `device` is a torch.device, without an index for one a rank.

    Raises LaunchError with one sentence where `distribute` is set and the launcher's variables
    are missing.
    """
    if not distribute:
        return World(device)
    launcher, names = next(
        ((k, names) for k, names in LAUNCHERS.items() if any(n in os.environ for n in names)),
        (None, ()),
    )
    if launcher is None:
        raise LaunchError(
            "--distribute needs a launcher, and none of its variables are set: start with "
            "`torchrun --nproc_per_node=N main.py --distribute ...`, srun or mpirun"
        )
    for name in (*names, "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise LaunchError(f"--distribute under {launcher} needs the variable {name}: export it")
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in names)
    except ValueError as error:
        raise LaunchError(f"{', '.join(names)} should be whole numbers: {error}") from error
    if device.type == "cuda":
        if device.index is not None:
            raise LaunchError(f"--distribute gives each rank a GPU of its own; leave out {device}")
        if local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"there are {torch.cuda.device_count()} GPUs on this node and a local rank "
                f"{local_rank}: start one rank a GPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=size)
    return World(device, rank, local_rank, size)
