"""The command line of main.py: its table of flags, and the settings that they stand for."""

import argparse
import os
import sys

import torch

from architecture import NETWORKS, Unfit, is_library, libraries
from architecture.libraries import PREFIXES as LIBRARIES
from architecture.weights import SUFFIXES
from cli import Joined, Parser, all_or, checked, command, every, near, number, one_of
from data import DATASETS, default_data_dir, is_folder
from distributed.launch import is_first
from runs.record import RecordError, read, shown
from training.losses import LOSSES
from training.optimizers import AUTOMATIC, BASELINES, optimizer_class
from training.precision import PRECISIONS, lacks_tf32

MODES = ("auto", "on", "off")
LAYERS = ("count", "paths")


def parser():
    """The command line: every flag with its type, default and help."""
    optimizers = [*AUTOMATIC, *BASELINES]

    def optimizer(value):
        return value if "." in value else one_of(optimizers)(value)

    p = Parser(
        prog=command("main"),
        allow_abbrev=False,
        description="Train a network with Automatic Gradient Descent (AGD): no learning rate.",
        epilog="The same command goes on where the last one stopped; a larger --epochs goes on "
        "from a finished run.",
    )
    add = p.add_argument_group("what to train").add_argument
    add("--arch", type=one_of(NETWORKS, *LIBRARIES, rest="NAME"), default="fcn", metavar="NET",
        help=f"{', '.join(NETWORKS)}; torchvision:NAME or timm:NAME, a classifier of theirs, with "
        "their start of the weights (default: %(default)s)")
    add("--dataset", type=one_of(DATASETS, "folder:", "npz:"), default="cifar10", metavar="SET",
        help=f"{', '.join(DATASETS)}; folder:PATH with train/ and val/; npz:FILE in --data_dir, "
        "arrays as data.prepare writes them (default: %(default)s)")
    add("--loss", type=one_of(LOSSES), default="mse", metavar="LOSS",
        help="mse (square loss) or xent (cross-entropy) (default: %(default)s)")
    add("--depth", type=number(int, 2, 10_000), default=10, help="layers of the fcn (default: 10)")
    add("--width", type=number(int, 1, 1_000_000), default=256,
        help="width of the fcn (default: 256)")
    # None, not False, where they are off: what earlier runs have logged of them.
    add("--bias", action="store_true", default=None,
        help=f"biases in the layers of {', '.join(NETWORKS)}")
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
    add("--precision", type=one_of(PRECISIONS), default="fp32", metavar="P",
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
    add("--data_dir", default=default_data_dir(),
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
    """The words of the command line that set `flags`, a dict of all of them, beyond their defaults.
    Flags that concern an earlier run or the screen are left out."""
    passing = ("out", "fresh", "profile", "check", "cpu", "save_every", "replay")
    line = []
    for action in p._actions:
        value = flags.get(action.dest, action.default)
        if action.dest in passing or value == action.default or value is None or value is False:
            continue
        flag = action.option_strings[-1]
        line.append(flag if value is True else f"{flag}={value}")
    return line


def replayed(p, args, argv):
    """The Namespace of --replay FILE: the record's flags, and --out, --data_dir and --device as
    given beside it."""
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
        p.error(f"{args.replay} is of a run that has not finished: there is no result")
    # The last result is compared, also where more epochs were requested.
    flags = {**record["flags"], "epochs": record["results"][-1]["epochs"], **given}
    if not os.path.isdir(os.path.expanduser(str(flags.get("data_dir")))):  # another machine's
        flags["data_dir"] = args.data_dir
    args = p.parse_args(words(p, flags))
    args.out, args.fresh, args.replay = given.get("out", "replayed"), True, given["replay"]
    return args


def layers(args):
    """How AGD finds L, one of LAYERS: as requested, or the default; the paper counts the weights of
    its networks."""
    paper = args.optimizer == "agd" and not args.arch.startswith(LIBRARIES)
    return args.layers or ("count" if paper else "paths")


def settings(args):
    """[(flag, value)] of the flags that are not at their defaults, and the device."""
    hidden = {"cpu"} | ({"test_bs"} if args.test_bs == test_batch(args) else set())
    defaults = {x.dest: x.default for x in parser()._actions if x.dest not in hidden}
    return [(key, value) for key, value in vars(args).items()
            if value is not None and value != defaults.get(key, value)]  # fmt: skip


def test_batch(args):
    """The test batch that is about as fast as any, as measured: on a CPU activations stay in its
    caches; on a GPU a batch occupies all of it."""
    if not args.device.startswith("cuda"):
        return 1000 if args.arch == "fcn" else 64
    return 4 * args.train_bs if is_folder(args.dataset) else 10_000


def no_graph(args):
    """Why a step cannot be a CUDA graph, in words, or None."""
    if not args.device.startswith("cuda"):
        return "it takes a CUDA device"
    if args.distribute:
        return "it takes a single process"
    if is_folder(args.dataset):
        return "it takes a data set of arrays"
    if args.micro_bs is not None:
        return "it takes whole batches, without --micro_bs"
    if "." in args.optimizer:
        return f"{args.optimizer} may read from the device"
    return None


def parse(argv=None, check=True):
    """The Namespace of the command line, complete and consistent. `check`: also refuse a device or
    a package that this machine lacks."""
    p = parser()
    p.silent = "--distribute" in sys.argv and not is_first()  # rank 0 prints
    args = p.parse_args(argv)
    if args.replay is not None:
        args = replayed(p, args, argv)
    if args.cpu:
        if args.device not in (None, "cpu"):
            p.error(f"--cpu contradicts --device {args.device}")
        args.device = "cpu"
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    # Of several ranks each takes a GPU of its own later; this would touch the first one.
    probe = check and not (args.distribute and args.device == "cuda" and torch.cuda.is_available())
    try:
        torch.empty(0, device=args.device if probe else "cpu").cpu()
    except (RuntimeError, AssertionError) as error:  # meta has no .cpu()
        p.error(f"no device {args.device!r} here: {str(error).splitlines()[0].split('. ')[0]}")
    if args.optimizer in AUTOMATIC and args.lr is not None:
        own = AUTOMATIC[args.optimizer].__name__
        p.error(f"{own} has no learning rate; --lr is for the baselines (--gain scales its update)")
    if args.optimizer not in AUTOMATIC and args.gain != 1:
        p.error(f"--gain is AGD's; {args.optimizer} has --lr")
    if args.optimizer in BASELINES and args.lr is None:
        args.lr = BASELINES[args.optimizer][1]
    if check and args.optimizer not in (*AUTOMATIC, *BASELINES):
        try:
            optimizer_class(args.optimizer)
        except ValueError as error:
            p.error(str(error))
    network_flags(p, args, check)
    folder = is_folder(args.dataset)
    for part in ("train", "test"):
        if folder and getattr(args, f"{part}_examples") is not None:
            p.error(f"--{part}_examples is for the prepared sets, not for {args.dataset}")
    if args.dataset.startswith("folder:"):
        path = os.path.abspath(os.path.expanduser(args.dataset[len("folder:") :]))
        home = os.path.expanduser("~") + os.sep  # a name that holds for every account
        args.dataset = "folder:" + ("~/" + path[len(home) :] if path.startswith(home) else path)
    if folder:
        args.image_size = args.image_size or 224
    elif args.image_size is not None:
        p.error(f"--image_size is for imagenet and folder:PATH, not {args.dataset}")
    if args.test_bs is None:
        args.test_bs = test_batch(args)
    if check and args.cuda_graph == "on" and no_graph(args):
        p.error(f"--cuda_graph on: {no_graph(args)}")
    if probe and args.precision == "tf32" and lacks_tf32(torch.device(args.device)):
        p.error(f"--precision tf32: device {args.device} has none; NVIDIA GPUs from Ampere on do")
    return args


def network_flags(p, args, check):
    """Refuse flags of the network that contradict each other, and with `check` absent files."""
    library, _, name = args.arch.partition(":")
    for key, what in (("bias", "biases"), ("affine", "norms")):
        if is_library(args.arch) and getattr(args, key):
            p.error(f"--{key} is for {', '.join(NETWORKS)}; {args.arch} has {what} of its own")
    if args.arch == "fcn" and args.affine:
        p.error("--affine is for networks with norms, and the fcn has none")
    if args.layers is not None and args.optimizer not in AUTOMATIC:
        p.error(f"--layers is AGD's; {args.optimizer} does not ask for their number")
    asked, args.layers = args.layers, None
    if asked != layers(args):  # the default has one name, whether or not it is given
        args.layers = asked
    if args.weights is not None:
        args.weights = os.path.expanduser(args.weights)
        if not args.weights.endswith(SUFFIXES):
            p.error(f"--weights {args.weights} is none of {', '.join(SUFFIXES)}")
    if not check:
        return
    if args.weights is not None and not os.path.isfile(args.weights):
        p.error(f"--weights: there is no file {args.weights}")
    if is_library(args.arch):
        try:
            names = libraries.names(library)
        except Unfit as error:
            p.error(f"--arch {error}")
        if name not in names:
            p.error(f"{library} has no classifier {name!r}{near(name, names)}")
