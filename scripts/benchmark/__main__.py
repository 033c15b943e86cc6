"""Times beside their peers in the same run: `python -m scripts.benchmark [CASE]`.

step, a step of AGD on the weights of the paper's networks, in both memory formats, beside torch's
SGD, SGD with momentum, AdamW (fused and foreach) and Muon: time, memory, and the time against the
number of weights, from 1e5 to 1e8.

epoch, what an epoch takes, and the time against width, depth and batch:

    ours           an epoch of main.py: training, exact test accuracy
    bare           forward and backward passes alone, on batches that lie ready on the device, of
                   the network in torch's own layers; and of ours
    conventional   the usual pipeline: torch's own layers, a PIL image and its torchvision
                   transforms one by one in a DataLoader, AGD in a plain loop over the layers, loss
                   and eta read every step

and the time from the start of main.py to its first step, beside that of importing torch.

data, what one core takes to read the images of a folder (--folder, below which train/CLASS/ lie)
for training at --image_size, in seconds of the process itself, whatever else the machine does:

    ours           the loader of main.py without workers
    conventional   torchvision's ImageFolder and transforms in a DataLoader without workers

spectral, a step of SpectralAGD beside AdamW's, Muon's and AGD's, with one thread and two; whole
steps of the FCN; and the rate of its polar factors beside that of a large matrix product.

many, the epochs a second of 1 to 32 small runs at once.

checkpoint, the share of an epoch's time that checkpoints take, as main.py writes them by default:
copied, flushed to the disk of --out, read back. A few steps of ResNet-18 stand for an epoch.

The peers take turns, so that a drift of the machine's speed meets all of them. Medians and their
quartiles go to <out>/benchmark/<case>.json (<case>-cuda.json of a GPU), ratios (round by round,
then their median) first, each when its case ends. `all` is one case after the other, and `draw`
makes a picture of what is there, and with --out results the README's table.
"""

import argparse
import os
import sys
from datetime import datetime, timezone
from pathlib import Path

import torch

import flags
from architecture import NETWORKS
from cli import Parser, number
from data import DataError, default_data_dir
from runs.log import RunError
from runs.provenance import environment, processor
from scripts.benchmark import checkpoint, draw, epoch, folders, many, spectral, step
from scripts.benchmark.measure import CLOCKS, as_json, note, rounded
from training.display import table

CASES = {  # name -> module, rounds, rounds of --quick
    "step": (step, 40, 5),
    "spectral": (spectral, 15, 2),
    "epoch": (epoch, 7, 2),
    "data": (folders, 7, 2),
    "many": (many, 3, 1),
    "checkpoint": (checkpoint, 10, 2),
}


def parse(argv=None):
    parser = Parser(
        prog="python -m scripts.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("case", nargs="?", choices=[*CASES, "all", "draw"], default="all", help="(default: all)")
    add("--arch", default="fcn", choices=NETWORKS, help="of the epoch (default: fcn)")
    add("--dataset", default="cifar10", choices=["cifar10", "cifar100"])
    add("--folder", type=Path, help="of images (default: imagenet in --data_dir or $IMAGENET_PATH)")
    add("--image_size", type=number(int, 32, 8192), default=224)
    add("--depth", type=number(int, 2, 10_000), default=10)
    add("--width", type=number(int, 1, 1_000_000), default=256)
    add("--batch_size", type=number(int, 1), default=128)
    add("--repeats", type=number(int, 1), help="counted rounds (default: "
        + ", ".join(f"{name} {rounds}" for name, (_, rounds, _) in CASES.items()) + ")")
    add("--clock", choices=CLOCKS, default="wall", help="of steps and epochs: process counts the "
        "processor's time for this process alone, for a busy machine and one thread")
    add("--nets", type=number(int, 1, len(step.NETS) + len(step.STOCK)), metavar="N",
        help="of the steps: the first N networks alone, without the growth")
    add("--counts", type=number(int, 1), nargs="+", metavar="N",
        help="of many: so many runs at once, beside 1 (default: 2 4 8 16 32)")
    add("--together", choices=["auto", "on", "off"], default="auto",
        help="of many: as that of scripts.reproduce (default: auto)")
    add("--quick", action="store_true", help="small sizes and few rounds, to see that it works")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--data_dir", default=default_data_dir())
    add("--out", help="(default: results; with --quick: reproduced)")
    args = parser.parse_args(argv)
    flags.parse(["--device", args.device])  # ends with a sentence where there is none
    args.out = args.out or ("reproduced" if args.quick else "results")
    return args


def away_from_home(value):
    """A path that says nothing of whose it is."""
    text, home = str(value), os.path.expanduser("~") + os.sep
    return "~/" + text[len(home) :] if text.startswith(home) else text


def measure(name, args):
    """Run a case and write what it found; returns that, a dict, and its path."""
    module, rounds, few = CASES[name]
    device, threads = torch.device(args.device), torch.get_num_threads()
    args = argparse.Namespace(**{**vars(args), "case": name})
    args.repeats = args.repeats or (few if args.quick else rounds)
    try:
        found = module.case(args, device)
        here = {**environment(device), "processor": processor(), "cuda": torch.version.cuda}
    finally:
        torch.set_num_threads(threads)
    flags = {key: away_from_home(x) if isinstance(x, (str, Path)) else x
             for key, x in vars(args).items()}  # fmt: skip
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    found = rounded({**found, "flags": flags, "environment": here, "date": now})
    path = Path(args.out, "benchmark", draw.file_name(name, device.type))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(as_json(found) + "\n", encoding="utf-8")
    os.replace(partial, path)
    return found, path


def show(name, found, path):
    """Ratios of a case, as tables."""
    for kind, ratios in found.items():
        if not kind.startswith("ratios") or not isinstance(ratios, dict):
            continue
        groups = ratios if all(isinstance(x, dict) for x in ratios.values()) else {"": ratios}
        for group, values in groups.items():
            title = f"{name}, median of the {kind}{', ' if group else ''}{group}"
            table((title, ""), [(key, f"{x:.2f}") for key, x in values.items()])
    if name == "data":
        rates = {"ours": found["images_per_second_per_core"], "conventional": found["conventional"]}
        table(("Images a second a core", ""), [(key, f"{x:.0f}") for key, x in rates.items()])
    print(f"Written to {path}\n", flush=True)


def main(argv=None):
    """Run the command line; returns the exit code."""
    args = parse(argv)
    names = list(CASES) if args.case == "all" else [args.case] if args.case in CASES else []
    code = 0
    try:
        for name in names:
            try:
                found, path = measure(name, args)
                show(name, found, path)
            except (DataError, RunError, OSError, ImportError) as error:
                note(f"error: {name}: {error}")
                code = max(code, 2 if isinstance(error, (DataError, RunError)) else 1)
        if args.case == "draw":
            for path in draw.write(Path(args.out, "benchmark")):
                print(f"Drawn: {path}")
    except KeyboardInterrupt:
        note("\ninterrupted; the cases that had ended are written")
        code = 130
    return code


if __name__ == "__main__":
    sys.exit(main())
