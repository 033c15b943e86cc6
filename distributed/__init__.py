"""One process of a run on many devices: from the launcher's variables to a World, and back.

Started by torchrun, SLURM's srun, Open MPI's mpirun, another MPI's mpiexec, or by whatever sets
RANK and WORLD_SIZE, as Kubernetes' PyTorchJob does.
"""

import os
import re
import shlex
import signal
import socket
import sys
import time
import traceback
from collections import Counter
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm

from cli import UserError
from distributed.launch import LaunchError, check_alone, is_first, read
from distributed.sync_bn import SyncBatchNorm

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
ENDING = (signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM))
# How gloo's and NCCL's errors say that another process has ended.
PEER = re.compile("closed by peer|reset by peer|Broken pipe|remote process exited")
GONE = ("another rank is gone: it was killed (out of memory?) or its node is down; "
        "the same command goes on")  # fmt: skip
# Seconds to wait for another rank's reason. It is stored before that rank ends, and mpirun kills
# the other ranks a second after the first.
HEARING = 0.5
NEAR = 90  # seconds for the ranks of one node to meet: those of several start one after the other


class RankError(UserError):
    """An error that every rank raises in the same step."""

    exit_code = 1


class Failure(NamedTuple):
    """Why a run failed. `first`: whether this rank prints the reason, and the traceback if any."""

    reason: str
    trace: str | None
    first: bool


