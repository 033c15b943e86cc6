"""Check what a run would take: the network, memory for a batch, seconds an epoch."""

import math
import time

import torch

import flags
from architecture import build, is_library, sample
from architecture.weights import start
from check.surroundings import Fault
from cli import size
from data.workers import usable_cores
from training.gradient import Gradient, OutOfMemory
from training.losses import LOSSES
from training.memory import bytes_free, does_not_fit, is_out_of_memory
from training.optimizers import make_optimizer
from training.precision import set_channels_last, set_precision
from training.schedule import make_schedule

TIMING = 2.0  # seconds of passes and steps


def network(args, shape, classes):
    """The network, on the meta device, which the optimiser takes."""
    # Of a library or a file, and where AGD measures, it takes numbers.
    of_numbers = is_library(args.arch) or args.weights is not None or args.layers is not None
    try:
        with torch.device("cpu" if of_numbers or args.optimizer == "spectral" else "meta"):
            net = make_network(args, shape, classes)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        with torch.device("meta"):
            net = make_network(args, shape, classes)
        raise Fault(does_not_fit(error, net)) from error
    try:
        make(args, net, shape)
    except (TypeError, ValueError) as error:
        raise Fault(f"the optimiser refuses the network: {error}") from error
    numbers, layers = (sum(x) for x in zip(*((p.numel(), p.ndim > 1) for p in net.parameters())))
    yield "ok", f"{args.arch}, {numbers:,} weights in {layers} layers; {args.optimizer} takes them"
    return net.to("meta")


def make_network(args, shape, classes):
    """The network that the flags describe."""
    net = build(args.arch, shape, classes, **flags.network(args))
    start(net, args.weights, args.freeze)
    flags.check_network(args, net)
    return net


def make(args, net, shape):
    """The optimiser that the flags describe, without drawing weights."""
    return make_optimizer(
        args.optimizer, net, shape, lr=args.lr, weight_decay=args.weight_decay, gain=args.gain,
        layers=flags.layers(args), drawn=flags.drawn(args),
    )  # fmt: skip


def memory(args, world, neighbours, net, facts):
    """Whether the weights and a batch fit in free memory."""
    share = -(-args.train_bs // world.size)
    largest = -(-share // -(-share // min(args.micro_bs or share, share)))
    try:
        each = bytes_an_image(net, args.loss, facts.shape)
    except Exception as error:
        if not is_library(args.arch):
            raise
        yield "note", f"the memory of a batch of {args.arch} cannot be estimated: {error}"
        return
    # The weights, their gradients, and the two scratch copies of a step or a baseline's state, or
    # the spectral rule's state and its directions; and the buffers of the ranks' messages.
    spectral, cuda = args.optimizer == "spectral", world.device.type == "cuda"
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    fixed = weights * (4 + spectral + (1 + spectral if world.size > 1 else 0))
    noun = facts.data.noun
    if facts.decoding is None and noun == "image":
        channels, height, width = facts.shape
        fixed += (facts.train + facts.test) * channels * (height + 8) * (width + 8)
    free, neighbours = bytes_free(world.device), 1 if cuda else neighbours
    need = (fixed + each * largest) * neighbours
    images = f"{largest} {noun}{'s' if largest > 1 else ''} at a time"
    images += f" on each of {neighbours} ranks here" if neighbours > 1 else ""
    text = f"{size(need)} for {images}"
    text += f", of {size(free)} that are free" if free < math.inf else ""
    if need <= free:
        yield "ok", text
    elif (fits := int((free / neighbours - fixed) // each)) < 1:
        smaller = "images" if noun == "image" else "--context"
        raise Fault(f"{text}: not even one {noun} fits beside the weights; a smaller network or "
                    f"{smaller}, or a device with more memory")  # fmt: skip
    elif cuda:
        yield "note", f"{text}: the run would halve until about {fits} fit; --micro_bs says so"
    else:
        raise Fault(f"{text}: --micro_bs {fits}")


def bytes_an_image(net, loss, shape):
    """Bytes that the backward pass keeps of an image, counted on the meta device."""
    weights = {p.untyped_storage()._cdata for p in net.parameters()}

    def kept(images):
        seen, alive = {}, []

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in weights and tensor.ndim:
                seen[storage._cdata] = storage.nbytes()
                alive.append(tensor)  # so that no other takes its place
            return tensor

        with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            outputs = net.train()(sample(shape, count=images))
            LOSSES[loss](outputs, labels(images, shape)).sum()
        return sum(seen.values())

    return max(kept(4) - kept(2), 2) / 2 * 1.25  # and what is passing through


def labels(count, shape, device=None):
    """Labels of `count` examples: of a text one for each of its tokens."""
    tokens = shape if len(shape) == 1 else ()
    return torch.zeros(count, *tokens, dtype=torch.int64, device=device)


def seconds_an_epoch(args, world, facts):
    """Time passes and steps on the device, and estimate an epoch from them."""
    device, share = world.device, -(-args.train_bs // world.size)
    largest = min(share, args.micro_bs or share)
    net = make_network(args, facts.shape, facts.classes).to(device)
    set_precision(net, args.precision, device)
    set_channels_last(net, args.channels_last, args.precision, device)
    optimizer = make(args, net.train(), facts.shape)
    make_schedule(args.schedule, optimizer, args.epochs * len(facts.data.train), args.warmup)
    gradient = Gradient(net, LOSSES[args.loss])
    images, end, times = min(2, share), time.perf_counter() + TIMING, []

    def now():
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    while True:
        inputs, wanted = sample(facts.shape, device, images), labels(images, facts.shape, device)
        if inputs.is_floating_point():
            inputs.normal_()
        began = now()
        try:
            gradient(inputs, wanted)
        except OutOfMemory as error:
            raise Fault(f"{error}: a device with more memory") from error
        passed = now()
        optimizer.step()
        times.append((passed - began, now() - passed))
        optimizer.zero_grad()
        larger = min(largest, images * 4)
        if end - time.perf_counter() < sum(times[-1]) * (4 if larger > images else 1):
            break
        if larger > images:
            images, times = larger, []
    passes, step = (min(column) for column in zip(*times))  # others only slow it down
    steps = -(-facts.train // args.train_bs)
    # A test image takes a forward pass, a third of the two.
    compute = (facts.train + facts.test / 3) / world.size * passes / images + steps * step
    text = f"about {duration(compute)} an epoch on this device"
    if facts.decoding is not None:
        rate = facts.decoding * max(1, min(args.workers, usable_cores()))
        decode = (facts.train + facts.test) / world.size / rate
        text += f", {duration(decode)} to decode its images"
    yield "ok", f"{text}; {args.epochs} epochs"


def duration(seconds):
    """Seconds in words."""
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
