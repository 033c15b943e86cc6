"""Train a network with AGD, or with a baseline, from one command: see `python main.py --help`."""

import argparse
import difflib
import importlib
import math
import os
import sys
import time
from datetime import datetime, timezone

import torch
from tqdm import tqdm

import distributed
from agd import AGD, init_weights
from architecture import NETWORKS, build
from data import DATASETS, DataError, default_data_dir, load
from run import Run, RunError, environment, run_name
from train import LOSSES, evaluate, train_epoch

BASELINES = {"adam": (torch.optim.Adam, 1e-3), "sgd": (torch.optim.SGD, 0.1)}  # and default rates


class Parser(argparse.ArgumentParser):
    """An argument parser that suggests what was meant."""

    def parse_args(self, args=None, namespace=None):
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            self.error(f"there is no flag {flag}{near(flag, self._option_string_actions)}")
        return args

    def error(self, message):
        self.exit(2, f"error: {message}\n       python main.py --help lists the flags\n")


def near(word, words):
    """A suggestion, or nothing."""
    close = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def one_of(names, prefix=None):
    """An argument type: one of `names`, or anything that starts with `prefix`."""

    def check(value):
        if value in names or (prefix and value.startswith(prefix) and value != prefix):
            return value
        listed = ", ".join(names) + (f", {prefix}PATH" if prefix else "")
        raise argparse.ArgumentTypeError(f"no {value!r} among {listed}{near(value, names)}")

    return check


def number(kind, least, above=False):
    """An argument type: an int or a finite float, from `least` on, or above it."""

    def check(value):
        try:
            x = kind(value)
        except ValueError:
            x = math.nan
        if not (math.isfinite(x) and (x > least if above else x >= least)):
            what = "a whole number" if kind is int else "a finite number"
            bound = "above" if above else "from"
            raise argparse.ArgumentTypeError(f"{value!r} is not {what} {bound} {least}")
        return x

    return check


def optimizer_name(value):
    """An argument type: agd, a baseline, or package.Class (imported when it is built)."""
    return value if "." in value else one_of(["agd", *BASELINES])(value)


def parser():
    p = Parser(
        prog="main.py",
        allow_abbrev=False,
        description="Train a network with Automatic Gradient Descent (AGD): no learning rate.",
        epilog="The same command goes on where the last one stopped; a larger --epochs goes on "
        "from a finished run.",
    )
    add = p.add_argument_group("what to train").add_argument
    add("--arch", type=one_of(NETWORKS), default="fcn", metavar="NET",
        help=f"{', '.join(NETWORKS)} (default: %(default)s)")
    add("--dataset", type=one_of(DATASETS, "folder:"), default="cifar10", metavar="SET",
        help=f"{', '.join(DATASETS)}, or folder:PATH with train/ and val/ (default: %(default)s)")
    add("--loss", type=one_of(LOSSES), default="mse", metavar="LOSS",
        help="mse (square loss) or xent (cross-entropy) (default: %(default)s)")
    add("--depth", type=number(int, 2), default=10, help="layers of the fcn (default: 10)")
    add("--width", type=number(int, 1), default=256, help="width of the fcn (default: 256)")
    add = p.add_argument_group("how").add_argument
    add("--epochs", type=number(int, 1), default=200, help="(default: 200)")
    add("--train_bs", type=number(int, 1), default=128, help="images a step (default: 128)")
    add("--test_bs", type=number(int, 1), default=128, help="in testing (default: 128)")
    add("--gain", type=number(float, 0), default=1.0, help="multiplies AGD's update (default: 1)")
    add("--optimizer", type=optimizer_name, default="agd", metavar="OPT",
        help="agd, adam, sgd or package.Class (default: %(default)s)")
    add("--lr", type=number(float, 0), help="a baseline's learning rate (default: adam 0.001, "
        "sgd 0.1, the class's own)")
    add("--seed", type=number(int, 0), default=0, help="weights, order, augmentation (default: 0)")
    add = p.add_argument_group("where").add_argument
    add("--data_dir", default=default_data_dir(),
        help="data sets (default: $AGD_DATA or ~/.cache/agd)")
    add("--out", default="results", help="logs and checkpoints (default: %(default)s)")
    add("--fresh", action="store_true", help="forget an earlier run of the same name")
    add("--device", help="as torch spells it (default: a GPU if there is one)")
    add("--cpu", action="store_true", help="the same as --device cpu")
    add("--distribute", action="store_true", help="many devices: under torchrun, srun or mpirun")
    add = p.add_argument_group("image folders").add_argument
    add("--image_size", type=number(int, 32), help="side in pixels (default: 224)")
    add("--workers", type=number(int, 0), default=min(8, os.cpu_count() or 1),
        help="processes that decode images (default: %(default)s)")
    add("--skip_bad_images", action="store_true", help="leave out images that cannot be decoded")
    add = p.add_argument_group("log").add_argument
    add("--log_steps", action="store_true", help="a row a step beside the row an epoch")
    return p


