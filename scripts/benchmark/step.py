"""Time and memory of an optimiser's step beside torch's: cases `step` and `spectral`."""

import itertools
import json
import tempfile
from functools import partial
from pathlib import Path

import torch
import torchvision

from agd import AGD, SpectralAGD
from architecture import build
from scripts.benchmark.measure import by_clock, by_graph, compared, note, take_turns

CIFAR, IMAGENET = ((3, 32, 32), 10), ((3, 224, 224), 1000)
NETS = {
    "FCN 10×256, CIFAR-10": ("fcn", *CIFAR), "ResNet-18, CIFAR-10": ("resnet18", *CIFAR),
    "ResNet-50, ImageNet": ("resnet50", *IMAGENET), "ResNet-18, ImageNet": ("resnet18", *IMAGENET),
    "ResNet-50, CIFAR-10": ("resnet50", *CIFAR),
}  # fmt: skip
STOCK = {  # as their libraries make them, with biases, norms and embeddings: AGD(net)
    "GPT-2 small": lambda: gpt2(),
    "ResNet-50, torchvision": lambda: torchvision.models.resnet50(),
}
YARDSTICK, PLAIN, ADAMW = "SGD, fused", "AGD, fused=False", "AdamW, fused"
GRAPH = " as a CUDA graph"
SGD = torch.optim.SGD
KINDS = {"SGD": SGD, "SGD with momentum": partial(SGD, momentum=0.9), "AdamW": torch.optim.AdamW}
RATE = 1e-8  # the peers': it changes no time, and they share their weights


def gpt2():
    """The parameters of GPT-2's 124 million, in a network that is never called."""
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, norm_first=True)
    return torch.nn.ModuleDict({
        "tokens": torch.nn.Embedding(50257, 768), "positions": torch.nn.Embedding(1024, 768),
        "layers": torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False),
        "norm": torch.nn.LayerNorm(768),
    })  # fmt: skip


def network(name, device):
    return (STOCK[name]() if name in STOCK else build(*NETS[name])).to(device)


def with_gradients(net):
    """The weights of a network, with random gradients of a usual size."""
    torch.manual_seed(0)
    for p in (weights := list(net.parameters())):
        p.grad = torch.randn_like(p) * 1e-3
    return weights


def peers(weights, net=None):
    """{name: optimiser} of the same weights; Muon takes matrices alone. AGD takes a stock network,
    if one is given, as a whole; there fused SGD and AdamW alone are its peers, because the memory
    of all of them would be several GB."""
    whole = {"depth": 6.71} if net else {}
    made = {"AGD": AGD(net or weights, **whole), PLAIN: AGD(net or weights, fused=False, **whole)}
    for (kind, make), form in itertools.product(KINDS.items(), ("fused", "foreach")):
        name = f"{kind}, {form}"
        if not net or name in (YARDSTICK, ADAMW):
            made[name] = make(weights, lr=RATE, **{form: True})
    # Fused, it counts its steps on the device either way, and a CUDA graph can hold it.
    made[ADAMW].param_groups[0]["capturable"] = weights[0].device.type == "cuda"
    if hasattr(torch.optim, "Muon") and all(p.ndim == 2 for p in weights):
        made["Muon"] = torch.optim.Muon(weights, lr=RATE)
    return made


def held(step, device):
    """(most, left): bytes that a step holds beyond those before it, at its peak and at its end."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        after = torch.cuda.max_memory_allocated(device), torch.cuda.memory_allocated(device)
        return tuple(x - before for x in after)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((x for x in events if x.get("name") == "[memory]"), key=lambda x: x["ts"])
    # Bytes are negative where memory is given back.
    sums = [0, *itertools.accumulate(x["args"]["Bytes"] for x in events)]
    return max(sums), sums[-1]


def memory(weights, optimizers, device):
    """Bytes of the weights, and of what each fresh optimiser keeps from its first step on, and
    needs beside that during the second."""
    kept = {name: held(x.step, device)[1] for name, x in optimizers.items()}
    return {"largest weight": max(p.nbytes for p in weights),
            "weights": sum(p.nbytes for p in weights),
            "scratch": {name: held(x.step, device)[0] for name, x in optimizers.items()},
            "kept": kept}  # fmt: skip


def compare(works, args, device, say, against=YARDSTICK, warm=17, graphed=()):
    """{"ratios", "quartiles", "seconds"} of {name: function} by the clock, launches included; on a
    GPU those of `graphed` as CUDA graphs too. AGD looks into the gradients of its first 16 steps.
    """
    timers, result = {"": (by_clock(device, args.clock), works)}, {}
    if graphed and device.type == "cuda":
        timers[GRAPH] = by_graph(device), {name: works[name] for name in graphed}
    for where, (timer, works) in timers.items():
        note(f"{say}, {args.repeats} rounds{where}")
        pairs = [(name, against) for name in works if name != against]
        times = compared(take_turns(works, args.repeats, timer, warm), pairs, "{}")
        result |= {f"{key}{where}": times[key] for key in times}
    return result


def case(args, device):
    result, memories = {}, {}
    names = [*NETS, *STOCK][: args.nets or (2 if args.quick else None)]
    for name, form in itertools.product(names, ("", ", channels_last")):
        net = network(name, device)
        if form and (name in STOCK or all(p.ndim == 2 for p in net.parameters())):
            continue
        net = net.to(memory_format=torch.channels_last) if form else net
        weights, whole = with_gradients(net), net if name in STOCK else None
        optimizers = peers(weights, whole)
        graphed = [k for k, x in optimizers.items() if x.param_groups[0].get("capturable", True)]
        times = compare({k: x.step for k, x in optimizers.items()}, args, device, f"{name}{form}",
                        graphed=graphed)  # fmt: skip
        for key, values in times.items():
            result.setdefault(key, {})[f"{name}{form}"] = values
        if not form:
            memories[name] = memory(weights, peers(weights, whole), device)
    return {**result, "ratios are to": YARDSTICK, "memory in bytes": memories}


def spectral_works(net):
    """{name: function} that takes a step of each peer of SpectralAGD. Muon takes matrices, and
    AdamW the rest."""
    weights = list(net.parameters())
    matrices = [p for p in weights if p.ndim == 2]
    depth = float(max(1, sum(p.ndim > 1 for p in weights)))
    made = {"SpectralAGD": [SpectralAGD(net, depth=depth)], "AGD": [AGD(net, depth=depth)],
            ADAMW: [torch.optim.AdamW(weights, lr=RATE, fused=True)]}  # fmt: skip
    if hasattr(torch.optim, "Muon") and len(matrices) > 1:
        rest = [p for p in weights if p.ndim != 2]
        made["Muon"] = [torch.optim.Muon(matrices, lr=RATE)]
        made["Muon"] += [torch.optim.AdamW(rest, lr=RATE, fused=True)] if rest else []
    return {k: lambda xs=xs: [x.step() for x in xs] for k, xs in made.items()}


def spectral(args, device):
    """Steps of SpectralAGD beside its peers', with one thread and two."""
    names = [*list(NETS)[:3], "GPT-2 small"][: args.nets or (1 if args.quick else None)]
    threads, result = [1] if device.type == "cuda" or args.quick else [1, 2], {}
    for count, name in itertools.product(threads, names):
        torch.set_num_threads(count)
        net, label = network(name, device), f"{name}, {count} thread{'s' * (count > 1)}"
        with_gradients(net)
        times = compare(spectral_works(net), args, device, label, ADAMW, warm=3)
        for key, values in times.items():
            result.setdefault(key, {})[label] = values
    return {**result, "ratios are to": ADAMW}
