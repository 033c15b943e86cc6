"""Figure 3's measurement: the objective along AGD's own direction, beside the paper's majorisation.

From weights W, AGD steps along W(t) = W + t/eta dW, dW its update, so that W(eta) is where it goes.
Sections 3 and 4 of the paper bound the objective there by

    L(t) <= L - t G + 1/2 (exp(t) - 1)^2,

least at t = eta, for the square loss with its 1/2, |f - y|^2 / (2 d_L) with |y| = sqrt(d_L), and
for inputs of norm |x| = sqrt(d_0). The bound rests on assumptions about the network (its layers'
gradients and weights are well conditioned); nothing here makes them true.
"""

import json
import math
import time

import torch

from agd import AGD
from architecture import build
from data import DATASETS, data_folder
from data.arrays import ArrayBatches, load_arrays
from flags import parse
from runs.files import write_whole
from runs.log import RunError
from scripts.results import log_name
from training.losses import mse
from training.optimizers import make_optimizer

FILE = "fig3.json"  # of a folder of results
IMAGES = 10_000  # the first of the training set, uncropped
CHUNK = 1000
POINTS = 41  # of a curve, from t = 0
REACH = 2.5  # its end, in units of eta


def normalised(dataset, data_dir):
    """Chunks of (inputs of norm sqrt(d_0) (n, d_0) in float64, labels (n,)) of the first IMAGES;
    and the checksums of the images."""
    spec, path = DATASETS[dataset], data_folder(data_dir) / f"{dataset}.npz"
    arrays, source = load_arrays(path, spec.shape, spec.classes)
    batches = ArrayBatches(
        arrays["train_images"][:IMAGES], arrays["train_labels"][:IMAGES], spec.mean, spec.std,
        CHUNK, torch.device("cpu"),
    )  # fmt: skip
    chunks = [(x.flatten(1).double(), y) for x, y in batches]
    return [(x / x.norm(dim=1, keepdim=True) * math.sqrt(x.shape[1]), y) for x, y in chunks], source


@torch.no_grad()
def objective(net, chunks):
    """(outputs (N, C), losses (N,)) in the paper's normalisation."""
    outputs = torch.cat([net(x) for x, _ in chunks])
    return outputs, mse(outputs, torch.cat([y for _, y in chunks])) / 2


def along(net, chunks, deadline=None):
    """The curve from the weights of `net`, a dict of numbers. Raises TimeoutError after the
    `deadline`, a time.monotonic()."""
    optimizer = AGD(net.parameters())
    count = sum(len(y) for _, y in chunks)
    optimizer.zero_grad()
    for x, y in chunks:
        (mse(net(x), y).sum() / 2 / count).backward()
    start = [p.detach().clone() for p in net.parameters()]
    f, losses = objective(net, chunks)
    optimizer.step()
    L, G, eta = losses.mean().item(), float(optimizer.G), float(optimizer.eta)
    dW = [p.detach() - w for p, w in zip(net.parameters(), start)]
    f_after, losses_after = objective(net, chunks)
    ts = [REACH * eta * i / (POINTS - 1) for i in range(POINTS)]
    curve = []
    for t in ts:
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError("the time is up; the same command goes on")
        with torch.no_grad():
            for p, w, d in zip(net.parameters(), start, dW):
                p.copy_(w + t / eta * d)
        curve.append(objective(net, chunks)[1].mean().item())
    relative = [(d.norm() / w.norm()).item() for d, w in zip(dW, start)]
    chain = {  # at t = eta
        "dW": sum(relative) / len(relative),  # |dW|/|W|, the mean over layers
        "df": ((f_after - f).norm(dim=1) / math.sqrt(f.shape[1])).mean().item(),
        "dl": (losses_after - losses).abs().mean().item(),
        "dL": (losses_after - losses).mean().item(),
    }
    return {"L": L, "G": G, "eta": eta, "t": ts, "loss": curve,
            "bound": [L - t * G + math.expm1(t) ** 2 / 2 for t in ts], "chain": chain}  # fmt: skip


def planned(results):
    """The row of the table that is measured."""
    return next(row for row in results.table if row.figure == "fig3")


def read(results):
    """The measurement of these results, or None. Raises RunError where it is damaged."""
    path = results.folder / FILE
    try:
        measured = json.loads(path.read_text(encoding="utf-8"))
        measured["run"]["epochs"], measured["states"].items()
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{path} is damaged; remove it, and figure 3 is measured anew") from error
    return measured


def measure(results, data_dir, deadline=None):
    """Measure figure 3's network at its start and at its last checkpoint; writes
    `<folder>/fig3.json` unless it holds that already, and returns its path. Raises RunError without
    the weights, TimeoutError after the `deadline`."""
    row, path = planned(results), results.folder / FILE
    name = log_name(row)
    weights = results.folder / "checkpoints" / f"{name}.pt"
    if not weights.exists():
        if path.exists():
            return path
        raise RunError(f"there is no {weights}")
    try:
        checkpoint = torch.load(weights, map_location="cpu", weights_only=True)
        settings = json.loads(checkpoint["settings"])
    except Exception as error:  # torch raises many kinds for a damaged file
        raise RunError(f"{weights} cannot be read ({type(error).__name__})") from error
    run = {"name": name, "epochs": checkpoint["epoch"], "data": settings["data"]}
    if (read(results) or {}).get("run") == run:
        return path
    args = parse([*row.flags, "--device", "cpu"])
    chunks, source = normalised(args.dataset, data_dir)
    if source != settings["data"]:
        raise RunError(f"{weights} was trained on other images than those in {data_dir}")
    height, side, channels = DATASETS[args.dataset].shape
    shape, classes = (channels, height, side), DATASETS[args.dataset].classes
    net = build(args.arch, shape, classes, args.depth, args.width)
    make_optimizer(args.optimizer, net, seed=args.seed)  # draws the weights
    states = {"at initialisation": along(net.double(), chunks, deadline)}
    net.load_state_dict(checkpoint["net"])
    states[f"after {checkpoint['epoch']} epochs"] = along(net, chunks, deadline)
    measured = {"run": run, "images": sum(len(y) for _, y in chunks), "states": states}
    write_whole(path, json.dumps(measured, indent=1) + "\n")
    return path
