"""What an optimiser's step takes, in time and in memory, beside torch's."""

import json
import math
import tempfile
from pathlib import Path

import torch
import torchvision

from agd import AGD
from architecture import build
from check.resources import free_memory
from scripts.benchmark.measure import (
    by_clock,
    by_graph,
    medians,
    note,
    quartiles,
    ratios,
    spread,
    take_turns,
)

CIFAR, IMAGENET = ((3, 32, 32), 10), ((3, 224, 224), 1000)
NETS = {
    "FCN 10×256, CIFAR-10": ("fcn", *CIFAR),
    "ResNet-18, CIFAR-10": ("resnet18", *CIFAR),
    "ResNet-50, ImageNet": ("resnet50", *IMAGENET),
    "ResNet-18, ImageNet": ("resnet18", *IMAGENET),
    "ResNet-50, CIFAR-10": ("resnet50", *CIFAR),
}
STOCK = {  # as they are, with biases, norms and embeddings: AGD(net)
    "GPT-2 small": lambda: gpt2(),  # 124 million
    "ResNet-50, torchvision": lambda: torchvision.models.resnet50(),
}
YARDSTICK, PLAIN = "SGD, fused", "AGD, fused=False"
GROWING = ("AGD", YARDSTICK, "AdamW, fused")
MATRICES = 10  # of the weights that grow
RATE = 1e-8  # the peers': it changes no time, and they share their weights
BYTES = {"AGD": 16, YARDSTICK: 12}  # that a step moves, of each float32 weight
GRAPH = " as a CUDA graph"


def gpt2():
    """A network with the parameters of GPT-2's 124 million, never called."""
    layer = torch.nn.TransformerEncoderLayer(768, 12, 3072, norm_first=True)
    return torch.nn.ModuleDict({
        "tokens": torch.nn.Embedding(50257, 768), "positions": torch.nn.Embedding(1024, 768),
        "layers": torch.nn.TransformerEncoder(layer, 12, enable_nested_tensor=False),
        "norm": torch.nn.LayerNorm(768),
    })  # fmt: skip


def peers(weights, net=None):
    """{name: optimiser} of the same weights; AGD of a network takes it whole."""
    whole = {} if net is None else {"depth": 6.71}
    made = {name: AGD(net or weights, fused=fused, **whole)
            for name, fused in (("AGD", None), (PLAIN, False))}  # fmt: skip
    kinds = {"SGD": (torch.optim.SGD, {}),
             "SGD with momentum": (torch.optim.SGD, {"momentum": 0.9}),
             "AdamW": (torch.optim.AdamW, {})}  # fmt: skip
    for kind, (make, more) in kinds.items():
        for form in ("fused", "foreach"):
            made[f"{kind}, {form}"] = make(weights, lr=RATE, **more, **{form: True})
    # Fused, it counts its steps on the device either way, and a CUDA graph can hold it.
    made["AdamW, fused"].param_groups[0]["capturable"] = weights[0].device.type == "cuda"
    if hasattr(torch.optim, "Muon") and all(p.ndim == 2 for p in weights):
        made["Muon"] = torch.optim.Muon(weights, lr=RATE)
    return made


def with_gradients(weights):
    """`weights`, a list, with random gradients of a usual size."""
    torch.manual_seed(0)
    for p in weights:
        p.grad = torch.randn_like(p) * 1e-3
    return weights


def weights_of(arch, shape, classes, device, channels_last=False):
    net = build(arch, shape, classes).to(device)
    if channels_last:
        net = net.to(memory_format=torch.channels_last)
    return with_gradients(list(net.parameters()))


def held(step, device):
    """(most, left): the bytes that a step holds beyond those that were there before it, at most at
    a time and when it is done."""
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
    """Bytes: of the largest weight and of all, and what each optimiser, none of which has made a
    step, keeps from its first one, and needs beside that while it makes another."""
    kept = {name: held(x.step, device)[1] for name, x in optimizers.items()}
    return {
        "largest weight": max(p.nbytes for p in weights),
        "weights": sum(p.nbytes for p in weights),
        "scratch": {name: held(x.step, device)[0] for name, x in optimizers.items()},
        "kept": kept,
    }


