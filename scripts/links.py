"""Measures the terms of scripts/costs.py where it runs: `python -m scripts.scaling --measure`.

As many ranks as there are GPUs (NCCL), or two processes of one thread each (gloo).
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from agd import AGD, init_weights
from architecture import build
from data.folders import FolderBatches
from runs.provenance import environment
from scripts.costs import Cluster, Work, network, step

SMALL_NET = {"arch": "fcn", "image_size": 32, "classes": 10, "depth": 10, "width": 1024}


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_times(works, device, repeats=15, together=False):
    """Seconds of each of `works`, functions that take turns: medians of `repeats` after two that do
    not count. With `together` all ranks start each at once."""
    seconds = [[] for _ in works]
    for _ in range(repeats + 2):
        for work, times in zip(works, seconds):
            if together:
                dist.barrier()
            synchronise(device)
            start = time.perf_counter()
            work()
            synchronise(device)
            times.append(time.perf_counter() - start)
    return [statistics.median(times[2:]) for times in seconds]


def passes(net, shape, classes, batch, device, optimizer=None):
    """A function: one forward and backward pass, and a step where there is an optimiser."""
    x = torch.randn(batch, *shape, device=device)
    labels = torch.randint(classes, (batch,), device=device)

    def once():
        torch.nn.functional.cross_entropy(net(x), labels).backward()
        if optimizer is not None:
            optimizer.step()
        net.zero_grad()

    return once


def rates(arch, image_size, batches, device, classes=1000):
    """{batch: images a second} of forward, backward and AGD's step, as far as memory goes."""
    torch.manual_seed(0)
    net = build(arch, (3, image_size, image_size), classes).to(device)
    init_weights(net.parameters(), torch.Generator().manual_seed(0))
    optimizer, found = AGD(net.parameters()), {}
    for batch in batches:
        try:
            once = passes(net, (3, image_size, image_size), classes, batch, device, optimizer)
            found[batch] = batch / median_times([once], device)[0]
        except torch.OutOfMemoryError:
            break
    return found


def decoding(folder):
    """Images that a core decodes, crops and flips in a second, and the mean size of a file."""
    torch.set_num_threads(1)
    batches = FolderBatches(folder, 50, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), "cpu",
                            train=True)  # fmt: skip
    seconds = []
    for epoch in range(4):  # the first one fills the page cache
        batches.set_epoch(epoch)
        start = time.process_time()  # of this process alone, whatever else the machine does
        for _ in batches:
            pass
        seconds.append(time.process_time() - start)
    paths = [path for path, _ in batches.loader.dataset.samples]
    return {
        "images_per_second_per_core": batches.examples / statistics.median(seconds[1:]),
        "bytes_per_file": statistics.mean(os.path.getsize(path) for path in paths),
    }


def _rank(rank, size, store, out, args):
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group("nccl" if gpu else "gloo", init_method=f"file://{store}", rank=rank,
                            world_size=size)  # fmt: skip
    gradient = sum(network(args["arch"], args["image_size"]).sizes)
    found = {"environment": environment(device), "backend": dist.get_backend(), "ranks": size}
    shape = {k: v for k, v in SMALL_NET.items() if k in ("depth", "width")}
    net = build("fcn", (3, 32, 32), 10, **shape).to(device)
    batch = args["batch"]
    if rank == 0:  # the others wait at the barrier
        (found["alone"],) = median_times([passes(net, (3, 32, 32), 10, batch, device)], device)
    wrapped = torch.nn.parallel.DistributedDataParallel(
        build("fcn", (3, 32, 32), 10, **shape).to(device), device_ids=[rank] if gpu else None
    )
    works = [passes(x, (3, 32, 32), 10, batch, device) for x in (net, wrapped)]
    sizes = (4, 1 << 20, 25 << 20, gradient)
    for x in (torch.zeros(size // 4, device=device) for size in sizes):
        works.append(lambda x=x: dist.all_reduce(x))
    seconds = median_times(works, device, together=True)
    found["together"], found["distributed"], *reductions = seconds
    found["all_reduce"] = dict(zip(sizes, reductions))
    if rank == 0 and gpu:
        found["rates"] = rates(args["arch"], args["image_size"], args["batches"], device)
    dist.barrier()
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(arch, image_size, batches, batch=128, images=None):
    """What was measured, a dict for JSON, with the model's prediction for the small network."""
    decoded = None if images is None else decoding(images)  # first: it ends at once where it must
    size = torch.cuda.device_count() if torch.cuda.is_available() else 2
    args = {"arch": arch, "image_size": image_size, "batches": batches, "batch": batch}
    with tempfile.TemporaryDirectory() as folder:
        out = os.path.join(folder, "found")
        mp.spawn(_rank, (size, os.path.join(folder, "store"), out, args), nprocs=size)
        found = json.loads(Path(out).read_text())
    if size > 1:
        found["small network"] = {**SMALL_NET, "batch": batch, **predict(found)}
    if decoded is not None:
        found["decoding"] = decoded
    return found


def cluster(found, inter_link=float("inf")):
    """The Cluster whose node is the measured ranks: latency from the least all-reduce, bandwidth
    from the largest."""
    n = found["ranks"]
    times = {int(k): v for k, v in found["all_reduce"].items()}
    least, most = min(times), max(times)
    link = 2 * (n - 1) / n * (most - least) / (times[most] - times[least]) / 1e9
    return Cluster(inter_link, link, n, times[least], 0.0)


def predict(found):
    """Seconds of the small network's step with communication, overlapped and not, beside what was
    measured; compute as measured with all ranks at work and no communication."""
    work = Work(network(**SMALL_NET), found["together"], float("inf"), 0.0)
    n, links = found["ranks"], cluster(found)
    return {
        "predicted, overlapped": step(work, links, n, 1, small=0).total,
        "predicted, not overlapped": step(work, links, n, 1, overlap=False, small=0).total,
        "measured": found["distributed"],
    }
