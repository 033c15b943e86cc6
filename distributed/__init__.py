"""One process of a run on many devices: from the launcher's variables to a World, and back.

Started by torchrun, SLURM's srun, Open MPI's mpirun or another MPI's mpiexec.
"""

import inspect
import os
import socket
import sys
import traceback
from collections import Counter
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from cli import UserError
from distributed.launch import LAUNCHERS, LaunchError, is_first, read, siblings
from distributed.meet import meet
from distributed.sync_bn import SyncBatchNorm
from distributed.watch import Watch

__all__ = ["LaunchError", "RankError", "World", "is_first", "fingerprint", "start"]

# every name that says that a launcher has started this process
VARIABLES = [name for names in LAUNCHERS.values() for name in names[0]]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
MEETING = 600  # seconds within which every rank has to come: nodes start one after the other


class RankError(UserError):
    """What every rank finds at once, and each of them raises; the message says it all."""

    exit_code = 1


class Failure(NamedTuple):
    """Why a run failed: the reason, a traceback or None, and whether this rank prints them."""

    reason: str
    trace: str | None
    first: bool


class World:
    """The ranks of a run: this one's `rank`, `local_rank` and `device`, and their number `size`."""

    def __init__(self, device, rank=0, local_rank=0, size=1, watch=None, launcher=None):
        self.device, self.rank, self.local_rank, self.size = device, rank, local_rank, size
        self.watch, self.launcher = watch, launcher

    def wrap(self, net, sync_bn=False):
        """`net` with its gradients averaged over the ranks, and with `sync_bn` its batch-norm
        statistics taken over the images of all of them; the weights stay the same tensors."""
        if self.size == 1:
            return net
        if sync_bn:
            # Some libraries' own do more than the norm, as an activation, which would be lost.
            odd = {type(m).__name__ for m in net.modules()
                   if isinstance(m, _BatchNorm) and type(m).__module__ != _BatchNorm.__module__}
            if odd:
                raise RankError(f"--sync_bn does not know the network's {', '.join(sorted(odd))}")
            net = SyncBatchNorm.convert(net)
        ids = [self.device] if self.device.type == "cuda" else None
        ddp = torch.nn.parallel.DistributedDataParallel
        # The statistics that count are those of rank 0, shared before they are used: not at every
        # step. Newer versions of torch have another word for it.
        names = inspect.signature(ddp.__init__).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
        model = ddp(net, device_ids=ids, **{name: False})
        self._settle(model)
        return model

    def _settle(self, model):
        """Have `model` send its gradients as it is going to at every step.

        After the first step it puts them into other messages; over three ranks and more, the place
        in a message decides in which order the ranks' numbers are added, and a run that goes on
        from a checkpoint would differ in the last bits. So it takes a first step without images.
        """
        net = model.module
        forward = vars(net).get("forward")
        net.forward = lambda x: sum((x * p.sum() for p in net.parameters()), x)
        try:
            model(torch.zeros((), device=self.device)).backward()
        finally:
            if forward is None:
                del net.forward
            else:
                net.forward = forward
            net.zero_grad()

    def all_reduce(self, tensor):
        """Add `tensor` up over the ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def all_reduce_in_order(self, tensor):
        """The same, each element of a small tensor in the same way, wherever in it that stands."""
        if self.size > 1:
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(parts, tensor)
            tensor.zero_()
            for part in parts:
                tensor += part

    def all_reduce_async(self, tensor):
        """Begin to; returns a function that has to be called before the tensor is used."""
        return dist.all_reduce(tensor, async_op=True).wait if self.size > 1 else lambda: None

    def all_reduce_max(self, tensor):
        """The greatest of the ranks' `tensor`s, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def all_reduce_max_async(self, tensor):
        """Begin to take the greatest; returns a function to be called before the tensor is used."""
        return dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True).wait

    def broadcast(self, tensors):
        """Give every rank the tensors of rank 0, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def broadcast_object(self, value=None):
        """`value`, any picklable object, of rank 0. Waits for all the ranks."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, 0, device=self._objects())
        return box[0]

    def all_gather_object(self, value):
        """The `value`, any picklable object, of each rank, in a list that every rank gets."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def ranks_that_differ(self, tensors):
        """The ranks whose `tensors` differ, in any bit, from those that most ranks hold."""
        if self.size == 1:
            return []
        prints = [torch.empty((), dtype=torch.int64, device=self.device) for _ in range(self.size)]
        dist.all_gather(prints, fingerprint(tensors).to(self.device))
        prints = torch.stack(prints).tolist()
        most = max(Counter(prints).values())
        usual = next(x for x in prints if prints.count(x) == most)  # of equals, the lowest rank's
        return [rank for rank, x in enumerate(prints) if x != usual]

    def failed(self, error):
        return Failure(*self._failed(error), self.speaks)

    def _failed(self, error):
        """(reason, traceback or None) of what ended this run, after `error` was raised here: either
        that, and then every other rank is told, or what another rank failed of before."""
        reason, trace = f"{type(error).__name__}: {error}", None
        if isinstance(error, KeyboardInterrupt):
            reason = "interrupted"
        elif isinstance(error, UserError):
            reason = str(error)
        else:
            trace = "".join(traceback.format_exception(error))
        if self.watch is None or isinstance(error, RankError):
            return reason, trace
        if self.watch.told:  # and it is said already
            return self.watch.failure[0], None
        # An error in a collective follows from what happened elsewhere, and so may a signal: a
        # launcher ends all the ranks when one has failed. A moment later it is known.
        found = self.watch.wait(2)
        if found is None:
            self.watch.tell(reason, trace)
        return found or (reason, trace)

    @property
    def speaks(self):
        """Whether this rank prints: the first one, or the next ones once that is gone."""
        if self.rank == 0 or self.watch is None:
            return self.rank == 0
        return self.watch.second and self.watch.orphaned

    def stop(self):
        if self.watch is not None:
            self.watch.stop()
            # After a failure the group is in pieces, and taking it apart may wait for ever.
            if self.watch.failure is None and dist.is_initialized():
                dist.destroy_process_group()

    def leave(self, code):
        """Stop, and of several ranks end the process with `code`; returns it otherwise.

        What is left of a group may wait for ranks that are gone; and where all went well, one of
        its threads may still abort the interpreter's own ending ("terminate called ...").
        """
        self.stop()
        if self.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    def _objects(self):
        return self.device if self.device.type == "cuda" else torch.device("cpu")


def start(device, distribute=False, seconds=MEETING):
    """The World of this process; `device` is a torch.device, without an index for one a rank.

    Raises LaunchError with one sentence where `distribute` is set and the launcher's variables do
    not describe a run, or its ranks do not meet within `seconds`.
    """
    if not distribute:
        if siblings() > 1:
            raise LaunchError(
                f"{siblings()} processes were started to do the same: with --distribute they work "
                "together" if is_first() else ""
            )
        return World(device)
    launch = read()
    if device.index is not None:
        raise LaunchError(f"--distribute gives each rank a device of its own; leave out {device}")
    store = meet(launch, seconds)
    try:
        watch = Watch(store, launch.rank, launch.size, launch.address, launch.local_rank)
    except (dist.DistError, RuntimeError, OSError, ValueError) as error:
        raise LaunchError(
            f"rank {launch.rank} has met the others and lost them again: {error}"
        ) from error
    world = World(device, launch.rank, launch.local_rank, launch.size, watch, launch.launcher)
    try:
        if device.type == "cuda":
            world.device = _own_gpu(launch, store)
            torch.cuda.set_device(world.device)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", store), rank=launch.rank,
            world_size=launch.size, timeout=timedelta(minutes=30),
        )  # fmt: skip
    except (Exception, KeyboardInterrupt) as error:
        reason = world.failed(error).reason
        watch.stop()
        if isinstance(error, KeyboardInterrupt):
            raise
        raise LaunchError(reason if world.speaks else "") from error
    return world


def _own_gpu(launch, store):
    """This rank's GPU; LaunchError where there are fewer than ranks on this node."""
    count = torch.cuda.device_count()
    # Where the launcher shows each process one GPU alone, that is its own.
    index = 0 if count == 1 else launch.local_rank
    if index >= count:
        raise LaunchError(
            f"there are {count} GPUs on {socket.gethostname()} and a local rank "
            f"{launch.local_rank}: start one rank a GPU"
        )
    device = torch.device("cuda", index)
    mine = f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid}"
    store.set(f"gpu/{launch.rank}", mine)
    for rank in range(launch.rank):
        if store.get(f"gpu/{rank}").decode() == mine:
            raise LaunchError(
                f"ranks {rank} and {launch.rank} have the same GPU of {socket.gethostname()}: "
                "start one rank a GPU"
            )
    return device


def fingerprint(tensors):
    """A 64-bit sum over the bits of real tensors of one device, 0-dim int64: one pass over them,
    the same for the same bits everywhere, and another if one element differs."""
    total = None
    for tensor in tensors:
        bits = tensor.detach().view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64)
        total = bits if total is None else total * 31 + bits
    return torch.zeros((), dtype=torch.int64) if total is None else total
