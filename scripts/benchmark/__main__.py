"""Times beside their peers in the same run: `python -m scripts.benchmark [CASE]`.

    step        a step of AGD on the weights of the paper's networks, in both memory formats, beside
                torch's SGD, AdamW (fused and foreach) and Muon: time and memory
    spectral    a step of SpectralAGD beside AdamW's, Muon's and AGD's
    epoch       an epoch of main.py beside its forward and backward passes alone; the start of
                main.py beside that of torch
    data        the seconds of one core that reads a folder of images (--folder, which holds
                train/CLASS/) at --image_size, beside torchvision's ImageFolder
    many        epochs a second of 1 to 32 small runs at once
    checkpoint  the share of an epoch's time that checkpoints take, on the disk of --out

The peers take turns, so that a drift of the machine's speed meets all of them. Ratios (round by
round, then their median), quartiles and seconds go to <out>/benchmark/<case>.json (<case>-cuda.json
of a GPU) when a case ends. `all` is one case after the other. `draw` prints the tables of the files
and, with --out results, puts them into docs/performance.md.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import json
from datetime import datetime, timezone

import flags
from architecture import NETWORKS
from cli import Parser, UserError, a_path, command, number, one_of
from cli import device as a_device
from data import default_data_dir

CASES = {  # name -> rounds, rounds of --quick
    "step": (40, 5), "spectral": (15, 2), "epoch": (7, 2), "data": (7, 2), "many": (3, 1),
    "checkpoint": (10, 2),
}  # fmt: skip
USES = {  # flag -> the cases that it is of; what says where holds for all
    "arch": "epoch", "dataset": "epoch many checkpoint", "folder": "data", "image_size": "data",
    "depth": "epoch many checkpoint", "width": "epoch many checkpoint",
    "batch_size": "epoch data checkpoint", "repeats": " ".join(CASES), "quick": " ".join(CASES),
    "clock": "step spectral epoch", "nets": "step spectral", "counts": "many", "together": "many",
}  # fmt: skip


def parse(argv=None):
    parser = Parser(prog=command("scripts.benchmark"), description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add, whole = parser.add_argument, number(int, 1)
    add("case", nargs="?", type=one_of([*CASES, "all", "draw"]), default="all", metavar="CASE",
        help="(default: all)")
    add("--arch", default="fcn", type=one_of(NETWORKS), metavar="NET",
        help="of the epoch (default: fcn)")
    add("--dataset", default="cifar10", type=one_of(["cifar10", "cifar100"]), metavar="SET")
    add("--folder", type=a_path,
        help="of images (default: $IMAGENET_PATH or imagenet in --data_dir)")
    add("--image_size", type=number(int, 32, 8192), default=224)
    add("--depth", type=number(int, 2, 10_000), default=10)
    add("--width", type=number(int, 1, 1_000_000), default=256)
    add("--batch_size", type=whole, default=128)
    rounds = ", ".join(f"{name} {rounds}" for name, (rounds, _) in CASES.items())
    add("--repeats", type=whole, help=f"counted rounds (default: {rounds})")
    add("--clock", choices=["wall", "process"], default="wall", help="of steps and epochs: "
        "process counts the processor's time for this process alone, for a busy machine and one "
        "thread")
    add("--nets", type=number(int, 1, 7), metavar="N",
        help="of the steps: the first N networks alone")
    add("--counts", type=whole, nargs="+", metavar="N",
        help="of many: so many runs at once, beside 1 (default: 2 4 8 16 32)")
    add("--together", choices=["auto", "on", "off"], default="auto",
        help="of many: as that of scripts.reproduce (default: auto)")
    add("--quick", action="store_true", help="small sizes and few rounds, to see that it works")
    add("--device", type=a_device, help="(default: a GPU if there is one)")
    add("--data_dir", default=default_data_dir())
    add("--out", type=a_path, default="reproduced",
        help="(default: %(default)s; results holds the published files)")
    args = parser.parse_args(argv)
    parser.refuse(argv, without_effect(args))
    where = ["--device", args.device] if args.device else []
    args.device = flags.parse(["--dataset", "digits", *where]).device  # exits where there is none
    return args


def without_effect(args):
    """{name: reason} of the flags that are not of the case."""
    idle = {}
    if args.case != "all":
        idle = {name: f"is of {cases.replace(' ', ', ')}, not of {args.case}"
                for name, cases in USES.items() if args.case not in cases.split()}  # fmt: skip
    if args.case == "epoch" and args.arch != "fcn":
        idle |= dict.fromkeys(("depth", "width"), f"is of the fcn: {args.arch} has its own")
    return idle


if __name__ == "__main__":
    parse()  # a mistake is refused before torch is imported, which takes seconds

import torch

from runs.files import write_whole
from runs.provenance import environment, processor, tilde
from scripts.benchmark import draw, epoch, many, step
from scripts.benchmark.measure import note
from training.display import table

FUNCTIONS = {
    "step": step.case, "spectral": step.spectral, "epoch": epoch.case, "data": epoch.folder,
    "many": many.case, "checkpoint": epoch.checkpoint,
}  # fmt: skip


def measure(name, args):
    """Run a case, write its result, a dict, and print its ratios."""
    case, (rounds, few) = FUNCTIONS[name], CASES[name]
    device, threads = torch.device(args.device), torch.get_num_threads()
    args = argparse.Namespace(**{**vars(args), "case": name})
    args.repeats = args.repeats or (few if args.quick else rounds)
    try:
        result = case(args, device)
        here = {**environment(device), "processor": processor(), "cuda": torch.version.cuda}
    finally:
        torch.set_num_threads(threads)
    settings = {key: tilde(str(x) if isinstance(x, Path) else x) for key, x in vars(args).items()}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    result = {**result, "flags": settings, "environment": here, "date": now}
    # Four figures are more than a clock knows.
    result = json.loads(json.dumps(result, allow_nan=False),
                        parse_float=lambda x: float(f"{float(x):.4g}"))  # fmt: skip
    path = Path(args.out, "benchmark", draw.file_name(name, device.type))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    for kind, ratios in result.items():
        if kind.startswith("ratios") and isinstance(ratios, dict):
            nested = isinstance(next(iter(ratios.values()), None), dict)
            for group, values in ratios.items() if nested else [("", ratios)]:
                title = f"{name}, median of the {kind}{', ' if group else ''}{group}"
                table((title, ""), [(key, f"{x:.2f}") for key, x in values.items()])
    print(f"Written to {path}\n", flush=True)


def main(argv=None):
    """Run the command line; returns the exit code."""
    args, code = parse(argv), 0
    if args.case == "draw":
        draw.write(Path(args.out, "benchmark"))
        return 0
    try:
        for name in CASES if args.case == "all" else [args.case]:
            try:
                measure(name, args)
            except (UserError, OSError, ImportError) as error:
                note(f"error: {name}: {error}")
                code = max(code, getattr(error, "exit_code", 1))
    except KeyboardInterrupt:
        note("\ninterrupted; the finished cases are written")
        code = 130
    return code


if __name__ == "__main__":
    sys.exit(main())
