"""The command line: flags, their defaults, a suggestion where one is mistyped, and the name of the
run that they describe."""

import argparse
import difflib
import math
import os
import sys
import zlib
from decimal import Decimal
from pathlib import Path

from architecture.libraries import PREFIXES as LIBRARIES
from distributed.launch import is_first
from provenance import data_sha256
from record import RecordError, read, shown
from run import run_name

LONGEST = 250  # characters of a message, whatever was given


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests what was meant."""

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            what = "flag" if flag.startswith("-") else "place for"
            self.error(f"there is no {what} {flag}{near(flag, self._option_string_actions)}")
        return args

    def error(self, message):
        if len(message) > LONGEST:
            message = f"{message[: LONGEST // 2]} ... {message[-LONGEST // 2 :]}"
        if "--distribute" in sys.argv and not is_first():  # the first rank says it
            self.exit(2)
        self.exit(2, f"error: {message}\n       {self.prog} --help lists the flags\n")


def near(word, words):
    """A suggestion, or nothing."""
    by_lower = {x.lower(): x for x in words}
    close = difflib.get_close_matches(word.lower(), by_lower, n=1, cutoff=0.5)
    return f"; did you mean {by_lower[close[0]]}?" if close else ""


def one_of(names, *prefixes, rest="PATH"):
    """An argument type: one of `names`, or one of `prefixes` with `rest` behind it."""

    def check(value):
        if value in names or any(value.startswith(x) and value != x for x in prefixes):
            return value
        listed = ", ".join([*names, *(f"{prefix}{rest}" for prefix in prefixes)])
        near_one = near(value, [*names, *prefixes])
        raise argparse.ArgumentTypeError(f"no {value!r} among {listed}{near_one}")

    return check


def number(kind, least, most=None):
    """An argument type: an int that fits in 63 bits or a finite float, from `least` to `most`."""
    what = "a whole number" if kind is int else "a finite number"
    what += f" from {least}" + ("" if most is None else f" to {most}")
    if most is None:
        most = 2**63 - 1 if kind is int else sys.float_info.max

    def check(value):
        try:
            x = abs(kind(value)) if kind(value) == 0 else kind(value)  # -0.0 is 0.0
        except ValueError:
            x = math.nan
        if not least <= x <= most:
            raise argparse.ArgumentTypeError(f"{value!r} is not {what}")
        return x

    return check


def every(value):
    """An argument type: 500 steps, or 90s, 10m, 2h; returns ("steps", n) or ("seconds", s)."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(value[-1:])
    try:
        least = float(value[:-1]) * unit if unit else int(value)
    except ValueError:
        least = 0
    if not 0 < least < 2**31:
        raise argparse.ArgumentTypeError(
            f"{value!r} is neither a number of steps, as 500, nor a time, as 90s, 10m or 2h"
        )
    return ("seconds", least) if unit else ("steps", least)


def checked(kind):
    """An argument type: the text itself, where `kind` takes it."""
    return lambda value: (kind(value), value)[1]


class Joined(argparse.Action):
    """A flag that may be given several times: one text, the parts separated by commas, so that it
    stands in logs and records as any other value."""

    def __call__(self, parser, namespace, value, option_string=None):
        before = getattr(namespace, self.dest)
        parts = [*(before.split(",") if isinstance(before, str) else []), *value.split(",")]
        setattr(namespace, self.dest, ",".join(dict.fromkeys(filter(None, parts))) or None)


MODES = ("auto", "on", "off")
LAYERS = ("count", "paths")


def all_or(kind):
    """An argument type: the word all, or what `kind` takes."""
    return lambda value: value if value == "all" else kind(value)