class World:
    """The ranks of a run: this one's `rank`, `local_rank` and `device`, and their number `size`.

    All the ranks have to call the same methods in the same order, except `failed` and `leave`.
    """

    def __init__(self, device, rank=0, local_rank=0, size=1, launch=None, store=None):
        self.device, self.rank, self.local_rank, self.size = device, rank, local_rank, size
        self.launch, self.store, self.broken = launch, store, False
        self.launcher = launch and launch.launcher

    def wrap(self, net, sync_bn=False):
        """A DistributedDataParallel that shares the tensors of `net`; of one rank `net` itself.

        `sync_bn`: batch norms take their statistics over the images of all the ranks.
        """
        if self.size == 1:
            return net
        if sync_bn:
            # A library's own class may do more than the norm, such as an activation.
            odd = {type(m).__name__ for m in net.modules()
                   if isinstance(m, _BatchNorm) and type(m).__module__ != _BatchNorm.__module__}
            if odd:
                raise RankError(f"--sync_bn does not know the network's {', '.join(sorted(odd))}")
            net = SyncBatchNorm.convert(net)
        ids = [self.device] if self.device.type == "cuda" else None
        model = torch.nn.parallel.DistributedDataParallel(net, device_ids=ids)
        model.broadcast_buffers = False  # rank 0's statistics, before a test and not in every step
        self._settle(model)
        return model

    def _settle(self, model):
        """Take a step without images, after which DDP keeps its gradient buckets.

        DDP rebuilds them after the first step. With three ranks and more the place in a bucket
        decides the order in which the ranks' numbers are added: without this, a resumed run would
        differ in the last bits.
        """
        net = model.module
        forward = vars(net).get("forward")
        net.forward = lambda x: sum((x * p.sum() for p in net.parameters()), x)
        try:
            model(torch.zeros((), device=self.device)).backward()
        finally:
            del net.forward
            if forward is not None:
                net.forward = forward
            net.zero_grad()

    def all_reduce(self, tensor):
        """Replace `tensor` by its sum over the ranks."""
        self.all_reduce_async(tensor)()

    def all_reduce_async(self, tensor, op=dist.ReduceOp.SUM):
        """Begin an all_reduce; returns a function to call before `tensor` is used."""
        return dist.all_reduce(tensor, op, async_op=True).wait if self.size > 1 else lambda: None

    def all_reduce_max(self, tensor):
        """Replace `tensor` by its maximum over the ranks."""
        self.all_reduce_max_async(tensor)()

    def all_reduce_max_async(self, tensor):
        """Begin an all_reduce_max; returns a function to call before `tensor` is used."""
        return self.all_reduce_async(tensor, dist.ReduceOp.MAX)

    def all_reduce_in_order(self, tensor):
        """Replace a small `tensor` by its sum in the order of the ranks: an element's bits do not
        depend on its place."""
        if self.size > 1:
            parts = [torch.empty_like(tensor) for _ in range(self.size)]
            dist.all_gather(parts, tensor)
            tensor.copy_(sum(parts))

    def broadcast(self, tensors):
        """Copy rank 0's `tensors` into those of the other ranks."""
        for tensor in tensors if self.size > 1 else ():
            dist.broadcast(tensor, 0)

    def broadcast_object(self, value=None):
        """Rank 0's `value`, any picklable object. Waits for rank 0."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, 0)
        return box[0]

    def all_gather_object(self, value):
        """The list of the ranks' `value`s, any picklable objects. Waits for all the ranks."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def ranks_that_differ(self, tensors):
        """The ranks whose `tensors` differ in any bit from those that most ranks hold."""
        if self.size == 1:
            return []
        prints = self.all_gather_object(fingerprint(tensors).item())
        usual = Counter(prints).most_common(1)[0][0]  # of equals, the lowest rank's
        return [rank for rank, x in enumerate(prints) if x != usual]

    def failed(self, error):
        """The Failure of the run, after `error` was raised on this rank.

        The first rank that fails stores its reason for the others. An error in a collective follows
        from what another rank did, and so may a signal: launchers end all the ranks when one ends.
        """
        trace = None
        if isinstance(error, KeyboardInterrupt):
            reason = "interrupted"
        elif isinstance(error, UserError):
            reason = str(error)
        else:
            reason = f"{type(error).__name__}: {error}"
            trace = "".join(traceback.format_exception(error))
        if self.store is None:
            return Failure(reason, trace, True)
        self.broken = True
        for number in ENDING:  # a launcher's signal changes nothing from here on
            signal.signal(number, signal.SIG_IGN)
        gone = isinstance(error, RuntimeError) and trace is not None and bool(PEER.search(reason))
        follows = gone or isinstance(error, (dist.DistError, KeyboardInterrupt))
        if gone:
            reason, trace = GONE, None
        elif self.rank and not isinstance(error, (RankError, KeyboardInterrupt)):
            reason = f"rank {self.rank}: {reason}"
        end = time.monotonic() + follows * HEARING
        try:
            time.sleep(follows * HEARING / 5)  # the port of a killed rank closes after the others
            socket.create_connection((self.launch.host, self.launch.port), 2).close()
            while not self.store.check(["reason"]):  # prints a stack without a host
                if time.monotonic() >= end:
                    first = self.store.add("failed", 1) == 1
                    if first:
                        self.store.set("reason", reason)
                    return Failure(reason, trace, first)
                time.sleep(0.02)
            return Failure(self.store.get("reason").decode(), None, False)
        except (OSError, dist.DistError):  # Rank 0 is gone: its neighbour prints, one a node.
            return Failure(reason, trace, gone and (self.rank == 1 or self.local_rank == 0))

    def leave(self, code):
        """End the process with `code` where there are several ranks; returns it otherwise.

        The interpreter's own end may wait for ranks that are gone, and a thread of the group may
        abort it ("terminate called ...") where all went well.
        """
        if self.broken:
            self._linger()
        elif self.store is not None:
            dist.destroy_process_group()
        if self.size > 1:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        return code

    def _linger(self):
        """As rank 0, whose store has the reason, wait until the others have read it.

        They notice that this rank's connections close; gloo has no abort in torch 2.6.
        """
        for fd in os.listdir("/proc/self/fd") if self.rank == 0 and sys.platform == "linux" else ():
            try:
                with socket.socket(fileno=os.dup(int(fd))) as peer:
                    ports = peer.getsockname()[1], peer.getpeername()[1]
                    if peer.family != socket.AF_UNIX and self.launch.port not in ports:
                        peer.shutdown(socket.SHUT_RDWR)
            except (OSError, IndexError):  # no socket, or one without a peer
                continue
        time.sleep(0 if self.rank else 2 * HEARING)


