"""What a step of data-parallel training costs: the inputs with their sources, and the model.

Times in seconds, sizes in bytes, bandwidths in GB/s (1e9 bytes a second). `scripts.scaling` makes
the tables of docs/scaling.md from it, `scripts.links` measures its terms.
"""

import math
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from agd import AGD
from architecture import build

DLE = "NVIDIA/DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5/README.md"
NCCL = "NVIDIA/nccl, src/graph/tuning.cc at 01afd20"
HGX = "github.com/NVIDIA/nccl-tests/issues/212"

# name: (value, unit, where it comes from). "assumed" is a guess that a measurement should replace.
INPUTS = {
    "rate, TF32": (938, "images/s", f"published, one A100 80GB, batch 256, SGD: {DLE}"),
    "rate, mixed": (2470, "images/s", "published, the same table"),
    "8 GPUs, TF32": (7248, "images/s", "published, the same table, one DGX A100"),
    "8 GPUs, mixed": (16621, "images/s", "published, the same table, one DGX A100"),
    "rate_batch": (256, "images", "published: configs.yml in the folder above, DGXA100"),
    "launch": (20e-6, "s a kernel",
               "assumed; the batch-1 forward pass published there, 10.4 ms (V100), gives 46e-6"),
    "backward": (2 / 3, "of compute", "assumed: twice the forward pass, as the FLOPs are"),
    "memory": (2039, "GB/s", "A100 80GB: 5,120 bits at 1,593 MHz, twice a clock, as deviceQuery "
               "prints: gist.github.com/gengwg/3520df2ebf8872e5ee4818367e3a4122"),
    "gpus_per_node": (8, "", "DGX A100"),
    "node_link": (235, "GB/s", f"NCCL's own limit for A100 over NVLink 3 (line rate 300): {NCCL}"),
    "inter_share": (0.8, "of line rate",
                    f"assumed, the protocol's share that NCCL's author names for NVLink: {HGX}"),
    "latency_base": (8.4e-6, "s", "ring, protocol Simple: the same file"),
    "latency_node": (3.4e-6, "s a step", "the same over NVLink"),
    "latency_inter": (9.6e-6, "s a step", "the same over the network"),
    "decode": (630, "images/s a core", "measured: results/benchmark/links.json, 256-pixel files, "
               "one core of a busy AMD EPYC (up to 980 when it was quiet)"),
    "file": (147.8e9 / 1281167, "bytes", "ILSVRC2012_img_train.tar, 147.8 GB in four parts: "
             "huggingface.co/datasets/presencesw/ILSVRC2012/tree/main; 1,281,167 images"),
    "file_256": (17446, "bytes", "measured: links.json, the mean of 1,000 files, shorter side 256"),
}  # fmt: skip
# Line rates of a node, GB/s: Gb/s by eight, times the adapters.
LINKS = {
    # DGX H100: docs.nvidia.com/dgx-basepod/reference-architecture-infrastructure-foundation-
    # enterprise-ai/latest/core-components.html; DGX A100: its data sheet, "8x Single-Port Mellanox
    # ConnectX-6 VPI 200Gb/s HDR InfiniBand".
    "8 × NDR 400": 400.0,
    "8 × HDR 200": 200.0,
    "1 × HDR 200": 25.0,
    "100 GbE": 12.5,
    "25 GbE": 3.125,
}
IMAGES = 1281167  # an epoch of ImageNet
LARGEST = 256  # images of a micro-batch; larger batches a GPU are made of several
FIRST_BUCKET, BUCKET = 1 << 20, 25 << 20  # bytes; DistributedDataParallel's defaults
SMALL = 1  # further collectives a step: the count of examples


def known(name):
    return INPUTS[name][0]


class _Kernels(TorchDispatchMode):
    """Counts what is not a view: the calls, and the bytes that they read and write."""

    calls = traffic = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if read and not func.is_view and "empty" not in str(func):
            wrote = [x for x in tree_leaves(out if out is not None else args[0])
                     if isinstance(x, torch.Tensor)]  # fmt: skip
            self.calls += 1
            self.traffic += sum(x.nbytes for x in read + wrote)
        return out


@dataclass
class Network:
    """Counts of a network: `sizes` in bytes and `flops` of a forward pass of each weight, both for
    one image, in the order of the forward pass; `launches` of kernels in a step of AGD's training;
    `traffic`, the bytes that AGD's step reads and writes."""

    sizes: list
    flops: list
    launches: int
    traffic: int


def network(arch, image_size, classes=1000, **shape):
    """The Network of architecture/ for colour images, counted without data (device meta)."""
    with torch.device("meta"):
        net = build(arch, (3, image_size, image_size), classes, **shape)
        x = torch.empty(1, 3, image_size, image_size)
    used = []  # (weight, FLOPs) as the forward pass meets them

    def note(module, inputs, output):
        places = output.numel() // output.shape[1]  # one multiply-add a weight and place
        used.append((module.weight, 2 * places * module.weight.numel()))

    for module in net.modules():
        if getattr(module, "weight", None) is not None:
            module.register_forward_hook(note)
    with _Kernels() as passes:
        net(x).sum().backward()
    optimizer = AGD(net.parameters())
    with _Kernels() as step:
        optimizer.step()
    sizes = [4 * weight.numel() for weight, _ in used]
    return Network(sizes, [n for _, n in used], passes.calls + step.calls, step.traffic)