def parser(networks, datasets, losses, optimizers, precisions, data_dir):
    """The command line, given the names to choose from and the default data directory."""

    def optimizer(value):
        return value if "." in value else one_of(optimizers)(value)

    p = Parser(
        prog="python main.py",
        allow_abbrev=False,
        description="Train a network with Automatic Gradient Descent (AGD): no learning rate.",
        epilog="The same command goes on where the last one stopped; a larger --epochs goes on "
        "from a finished run.",
    )
    add = p.add_argument_group("what to train").add_argument
    add("--arch", type=one_of(networks, *LIBRARIES, rest="NAME"), default="fcn", metavar="NET",
        help=f"{', '.join(networks)}; torchvision:NAME or timm:NAME, a classifier of theirs, with "
        "their start of the weights (default: %(default)s)")
    add("--dataset", type=one_of(datasets, "folder:", "npz:"), default="cifar10", metavar="SET",
        help=f"{', '.join(datasets)}; folder:PATH with train/ and val/; npz:FILE in --data_dir, "
        "arrays as data.prepare writes them (default: %(default)s)")
    add("--loss", type=one_of(losses), default="mse", metavar="LOSS",
        help="mse (square loss) or xent (cross-entropy) (default: %(default)s)")
    add("--depth", type=number(int, 2, 10_000), default=10, help="layers of the fcn (default: 10)")
    add("--width", type=number(int, 1, 1_000_000), default=256,
        help="width of the fcn (default: 256)")
    # None, not False, where they are off: what earlier runs have logged of them.
    add("--bias", action="store_true", default=None,
        help=f"biases in the layers of {', '.join(networks)}")
    add("--affine", action="store_true", default=None,
        help="gains and biases in their norms")
    add("--weights", metavar="FILE", help="weights to start from: .safetensors, .pt or .pth; those "
        "of another shape, as a head for other classes, are drawn")
    add("--freeze", action=Joined, metavar="PATTERN", help="leave the parameters of these names as "
        "they are, as 'features.*'; may be given several times")
    add("--train_examples", type=number(int, 1), metavar="N", help="the first N images alone")
    add("--test_examples", type=number(int, 1), metavar="N", help="in testing likewise")
    add = p.add_argument_group("how").add_argument
    add("--epochs", type=number(int, 1), default=200, help="(default: 200)")
    add("--train_bs", type=number(int, 1), default=128,
        help="images a step, on all devices together (default: 128)")
    add("--test_bs", type=number(int, 1), metavar="N", help="in testing (default: as many as pay "
        "on the device, halved where memory runs out)")
    add("--micro_bs", type=number(int, 1), metavar="N", help="images that a device takes at a "
        "time, added up to a step (default: all, halved where memory runs out)")
    add("--sync_bn", action="store_true", help="batch-norm statistics over all the devices")
    add("--gain", type=number(float, 0, 1e30), default=1.0,
        help="multiplies the update of agd and spectral (default: 1)")
    add("--layers", type=one_of(LAYERS), metavar="HOW", help="AGD's number of layers: count (their "
        "number) or paths (the mean number on a path through the network) (default: count for agd "
        "on the four networks, else paths)")
    add("--optimizer", type=optimizer, default="agd", metavar="OPT",
        help=f"{', '.join(optimizers)} or package.Class; agd is the paper's rule, spectral the one "
        "to train with (default: %(default)s)")
    add("--lr", type=number(float, 0, 1e30), help="a baseline's learning rate (default: adam "
        "0.001, sgd 0.1, the class's own)")
    add("--seed", type=number(int, 0), default=0, help="weights, order, augmentation (default: 0)")
    add("--precision", type=one_of(precisions), default="fp32", metavar="P",
        help="fp32 (the paper's), tf32 (NVIDIA GPUs from Ampere on), bf16 (autocast; weights, loss "
        "and optimiser stay float32) (default: fp32)")
    add("--deterministic", action="store_true", help="the same bits each time on GPUs too "
        "(slower; an operation that has no such form is named)")
    add = p.add_argument_group("how fast (the same result, up to rounding)").add_argument
    modes = {"type": one_of(MODES), "default": "auto", "metavar": "MODE"}
    add("--cuda_graph", **modes, help="a step as one CUDA graph: auto (where it is possible: one "
        "GPU, arrays, whole batches, agd or a baseline), on, off (default: auto)")
    add("--compile", action="store_true", help="torch.compile the network")
    add("--channels_last", **modes, help="layout of convolutions' weights: auto (on GPUs unless "
        "fp32, whose kernels are slower so), on, off (default: auto)")
    add("--profile", action="store_true", help="a table and traces of where the time goes")
    add = p.add_argument_group("where").add_argument
    add("--data_dir", default=data_dir,
        help="data sets (default: $AGD_DATA or ~/.cache/agd)")
    add("--out", default="results", help="logs and checkpoints (default: %(default)s)")
    add("--save_every", type=checked(every), default="10m", metavar="EVERY", help="time or "
        "steps between two checkpoints (90s, 10m, 2h; 500), in addition to one after every epoch "
        "(default: 10m)")
    add("--fresh", action="store_true", help="start over: delete the log and the "
        "checkpoints of an earlier run of the same name")
    add("--replay", metavar="FILE", help="repeat the run of a record, <out>/logs/NAME.run.json, "
        "and compare the bits; only --out (default: replayed), --data_dir and --device may be "
        "given with it")
    add("--device", help="as torch spells it (default: a GPU if there is one)")
    add("--cpu", action="store_true", help="the same as --device cpu")
    add("--distribute", action="store_true", help="many devices: under torchrun, srun or mpirun")
    add("--check", action="store_true", help="look for what would stop the run, and do not run")
    add = p.add_argument_group("image folders").add_argument
    add("--image_size", type=number(int, 32, 8192), help="side in pixels (default: 224)")
    add("--workers", type=number(int, 0, 1024), default=min(8, os.cpu_count() or 1),
        help="processes that decode images (default: %(default)s)")
    add("--skip_bad_images", action="store_true", help="leave out images that cannot be decoded")
    add = p.add_argument_group("log").add_argument
    add("--log_steps", nargs="?", const="all", type=all_or(number(int, 1)), metavar="EPOCHS",
        help="a row a step beside the row an epoch, in the first EPOCHS or in all")
    add("--log_updates", action="store_true",
        help="how large the updates are, relative to the weights")
    return p