def parse(argv=None):
    """The settings, complete and consistent."""
    p = parser()
    args = p.parse_args(argv)
    if args.cpu:
        if args.device not in (None, "cpu"):
            p.error(f"--cpu contradicts --device {args.device}")
        args.device = "cpu"
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        p.error(f"no device {args.device!r} here: {str(error).splitlines()[0]}")
    if args.optimizer == "agd" and args.lr is not None:
        p.error("AGD has no learning rate; --lr is for the baselines (--gain scales AGD's update)")
    if args.optimizer != "agd" and args.gain != 1:
        p.error(f"--gain is AGD's; {args.optimizer} has --lr")
    if args.optimizer in BASELINES and args.lr is None:
        args.lr = BASELINES[args.optimizer][1]
    folder = args.dataset == "imagenet" or args.dataset.startswith("folder:")
    if folder:
        args.image_size = args.image_size or 224
    elif args.image_size is not None:
        p.error(f"--image_size is for imagenet and folder:PATH, not {args.dataset}")
    return args


def name_and_settings(args):
    """The run's name, and the settings that shape its result: those with the same weights after
    the same epoch agree in them."""
    keys = ["arch", "dataset", "loss", "train_bs", "optimizer", "lr", "gain", "seed", "image_size"]
    keys += ["skip_bad_images"] + (["depth", "width"] if args.arch == "fcn" else [])
    settings = {key: getattr(args, key) for key in keys}
    if args.dataset.startswith("folder:"):
        settings["dataset"] = "folder:" + os.path.abspath(args.dataset[len("folder:") :])
    name = run_name(
        f"{args.arch}{args.depth}x{args.width}" if args.arch == "fcn" else args.arch,
        settings["dataset"],
        args.image_size,
        args.loss,
        f"bs{args.train_bs}",
        args.optimizer,
        None if args.gain == 1 else f"gain{args.gain:g}",
        None if args.lr is None else f"lr{args.lr:g}",
        f"seed{args.seed}",
        "skip" if args.skip_bad_images else None,
        "steps" if args.log_steps else None,
    )
    return name, settings


def make_optimizer(args, net):
    """The optimiser; for AGD the weights are drawn anew, the baselines keep PyTorch's."""
    if args.optimizer == "agd":
        init_weights(net.named_parameters(), torch.Generator().manual_seed(args.seed))
        return AGD(net.named_parameters(), args.gain)
    if args.optimizer in BASELINES:
        return BASELINES[args.optimizer][0](net.parameters(), lr=args.lr)
    module, _, name = args.optimizer.rpartition(".")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        sys.exit(f"error: no optimiser {args.optimizer}: {error}")
    return make(net.parameters(), **({} if args.lr is None else {"lr": args.lr}))


class Display:
    """What a person sees of the epochs: a bar on a terminal, else a line an epoch; or nothing."""

    def __init__(self, epochs, steps, done, quiet):
        self.epochs, self.terminal = epochs, sys.stdout.isatty()
        self.quiet = quiet
        encoding = sys.stdout.encoding or "ascii"
        self.eta = "η" if "η".encode(encoding, "ignore") else "eta"
        self.bar = tqdm(
            total=epochs * steps, initial=done * steps, disable=quiet or not self.terminal,
            file=sys.stdout, bar_format="{desc} {elapsed}<{remaining} {bar}", dynamic_ncols=True,
            desc=f"{done}/{epochs}", ascii=None if self.eta == "η" else " #",
        )  # fmt: skip

    def step(self):
        self.bar.update()

    def epoch(self, row):
        eta = row["eta_mean"]
        if self.terminal:
            parts = [f"{row['epoch']}/{self.epochs}", f"loss {row['train_loss']:.3f}"]
            parts += [f"train {row['train_acc']:.1%}", f"test {row['test_acc']:.1%}"]
            parts += [] if eta is None else [f"{self.eta} {eta:.3f}"]
            parts += [tqdm.format_sizeof(row["images_per_second"]) + " img/s"]
            self.bar.set_description_str(" ".join(parts))
        elif not self.quiet:
            parts = [f"epoch {row['epoch']}/{self.epochs}", f"loss {row['train_loss']:.4f}"]
            parts += [f"train {row['train_acc']:.2%}", f"test {row['test_acc']:.2%}"]
            parts += [] if eta is None else [f"{self.eta} {eta:.4f}"]
            parts += [f"{row['images_per_second']:,.0f} img/s", f"{row['seconds']:.2f} s"]
            print("  ".join(parts), flush=True)

    def close(self):
        self.bar.close()


