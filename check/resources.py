"""What a run would take: the network, memory for a batch, seconds an epoch."""

import sys
import time
from pathlib import Path

import torch

import flags
from architecture import build, is_library
from architecture.weights import start
from check.common import Fault, duration, size
from data.workers import usable_cores
from training.gradient import Gradient, OutOfMemory
from training.losses import LOSSES
from training.optimizers import make_optimizer
from training.precision import set_channels_last, set_precision

TIMING = 2.0  # seconds of passes and steps


def network(args, shape, classes):
    """The network, on a device that computes nothing."""
    # Of a library or a file, and where AGD measures, it takes numbers.
    of_numbers = is_library(args.arch) or args.weights is not None or args.layers is not None
    of_numbers = of_numbers or args.optimizer == "spectral"
    with torch.device("cpu" if of_numbers else "meta"):
        net = made(args, shape, classes)
    try:
        optimizer_of(args, net, shape)
    except (TypeError, ValueError) as error:
        raise Fault(f"the optimiser refuses the network: {error}") from error
    weights = list(net.parameters())
    layers = sum(p.ndim > 1 for p in weights)
    yield "ok", (f"{args.arch}, {sum(p.numel() for p in weights):,} weights in {layers} layers, "
                 f"which {args.optimizer} takes")  # fmt: skip
    return net.to("meta")


def made(args, shape, classes):
    """The network that the flags describe."""
    net = build(args.arch, shape, classes, args.depth, args.width, args.bias, args.affine)
    start(net, args.weights, args.freeze)
    return net


def optimizer_of(args, net, shape):
    """The optimiser that the flags describe; the weights are not drawn."""
    return make_optimizer(
        args.optimizer, net, shape, lr=args.lr, gain=args.gain, layers=flags.layers(args),
        drawn=not is_library(args.arch) and args.weights is None,
    )  # fmt: skip


def memory(args, world, neighbours, net, facts):
    """What the weights and a batch take, against what is free."""
    share = -(-args.train_bs // world.size)
    passes = -(-share // min(args.micro_bs or share, share))
    largest = -(-share // passes)
    try:
        each = bytes_an_image(net, args.loss, facts.shape)
    except Exception as error:
        if not is_library(args.arch):
            raise
        yield "note", f"what a batch takes cannot be told of {args.arch}: {error}"
        return
    # The weights, their gradients, and the two scratch copies of a step or a baseline's state, or
    # what the spectral rule keeps and its directions; and what the ranks send.
    spectral = args.optimizer == "spectral"
    sent = (2 if spectral else 1) if world.size > 1 else 0
    fixed = weights_bytes(net) * (2 + (3 if spectral else 2) + sent)
    if facts.decoding is None:
        channels, height, width = facts.shape
        fixed += (facts.train + facts.test) * channels * (height + 8) * (width + 8)
    free = free_memory(world.device)
    if world.device.type == "cuda":
        neighbours = 1
    need = (fixed + each * largest) * neighbours
    images = f"{largest} image{'s' if largest > 1 else ''} at a time"
    images += f" on each of {neighbours} ranks here" if neighbours > 1 else ""
    text = f"{size(need)} for {images}, of {size(free)} that are free"
    if need <= free:
        yield "ok", text
        return
    fits = int((free / neighbours - fixed) // each)
    if fits < 1:
        raise Fault(f"{text}: not even one image fits beside the weights; a smaller network or "
                    "images, or a device with more memory")  # fmt: skip
    if world.device.type == "cuda":
        yield "note", f"{text}: the run would halve until about {fits} fit; --micro_bs says so"
    else:
        raise Fault(f"{text}: --micro_bs {fits}")


def bytes_an_image(net, loss, shape):
    """What the backward pass keeps of an image, counted on a device that computes nothing."""
    weights = {p.untyped_storage()._cdata for p in net.parameters()}

    def kept(images):
        seen = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights and tensor.ndim:
                seen[storage._cdata] = storage.nbytes()
                alive.append(tensor)  # so that no other takes its place
            return tensor

        alive = []
        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = net.train()(torch.empty(images, *shape))
            LOSSES[loss](outputs, torch.empty(images, dtype=torch.int64)).sum()
        return sum(seen.values())

    return max(kept(4) - kept(2), 2) / 2 * 1.25  # and what is passing through


def free_memory(device):
    """Bytes free on a GPU, or to all the processes of this machine, container or job."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = sys.maxsize
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":") for line in file)
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    return min([free, *_group_limits()])


def _group_limits(root="/sys/fs/cgroup", groups="/proc/self/cgroup"):
    """Bytes that the control groups of this process leave it, as SLURM and containers set them, in
    their second version and in their first; what the system only keeps for reading is free."""
    try:
        lines = [x.split(":", 2) for x in Path(groups).read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    for number, kinds, path in lines:
        if number == "0":
            top, names = Path(root), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            top = Path(root, "memory")
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        at = Path(top, path.strip("/"))
        while at == top or top in at.parents:
            try:
                most, now = (int((at / name).read_text()) for name in names[:2])
                stat = dict(x.split() for x in (at / "memory.stat").read_text().splitlines())
                yield most - now + int(stat.get(names[2], 0))
            except (OSError, ValueError):  # no group here, or no limit: "max"
                pass
            at = at.parent


def seconds_an_epoch(args, world, facts):
    """Passes and steps on the device, timed, and what they make of an epoch."""
    device, share = world.device, -(-args.train_bs // world.size)
    net = made(args, facts.shape, facts.classes).to(device)
    set_precision(net, args.precision, device)
    set_channels_last(net, args.channels_last, args.precision, device)
    optimizer = optimizer_of(args, net.train(), facts.shape)
    gradient = Gradient(net, LOSSES[args.loss])
    images, end, times = min(2, share), time.perf_counter() + TIMING, []

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    while True:
        inputs = torch.randn(images, *facts.shape, device=device)
        labels = torch.zeros(images, dtype=torch.int64, device=device)
        start = now()
        try:
            gradient(inputs, labels)
        except OutOfMemory as error:
            raise Fault(f"{error}: a device with more memory") from error
        passed = now()
        optimizer.step()
        times.append((passed - start, now() - passed))
        optimizer.zero_grad()
        larger = min(share, args.micro_bs or share, images * 4)
        left = end - time.perf_counter()
        if left < sum(times[-1]) * (4 if larger > images else 1):
            break
        if larger > images:
            images, times = larger, []
    # The quickest: others disturb it only one way.
    passes, step = (min(column) for column in zip(*times))
    each, steps = passes / images, -(-facts.train // args.train_bs)
    # A test image takes a forward pass, a third of the two.
    compute = (facts.train + facts.test / 3) / world.size * each + steps * step
    text = f"about {duration(compute)} an epoch on this device"
    if facts.decoding is not None:
        rate = facts.decoding * max(1, min(args.workers, usable_cores()))
        decode = (facts.train + facts.test) / world.size / rate
        text += f", {duration(decode)} to decode its images"
    yield "ok", f"{text}; {args.epochs} epochs"


def weights_bytes(net):
    return sum(p.numel() * p.element_size() for p in net.parameters())