def words(p, flags):
    """The command line beyond its defaults that gives `flags`, a dict of a whole Namespace; without
    those that choose what becomes of an earlier run, and what is shown."""
    passing = ("out", "fresh", "profile", "check", "cpu", "save_every", "replay")
    found = []
    for action in p._actions:
        value = flags.get(action.dest, action.default)
        if action.dest in passing or value == action.default or value is None or value is False:
            continue
        flag = action.option_strings[-1]
        found.append(flag if value is True else f"{flag}={value}")
    return found


def replayed(p, args, argv):
    """The flags that --replay FILE stands for: those of the record, with --out, --data_dir and
    --device as they are given beside it."""
    unset = object()
    given = vars(p.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), unset))))
    given = {key: value for key, value in given.items() if value is not unset}
    odd = [key for key in given if key not in ("replay", "out", "data_dir", "device")]
    if odd:
        p.error(f"--replay takes a run's flags from its record: leave out --{odd[0]}")
    try:
        record = read(args.replay)
    except RecordError as error:
        p.error(str(error))
    odd = [key for key in record["flags"] if key not in vars(args)]
    if odd:
        p.error(f"{args.replay} has --{shown(odd[0])}, which no longer exists; its commit has it: "
                f"{shown(record['code']['commit'])}")  # fmt: skip
    if not record["results"]:
        p.error(f"{args.replay} is of a run that has not come to its end: there is no result")
    # The end that is compared is the last one, whatever more was asked for.
    flags = {**record["flags"], "epochs": record["results"][-1]["epochs"], **given}
    if not os.path.isdir(os.path.expanduser(str(flags.get("data_dir")))):  # another machine's
        flags["data_dir"] = args.data_dir
    args = p.parse_args(words(p, flags))
    args.out, args.fresh, args.replay = given.get("out", "replayed"), True, given["replay"]
    return args