def compare(weights, optimizers, args, device, say):
    """{"ratios", "quartiles", "seconds"} of a step by the clock, launches included; on a GPU those
    of CUDA graphs as well, where a graph can hold the step."""
    works = {name: optimizer.step for name, optimizer in optimizers.items()}
    timers = {"": (by_clock(device, args.clock), works)}
    if device.type == "cuda":
        graphs = {name: works[name] for name, optimizer in optimizers.items()
                  if optimizer.param_groups[0].get("capturable", True)}  # fmt: skip
        timers[GRAPH] = by_graph(device), graphs
    found = {}
    for where, (timer, works) in timers.items():
        note(f"{say}: {sum(p.numel() for p in weights):,} weights, {args.repeats} rounds{where}")
        # AGD looks into the gradients of its first 16 steps.
        seconds = take_turns(works, args.repeats, timer, warm=17)
        pairs = [(name, YARDSTICK) for name in works if name != YARDSTICK]
        each = {key.split(" / ")[0]: x for key, x in ratios(seconds, pairs).items()}
        found |= {f"ratios{where}": medians(each), f"quartiles{where}": quartiles(each),
                  f"seconds{where}": spread(seconds)}  # fmt: skip
    return found


def growth(args, device):
    """Seconds against the number of weights, as far as memory goes."""
    counts = [1e5, 1e6] if args.quick else [10 ** (k / 2) for k in range(10, 17)]
    found = {"weights": [], "ratios": [], "seconds": {name: [] for name in GROWING}}
    for count in counts:
        side = round(math.sqrt(count / MATRICES))
        if free_memory(device) < 8 * 4 * count:  # weights, gradients, AdamW's two, scratch
            note(f"{count:.0e} weights: left out, too little memory")
            break
        weights = [torch.randn(side, side, device=device) / side for _ in range(MATRICES)]
        optimizers = {k: x for k, x in peers(with_gradients(weights)).items() if k in GROWING}
        told = compare(weights, optimizers, args, device, "growth")
        where = GRAPH if device.type == "cuda" else ""
        found["weights"].append(MATRICES * side**2)
        found["ratios"].append(told[f"ratios{where}"]["AGD"])
        for name in GROWING:
            found["seconds"][name].append(told[f"seconds{where}"][name])
    return found


def case(args, device):
    found, memories, absent, rates = {}, {}, [], {}
    for name in [*NETS, *STOCK][: args.nets or (2 if args.quick else None)]:
        for channels_last in (False, True):
            if name in STOCK:
                net = STOCK[name]().to(device)
                weights = with_gradients(list(net.parameters()))
            else:
                net, weights = None, weights_of(*NETS[name], device, channels_last)
            if channels_last and (name in STOCK or all(p.ndim == 2 for p in weights)):
                continue
            label = f"{name}, channels_last" if channels_last else name
            optimizers = peers(weights, net)
            if name in STOCK:  # the memory of all of them would be several GB
                optimizers = {k: x for k, x in optimizers.items() if k in (*GROWING, PLAIN)}
            for key, values in compare(weights, optimizers, args, device, label).items():
                found.setdefault(key, {})[label] = values
            seconds = found.get(f"seconds{GRAPH}", found["seconds"])[label]
            elements = sum(p.numel() for p in weights)
            rates[label] = {key: n * elements / seconds[key][0] for key, n in BYTES.items()}
            if not channels_last:
                again = peers(weights, net)
                memories[name] = memory(weights, {k: again[k] for k in optimizers}, device)
            if "Muon" not in optimizers:
                absent.append(label)
    order = sorted(found, key=lambda key: ("ratios", "quartiles", "seconds").index(key.split()[0]))
    return {
        **{key: found[key] for key in order},
        "ratios are to": YARDSTICK,
        "memory in bytes": memories,
        "bytes a second": rates,
        **({} if args.nets else {"growth": growth(args, device)}),
        "without Muon, which takes matrices alone": absent,
    }