def epoch_row(epoch, train, test, seconds, training_seconds):
    etas = [x for x in train["steps"]["eta"] or [] if math.isfinite(x)]
    return {
        "kind": "epoch",
        "epoch": epoch,
        "train_loss": train["loss"],
        "train_acc": train["acc"],
        "test_loss": test["loss"],
        "test_acc": test["acc"],
        "eta_min": min(etas) if etas else None,
        "eta_mean": sum(etas) / len(etas) if etas else None,
        "eta_max": max(etas) if etas else None,
        "seconds": seconds,
        "images_per_second": train["examples"] / training_seconds,
    }


def step_rows(epoch, steps):
    etas = steps["eta"] or [None] * len(steps["loss"])
    return [
        {"kind": "step", "epoch": epoch, "step": i, "loss": loss, "acc": acc, "eta": eta}
        for i, (loss, acc, eta) in enumerate(zip(steps["loss"], steps["acc"], etas), 1)
    ]


def not_finite(args, epoch, losses):
    """Why the run has to end, or None."""
    step = next((i for i, loss in enumerate(losses, 1) if not math.isfinite(loss)), None)
    if step is None:
        return None
    remedy = "a smaller --lr"
    if args.optimizer == "agd":
        remedy = "a smaller --gain" if args.gain > 1 else "another --seed, and look at the images"
    return f"the loss was {losses[step - 1]} at epoch {epoch}, step {step}; try {remedy}"


def table(title, rows):
    """Two columns, the first as wide as it has to be."""
    width = max(len(str(row[0])) for row in [title, *rows])
    lines = [f"{row[0]!s:<{width}}  {row[1]}" for row in [title, ("-" * width, "-" * 20), *rows]]
    print("\n".join(line.rstrip() for line in lines) + "\n", flush=True)