def layers(args):
    """How the optimiser finds the number of layers, one of LAYERS: as asked, or the default; the
    paper counts those of its networks."""
    paper = args.optimizer == "agd" and not args.arch.startswith(LIBRARIES)
    return args.layers or ("count" if paper else "paths")


def is_folder(args):
    return args.dataset == "imagenet" or args.dataset.startswith("folder:")


def test_batch(args):
    """Images at a time in testing that are about as fast as any number, as measured: on a CPU the
    activations stay in its caches; on a GPU a batch keeps all of it at work."""
    if not args.device.startswith("cuda"):
        return 1000 if args.arch == "fcn" else 64
    return 4 * args.train_bs if is_folder(args) else 10_000


def no_graph(args):
    """Why a step cannot be a CUDA graph, in words, or None."""
    if not args.device.startswith("cuda"):
        return "it takes a CUDA device"
    if args.distribute:
        return "it takes a single process"
    if is_folder(args):
        return "it takes a data set of arrays"
    if args.micro_bs is not None:
        return "it takes whole batches, without --micro_bs"
    if "." in args.optimizer:
        return f"{args.optimizer} may read from the device"
    return None


def name_and_settings(args):
    """The run's name, and the settings that shape its result: runs that agree in them have the same
    weights after the same epoch, up to rounding, and, where there is batch norm without --sync_bn,
    up to the number of ranks and micro-batches."""
    keys = ["arch", "dataset", "loss", "train_bs", "optimizer", "lr", "gain", "seed", "image_size"]
    keys += ["train_examples", "test_examples", "skip_bad_images"]
    keys += (["depth", "width"] if args.arch == "fcn" else [])
    settings = {key: getattr(args, key) for key in keys}
    if args.sync_bn:
        settings["sync_bn"] = True
    if args.precision != "fp32":
        settings["precision"] = args.precision
    for key in ("bias", "affine", "layers", "freeze"):
        if getattr(args, key) is not None:
            settings[key] = getattr(args, key)
    if args.weights is not None:  # wherever they lie
        settings["weights"] = data_sha256(args.weights)["sha256"]
    arch, dataset = args.arch, args.dataset
    if dataset.startswith("folder:"):  # its last part, for people, and what tells paths apart
        dataset = f"{os.path.basename(dataset)}_{zlib.crc32(dataset.encode()):08x}"
    if dataset.startswith("npz:"):  # its checksums are settings, wherever it lies
        file = os.path.basename(dataset[len("npz:") :])
        settings["dataset"], dataset = f"npz:{file}", f"npz_{file.removesuffix('.npz')}"
    name = run_name(
        f"{arch}{args.depth}x{args.width}" if arch == "fcn" else arch.replace(":", "_"),
        "bias" if args.bias else None,
        "affine" if args.affine else None,
        None if args.weights is None else f"from_{Path(args.weights).stem}",
        None if args.freeze is None else f"freeze_{args.freeze}",
        dataset,
        args.image_size,
        None if args.train_examples is None else f"train{args.train_examples}",
        None if args.test_examples is None else f"test{args.test_examples}",
        args.loss,
        f"bs{args.train_bs}",
        args.optimizer,
        args.layers,
        None if args.gain == 1 else f"gain{decimal(args.gain)}",
        None if args.lr is None else f"lr{decimal(args.lr)}",
        f"seed{args.seed}",
        "skip" if args.skip_bad_images else None,
        "syncbn" if args.sync_bn else None,
        None if args.precision == "fp32" else args.precision,
        {None: None, "all": "steps"}.get(args.log_steps, f"steps{args.log_steps}"),
        "updates" if args.log_updates else None,
    )
    return name, settings


def decimal(x):
    """A float without an exponent: 1e-05 as 0.00001."""
    return format(Decimal(repr(x)), "f")
