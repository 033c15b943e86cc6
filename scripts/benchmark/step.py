"""Time and memory of an optimiser's step beside torch's: cases `step` and `spectral`."""

import itertools
import json
import math
import tempfile
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import agd
from agd import AGD, SpectralAGD
from architecture import build
from check.resources import free_memory
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
GRAPH, GROWING = " as a CUDA graph", ("AGD", YARDSTICK, ADAMW)
SGD = torch.optim.SGD
KINDS = {"SGD": SGD, "SGD with momentum": partial(SGD, momentum=0.9), "AdamW": torch.optim.AdamW}
MATRICES = 10  # of the weights that grow
RATE = 1e-8  # the peers': it changes no time, and they share their weights
BYTES = {"AGD": 16, YARDSTICK: 12}  # that a step moves, of each float32 weight
PIECES = ((16, 128, 256), (2, 128, 3072), (24, 64, 576), (36, 128, 768))  # number, rows, columns
SIDE, BATCHES = 1024, (128, 1024)  # of the matrix product that stands for the machine; whole steps


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
    """{name: optimiser} of the same weights. AGD takes the network as a whole, where one is given;
    Muon takes matrices alone."""
    whole = {} if net is None else {"depth": 6.71}
    made = {"AGD": AGD(net or weights, **whole), PLAIN: AGD(net or weights, fused=False, **whole)}
    for (kind, make), form in itertools.product(KINDS.items(), ("fused", "foreach")):
        made[f"{kind}, {form}"] = make(weights, lr=RATE, **{form: True})
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
    now = most = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]  # negative where memory is given back
        most = max(most, now)
    return most, now


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
        told = compared(take_turns(works, args.repeats, timer, warm), pairs, "{}")
        result |= {f"{key}{where}": told[key] for key in told}
    return result


def steps(optimizers, args, device, say):
    graphed = [k for k, x in optimizers.items() if x.param_groups[0].get("capturable", True)]
    return compare({k: x.step for k, x in optimizers.items()}, args, device, say, graphed=graphed)


def growth(args, device):
    """Seconds against the number of weights, as far as memory goes."""
    result = {"weights": [], "ratios": [], "seconds": {name: [] for name in GROWING}}
    for size in [1e5, 1e6] if args.quick else [10 ** (k / 2) for k in range(10, 17)]:
        side, where = round(math.sqrt(size / MATRICES)), GRAPH if device.type == "cuda" else ""
        if free_memory(device) < 8 * 4 * size:  # weights, gradients, AdamW's two, scratch
            note(f"{size:.0e} weights: left out, too little memory")
            break
        net = torch.nn.ParameterList(torch.randn(side, side, device=device) / side
                                     for _ in range(MATRICES))  # fmt: skip
        optimizers = {k: x for k, x in peers(with_gradients(net)).items() if k in GROWING}
        told = steps(optimizers, args, device, f"growth, {size:.0e} weights")
        result["weights"].append(MATRICES * side**2)
        result["ratios"].append(told[f"ratios{where}"]["AGD"])
        for name in GROWING:
            result["seconds"][name].append(told[f"seconds{where}"][name])
    return result


def case(args, device):
    result, memories, absent, rates = {}, {}, [], {}
    for name in [*NETS, *STOCK][: args.nets or (2 if args.quick else None)]:
        for form in ("", ", channels_last"):
            net = network(name, device)
            if form and (name in STOCK or all(p.ndim == 2 for p in net.parameters())):
                continue
            net = net.to(memory_format=torch.channels_last) if form else net
            weights, label = with_gradients(net), f"{name}{form}"
            whole = net if name in STOCK else None
            optimizers = peers(weights, whole)
            if whole:  # the memory of all of them would be several GB
                optimizers = {k: x for k, x in optimizers.items() if k in (*GROWING, PLAIN)}
            for key, values in steps(optimizers, args, device, label).items():
                result.setdefault(key, {})[label] = values
            seconds = result.get(f"seconds{GRAPH}", result["seconds"])[label]
            elements = sum(p.numel() for p in weights)
            rates[label] = {key: n * elements / seconds[key][0] for key, n in BYTES.items()}
            if not form:
                fresh = peers(weights, whole)
                memories[name] = memory(weights, {k: fresh[k] for k in optimizers}, device)
            if "Muon" not in optimizers:
                absent.append(label)
    order = sorted(result, key=lambda key: ("ratios", "quartiles", "seconds").index(key.split()[0]))
    return {**{key: result[key] for key in order}, "ratios are to": YARDSTICK,
            "memory in bytes": memories, "bytes a second": rates,
            **({} if args.nets else {"growth": growth(args, device)}),
            "without Muon, which takes matrices alone": absent}  # fmt: skip


