"""What a step of SpectralAGD takes beside AdamW, Muon and AGD, and how fast its polar factors are
beside this machine's own matrix product."""

import torch
import torch.nn.functional as F

import agd
from agd import AGD, SpectralAGD
from architecture import build
from scripts.benchmark.measure import by_clock, medians, note, quartiles, ratios, spread, take_turns
from scripts.benchmark.step import NETS, RATE, STOCK, with_gradients

CHOSEN = ("FCN 10×256, CIFAR-10", "ResNet-18, CIFAR-10", "ResNet-50, ImageNet")
YARDSTICK = "AdamW, fused"
PIECES = ((16, 128, 256), (2, 128, 3072), (24, 64, 576), (36, 128, 768))  # number, rows, columns
SIDE = 1024  # of the matrix product that stands for the machine
BATCHES = (128, 1024)


def peers(net, L):
    """{name: optimisers} of the same weights. Muon takes matrices; AdamW then takes the rest."""
    weights = list(net.parameters())
    found = {"SpectralAGD": [SpectralAGD(net, depth=float(L))], "AGD": [AGD(net, depth=float(L))],
             YARDSTICK: [torch.optim.AdamW(weights, lr=RATE, fused=True)]}  # fmt: skip
    matrices = [p for p in weights if p.ndim == 2]
    if hasattr(torch.optim, "Muon") and len(matrices) > 1:
        others = [p for p in weights if p.ndim != 2]
        found["Muon"] = [torch.optim.Muon(matrices, lr=RATE)]
        found["Muon"] += [torch.optim.AdamW(others, lr=RATE, fused=True)] if others else []
    return found


def turns(works, args, timer, against, warm):
    seconds = take_turns(works, args.repeats, timer, warm=warm)
    pairs = [(name, against) for name in works if name != against]
    each = {key.split(" / ")[0]: x for key, x in ratios(seconds, pairs).items()}
    return medians(each), quartiles(each), spread(seconds)


def operations(number, rows, cols):
    """Floating-point operations of the polar factors: two products with all columns, and those of
    the squares of the shorter side."""
    squares = 4 * len(agd.POLAR) - 3
    return 2 * number * (squares * rows**3 + 2 * rows**2 * cols)


def rates(args, device, timer):
    """{pieces: the rate of their polar factors over that of a large matrix product}."""
    a = torch.randn(SIDE, SIDE, device=device)
    works, counts = {"product": lambda: a @ a}, {"product": 2 * SIDE**3}
    for pieces in PIECES:
        name = "{}×({}, {})".format(*pieces)
        x = torch.randn(pieces, device=device)
        works[name] = lambda x=x: agd._polar(x.clone())
        counts[name] = operations(*pieces)
    seconds = take_turns(works, args.repeats, timer, warm=3)
    speed = {name: [counts[name] / x for x in values] for name, values in seconds.items()}
    pairs = [(name, "product") for name in speed if name != "product"]
    return medians(speed), medians(ratios(speed, pairs))


def case(args, device):
    timer = by_clock(device, args.clock)
    names = [*CHOSEN, *list(STOCK)[:1]][: args.nets or (1 if args.quick else None)]
    found = {"ratios": {}, "quartiles": {}, "seconds": {}}
    products, shares, epochs = {}, {}, {}
    threads = [1] if device.type == "cuda" or args.quick else [1, 2]
    for count in threads:
        torch.set_num_threads(count)
        kind = f"{count} thread{'s' * (count > 1)}"
        note(f"polar factors, {kind}")
        products[kind], shares[kind] = rates(args, device, timer)
        for name in names:
            net = (STOCK[name]() if name in STOCK else build(*NETS[name])).to(device)
            weights = with_gradients(list(net.parameters()))
            made = peers(net, max(1, sum(p.ndim > 1 for p in weights)))
            works = {key: lambda xs=xs: [x.step() for x in xs] for key, xs in made.items()}
            note(f"{name}, {kind}: {sum(p.numel() for p in weights):,} weights")
            told = turns(works, args, timer, YARDSTICK, 3)
            for key, values in zip(("ratios", "quartiles", "seconds"), told):
                found[key][f"{name}, {kind}"] = values
    torch.set_num_threads(threads[0])
    for size in BATCHES[: 1 if args.quick else None]:
        note(f"whole steps of the FCN at batch {size}")
        net = build(*NETS[CHOSEN[0]]).to(device)
        x, y = torch.randn(size, 3, 32, 32, device=device), torch.randn(size, 10, device=device)
        made = {key: xs for key, xs in peers(net, 10).items() if key != "Muon"}

        def whole(optimizers, net=net, x=x, y=y):
            net.zero_grad()
            F.mse_loss(net(x), y).backward()
            for optimizer in optimizers:
                optimizer.step()

        works = {key: lambda xs=xs, whole=whole: whole(xs) for key, xs in made.items()}
        epochs[f"batch {size}"] = turns(works, args, timer, YARDSTICK, 17)[0]
    return {
        **found,
        "ratios are to": YARDSTICK,
        "ratios of whole steps": epochs,
        "ratios to a matrix product": shares,
        "operations a second": products,
    }