def main(argv=None):
    """Run the command line; returns the exit code."""
    args = parse(argv)
    try:
        world = distributed.start(torch.device(args.device), args.distribute)
        try:
            return train(args, world)
        finally:
            world.stop()
    except (DataError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def train(args, world):
    """Data, network, optimiser, epochs; returns the exit code."""
    first = world.rank == 0
    if first:
        table(("Setting", "Value"), [(k, v) for k, v in vars(args).items() if v is not None])

    if not first:
        world.agree()  # the first rank prepares the data
    data = load(
        args.dataset, args.data_dir, args.train_bs, args.test_bs, world.device, args.seed,
        args.workers, args.image_size, args.skip_bad_images, world.rank, world.size,
    )  # fmt: skip
    if first:
        world.agree()
    torch.manual_seed(args.seed)
    net = build(args.arch, data.shape, data.classes, args.depth, args.width).to(world.device)
    optimizer = make_optimizer(args, net)
    weights = list(net.parameters())
    count = sum(p.numel() for p in weights)
    if first:
        table(("Layer", "Shape"), [(name, tuple(p.shape)) for name, p in net.named_parameters()])
        print(f"{count:,} weights in {len(weights)} layers; "
              f"{data.train.examples:,} training and {data.test.examples:,} test images\n")

    name, settings = name_and_settings(args)
    settings["data"] = data.source
    run = Run(args.out, name, settings)
    if args.fresh and first:
        run.discard()
    ended = world.agree(first and report_if_finished(run, args.epochs))
    if ended:
        return 0
    checkpoint = None
    if first:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        checkpoint = run.start(
            {"kind": "run", "name": name, "flags": vars(args), **environment(world.device),
             "ranks": world.size, "data": data.source, "weights": count, "layers": len(weights),
             "train_examples": data.train.examples, "test_examples": data.test.examples,
             "date": now},
            world.device,
        )  # fmt: skip
    checkpoint = world.agree(checkpoint)
    done = 0
    if checkpoint is not None:
        done = checkpoint["epoch"]
        net.load_state_dict(checkpoint["net"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if first:
            print(f"Going on after epoch {done} of {run.log_path}\n", flush=True)
    model = world.wrap(net)

    rows = [row for row in run.rows() if row["kind"] == "epoch"] if first else []
    stopped, began = None, time.perf_counter()
    display = Display(args.epochs, len(data.train), done, quiet=not first)
    loss_fn = LOSSES[args.loss]
    try:
        for epoch in range(done + 1, args.epochs + 1):
            start = time.perf_counter()
            data.train.set_epoch(epoch)
            totals = train_epoch(
                model, data.train, loss_fn, optimizer, world.sum, world.size, display.step
            )
            trained = totals.read(world.sum)
            training_seconds = time.perf_counter() - start
            world.share(net.buffers())  # batch-norm statistics: those of the first rank
            tested = evaluate(net, data.test, loss_fn).read(world.sum)
            row = epoch_row(epoch, trained, tested, time.perf_counter() - start, training_seconds)
            rows.append(row)
            stopped = not_finite(args, epoch, trained["steps"]["loss"])
            if first:
                run.log(*(step_rows(epoch, trained["steps"]) if args.log_steps else []), row)
                display.epoch(row)
                if stopped is None:
                    run.save(epoch, net.state_dict(), optimizer.state_dict())
            if stopped is not None:
                break
    except KeyboardInterrupt:
        stopped = "interrupted"
    finally:
        display.close()
    if first:
        last = rows[-1] if rows else {}
        final = {k: last.get(k) for k in ("train_loss", "train_acc", "test_loss", "test_acc")}
        run.log({"kind": "end", "epochs": len(rows), **final, "stopped": stopped,
                 "seconds": sum(row["seconds"] for row in rows)})  # fmt: skip
        summary(args, run, rows, stopped, time.perf_counter() - began, optimizer, data)
    return 0 if stopped is None else 130 if stopped == "interrupted" else 1


def report_if_finished(run, epochs):
    """Whether an earlier run of this name has nothing left to do; says so."""
    rows = run.rows()
    end = rows[-1] if rows else {}
    if end.get("kind") != "end" or end["stopped"] == "interrupted":
        return False
    if end["stopped"] is None and end["epochs"] < epochs:
        return False
    if end["stopped"] is None:
        print(f"Already finished: {end['epochs']} epochs, test accuracy {end['test_acc']:.2%}.")
    else:
        print(f"Already ended: {end['stopped']}.")
    print(f"{run.log_path} has it; --fresh starts over.")
    return True


def summary(args, run, rows, stopped, seconds, optimizer, data):
    """The last lines of a run."""
    print()
    if stopped == "interrupted":
        print(f"Interrupted after {len(rows)} whole epochs; the same command goes on from there.")
    elif stopped is not None:
        print(f"Stopped: {stopped}.")
    else:
        print(f"Finished {len(rows)} epochs; this command took {seconds:.1f} s for its part.")
    if rows and stopped in (None, "interrupted"):
        last, best = rows[-1], max(rows, key=lambda row: row["test_acc"])
        print(f"Train loss {last['train_loss']:.4f}, train accuracy {last['train_acc']:.2%}, "
              f"test accuracy {last['test_acc']:.2%} "
              f"(best {best['test_acc']:.2%}, epoch {best['epoch']})")
    if args.optimizer == "agd" and int(optimizer.skipped):
        print(f"{int(optimizer.skipped)} steps were skipped for a gradient that was not finite")
    bad = sorted(getattr(data.train, "bad_images", ())) + sorted(
        getattr(data.test, "bad_images", ())
    )
    if bad:
        print(f"{len(bad)} images could not be decoded and were left out: {', '.join(bad[:5])}"
              f"{', ...' if len(bad) > 5 else ''}")
    print(f"Log      {run.log_path}")
    if run.checkpoint_path.exists():
        print(f"Weights  {run.checkpoint_path}")
    if rows:
        print(f"Curves   python -m scripts.plot {run.log_path} -o curves.png")


if __name__ == "__main__":
    sys.exit(main())