def buckets(net):
    """[(bytes, fraction of the backward pass after which it is ready)], first to last.

    As DistributedDataParallel fills them: from the last layer on, a bucket closes once it has
    reached its limit, 1 MiB for the first and 25 MiB for the others.
    """
    found, size, done, limit = [], 0, 0, FIRST_BUCKET
    for n, flops in zip(reversed(net.sizes), reversed(net.flops)):
        size, done = size + n, done + flops
        if size >= limit:
            found.append((size, done / sum(net.flops)))
            size, limit = 0, BUCKET
    return found + ([(size, 1.0)] if size else [])


@dataclass
class Cluster:
    """GB/s that a collective reaches: `node_link` a GPU inside a node, `inter_link` a node."""

    inter_link: float
    node_link: float = known("node_link")
    gpus_per_node: int = known("gpus_per_node")
    latency_base: float = known("latency_base")
    latency_node: float = known("latency_node")
    latency_inter: float = known("latency_inter")

    def shape(self, n):
        """(GPUs a node, nodes) of n GPUs."""
        return min(n, self.gpus_per_node), math.ceil(n / self.gpus_per_node)

    def ring(self, size, n):
        """Seconds of a ring through all GPUs: each sends 2 (n-1)/n of the bytes, in 2 (n-1) steps,
        of which 2 (nodes-1) leave a node."""
        if n == 1:
            return 0.0
        _, nodes = self.shape(n)
        link = self.node_link if nodes == 1 else min(self.node_link, self.inter_link)
        far = 2 * (nodes - 1)
        wait = (2 * (n - 1) - far) * self.latency_node + far * self.latency_inter
        return self.latency_base + wait + 2 * (n - 1) / n * size / (link * 1e9)

    def hierarchical(self, size, n):
        """Seconds of a reduce-scatter inside the nodes, an all-reduce of the pieces between them by
        recursive halving and doubling, and an all-gather inside."""
        if n == 1:
            return 0.0
        g, nodes = self.shape(n)
        wait = 2 * (g - 1) * self.latency_node
        wait += 2 * math.ceil(math.log2(nodes)) * self.latency_inter
        inside = 2 * (g - 1) / g * size / (self.node_link * 1e9)
        between = 2 * (nodes - 1) / nodes * size / (self.inter_link * 1e9)
        return self.latency_base + wait + inside + between

    def all_reduce(self, size, n):
        """The quicker of the two, as NCCL chooses by size and number."""
        return min(self.ring(size, n), self.hierarchical(size, n))


@dataclass
class Work:
    """What a GPU does in a step: t(b) = t0 + b / rate for b images, then `update`, seconds."""

    net: Network
    t0: float
    rate: float
    update: float

    @classmethod
    def at(cls, net, images_per_second, batch):
        """From one rate at one batch; t0 is the launches' assumed time."""
        t0 = net.launches * known("launch")
        whole = batch / images_per_second
        if t0 >= whole:
            raise ValueError(f"{images_per_second} images/s at {batch} leave no time for launches")
        return cls(net, t0, batch / (whole - t0), net.traffic / (known("memory") * 1e9))

    @classmethod
    def fitted(cls, net, rates):
        """From {batch: images/s} of whole steps, by least squares."""
        x, y = list(rates), [batch / rate for batch, rate in rates.items()]
        mx, my = sum(x) / len(x), sum(y) / len(y)
        slope = sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)
        return cls(net, max(0.0, my - slope * mx), 1 / slope, 0.0)


@dataclass
class Step:
    compute: float  # forward, backward and update
    communication: float  # all of it
    exposed: float  # what of it the backward pass does not hide
    total: float


def step(work, cluster, n, batch, micro=1, overlap=True, small=SMALL):
    """The Step of n GPUs with `batch` images each, as `micro` micro-batches that communicate once.

    With `overlap` a bucket sets out as soon as the last micro-batch's backward pass has filled it
    and the one before has arrived; the last one is ready when there is nothing left to hide it.
    """
    passes = micro * work.t0 + batch / work.rate
    small = small * cluster.all_reduce(4, n)
    backward = known("backward") * passes / micro
    costs = [(cluster.all_reduce(size, n), ready) for size, ready in buckets(work.net)]
    total = sum(cost for cost, _ in costs)
    arrived = 0.0
    for cost, ready in costs:
        arrived = max(arrived, ready * backward) + cost
    hidden = backward if overlap and n > 1 else 0.0
    exposed = small + (arrived - hidden if hidden else total)
    compute = passes + work.update
    return Step(compute, total + small, exposed, compute + exposed)