def spectral_works(net, before=lambda: None):
    """{name: function} that takes a step of each peer of SpectralAGD after before(). Muon takes
    matrices, and AdamW the rest."""
    weights = list(net.parameters())
    matrices = [p for p in weights if p.ndim == 2]
    depth = float(max(1, sum(p.ndim > 1 for p in weights)))
    made = {"SpectralAGD": [SpectralAGD(net, depth=depth)], "AGD": [AGD(net, depth=depth)],
            ADAMW: [torch.optim.AdamW(weights, lr=RATE, fused=True)]}  # fmt: skip
    if hasattr(torch.optim, "Muon") and len(matrices) > 1:
        rest = [p for p in weights if p.ndim != 2]
        made["Muon"] = [torch.optim.Muon(matrices, lr=RATE)]
        made["Muon"] += [torch.optim.AdamW(rest, lr=RATE, fused=True)] if rest else []
    return {k: lambda xs=xs: [before(), *(x.step() for x in xs)] for k, xs in made.items()}


def polar_rates(args, device):
    """(operations a second of a large matrix product and of the polar factors of PIECES, ratios of
    the latter to the former)."""
    a = torch.randn(SIDE, SIDE, device=device)
    works, counts = {"product": lambda: a @ a}, {"product": 2 * SIDE**3}
    for number, rows, cols in PIECES:
        name, x = f"{number}×({rows}, {cols})", torch.randn(number, rows, cols, device=device)
        works[name] = lambda x=x: agd._polar(x.clone())
        # Two products with all columns, and those of the squares of the shorter side.
        squares = 4 * len(agd.POLAR) - 3
        counts[name] = 2 * number * (squares * rows**3 + 2 * rows**2 * cols)
    seconds = take_turns(works, args.repeats, by_clock(device, args.clock), warm=3)
    speed = {name: [counts[name] / x for x in taken] for name, taken in seconds.items()}
    told = compared(speed, [(name, "product") for name in speed if name != "product"])
    return {name: x[0] for name, x in told["seconds"].items()}, told["ratios"]


def spectral(args, device):
    """Steps of SpectralAGD beside its peers', with one thread and two; its polar factors beside a
    matrix product; whole steps of the FCN."""
    names = [*list(NETS)[:3], "GPT-2 small"][: args.nets or (1 if args.quick else None)]
    result, products, shares, whole = {}, {}, {}, {}
    threads = [1] if device.type == "cuda" or args.quick else [1, 2]
    for count in threads:
        torch.set_num_threads(count)
        kind = f"{count} thread{'s' * (count > 1)}"
        products[kind], shares[kind] = polar_rates(args, device)
        for name in names:
            net, label = network(name, device), f"{name}, {kind}"
            with_gradients(net)
            told = compare(spectral_works(net), args, device, label, ADAMW, warm=3)
            for key, values in told.items():
                result.setdefault(key, {})[label] = values
    torch.set_num_threads(threads[0])
    for size in BATCHES[: 1 if args.quick else None]:
        net = network(next(iter(NETS)), device)
        x, y = torch.randn(size, 3, 32, 32, device=device), torch.randn(size, 10, device=device)

        def passes(net=net, x=x, y=y):
            net.zero_grad()
            F.mse_loss(net(x), y).backward()

        works = {k: f for k, f in spectral_works(net, passes).items() if k != "Muon"}
        label = f"batch {size}"
        whole[label] = compare(works, args, device, label, ADAMW)["ratios"]
    return {**result, "ratios are to": ADAMW, "ratios of whole steps": whole,
            "ratios to a matrix product": shares, "operations a second": products}  # fmt: skip