def start(device, distribute=False, seconds=600):
    """The World of this process; `device` is a torch.device, without an index for one a rank.

    Raises LaunchError with one sentence where `distribute` is set and the launcher's variables do
    not describe a run, or the ranks do not meet within `seconds` (nodes start one after the other).
    The message is empty where another rank prints it.
    """
    if not distribute:
        check_alone()
        return World(device)
    launch = read()
    if device.index is not None:
        raise LaunchError(f"--distribute gives each rank a device of its own; leave out {device}")
    # Ctrl-C ends the process at once: Python's handlers would wait until torch's calls return.
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in {*ENDING}
                if signal.getsignal(number) != signal.SIG_IGN}  # fmt: skip
    try:
        store = _meet(launch, seconds)
        if launch.local_rank is None:
            launch = launch._replace(local_rank=_count_on_node(launch, store))
        world = World(device, launch.rank, launch.local_rank, launch.size, launch, store)
        try:
            if device.type == "cuda":
                count = torch.cuda.device_count()
                if count <= launch.local_rank and count != 1:  # a launcher may show one a rank
                    raise LaunchError(f"there are {count} GPUs on {socket.gethostname()} and a "
                                      f"local rank {launch.local_rank}: start one rank a GPU")
                world.device = torch.device("cuda", launch.local_rank % count)
                torch.cuda.set_device(world.device)
            dist.init_process_group(
                "nccl" if device.type == "cuda" else "gloo", store=store, rank=launch.rank,
                world_size=launch.size, timeout=timedelta(minutes=30),
            )  # fmt: skip
            # NCCL connects in the first message, and refuses two ranks on one GPU.
            world.all_reduce(torch.zeros((), device=world.device))
        except Exception as error:
            failure = world.failed(error)
            world._linger()
            raise LaunchError(failure.reason if failure.first else "") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return world


def _meet(launch, seconds):
    """The torch store that all the ranks of `launch` share, once all of them have come."""
    near = launch.address == "localhost" or launch.address.startswith("127.")
    seconds = min(seconds, NEAR) if near else seconds
    limit, hosts = timedelta(seconds=seconds), launch.rank == 0 and not launch.agent
    try:
        socket.getaddrinfo(launch.address, launch.port)  # torch retries a wrong name to the end
        if not hosts:
            _wait_for_rank_0(launch, seconds)
        store = dist.TCPStore(
            launch.host, launch.port, launch.size, hosts, limit, wait_for_workers=False
        )
    except (OSError, RuntimeError) as error:
        cause = str(error).strip().splitlines()[0].rpartition("message: ")[2].rstrip(".")
        if isinstance(error, socket.gaierror):
            raise LaunchError(f"MASTER_ADDR {launch.address} is no address: {cause}") from error
        if hosts:
            raise LaunchError(f"rank 0 cannot listen at MASTER_PORT {launch.port}: {cause}; export "
                              "MASTER_PORT, another one that is free") from error  # fmt: skip
        raise LaunchError(f"rank {launch.rank} finds no rank 0 at {launch.address}, port "
                          f"{launch.port}: is it running, by the same command? Export MASTER_ADDR "
                          "and MASTER_PORT if that is not its address") from error  # fmt: skip
    # Ranks of another job at the same port do not count.
    store, command = dist.PrefixStore(f"agd/{launch.job}/{launch.size}", store), sys.argv[1:]
    try:
        store.set(f"here/{launch.rank}", socket.gethostname())
        store.set(f"command/{launch.rank}", shlex.join(command))
        first = store.get("command/0").decode()
        if shlex.join(command) != first:
            store.set("all", f"rank {launch.rank} has another command than rank 0: "
                             f"{shlex.join(command)}, and not {first}")  # fmt: skip
        elif store.add("here", 1) == launch.size:
            store.set("all", "")
        store.wait(["all"], limit)
        reason = store.get("all").decode()
    except RuntimeError as error:
        if launch.rank:
            reason = "not all the ranks came; rank 0 names them"
            raise LaunchError(reason if is_first() else "") from error
        missing = [rank for rank in range(launch.size) if not store.check([f"here/{rank}"])]
        shown = f"{', '.join(map(str, missing[:8]))}{', ...' if len(missing) > 8 else ''}"
        raise LaunchError(f"{len(missing)} of {launch.size} ranks did not come: {shown}; they have "
                          "ended, or never began") from error  # fmt: skip
    if reason:
        time.sleep(0 if launch.rank else HEARING)  # the others read it in rank 0's store
        raise LaunchError(reason if is_first() else "")
    return store


def _wait_for_rank_0(launch, seconds):
    """Wait until rank 0 listens: torch's own retries may take twice as long. Raises OSError."""
    end = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((launch.address, launch.port), 5).close()
        except OSError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.1)


def _count_on_node(launch, store):
    """The number of lower ranks on this node, where the launcher has not told; a pod is a node."""
    hosts = (store.get(f"here/{rank}") for rank in range(launch.rank))
    return list(hosts).count(socket.gethostname().encode())


def fingerprint(tensors):
    """A 64-bit sum over the bits of real tensors of one device, 0-dim int64: the same for the same
    bits in any layout, another one if an element differs."""
    total = torch.zeros((), dtype=torch.int64)
    for x in tensors:
        total = total * 31 + x.detach().view(INTEGERS[x.element_size()]).sum(dtype=torch.int64)
    return total
