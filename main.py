"""Train a network with AGD, or with a baseline, from one command: see `python main.py --help`."""

import signal
import sys

if __name__ == "__main__":  # no traceback of half an import, until main() takes over
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import math
import os
import threading
import time
from contextlib import nullcontext
from datetime import datetime, timezone

import torch

import display
import distributed
import flags
from architecture import NETWORKS, build
from arithmetic import PRECISIONS, lacks_tf32, set_channels_last, set_precision
from data import DATASETS, DataError, default_data_dir, load
from flags import name_and_settings
from gradient import CompileError, Gradient, OutOfMemory
from optimizers import BASELINES, make_optimizer, optimizer_class, set_capturable
from replay import RecordingError, Replay
from run import Run, RunError, environment
from train import LOSSES, Step, evaluate, train_epoch

# Errors whose message says all that is to be known.
EXPECTED = (DataError, RunError, OutOfMemory, CompileError, RecordingError)
SEEDING = threading.Lock()  # the global generator is that of all the threads


def parse(argv=None, check=True):
    """The settings, complete and consistent; without `check`, whether or not the device and the
    optimiser's package are there."""
    optimizers = ["agd", *BASELINES]
    p = flags.parser(NETWORKS, DATASETS, LOSSES, optimizers, PRECISIONS, default_data_dir())
    args = p.parse_args(argv)
    if args.cpu:
        if args.device not in (None, "cpu"):
            p.error(f"--cpu contradicts --device {args.device}")
        args.device = "cpu"
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    # Of several ranks each has a GPU of its own, found later; this would touch the first one.
    probe = check and not (args.distribute and args.device == "cuda" and torch.cuda.is_available())
    try:
        torch.empty(0, device=args.device if probe else "cpu").cpu()
    except (RuntimeError, AssertionError) as error:  # meta has no .cpu()
        p.error(f"no device {args.device!r} here: {str(error).splitlines()[0]}")
    if args.optimizer == "agd" and args.lr is not None:
        p.error("AGD has no learning rate; --lr is for the baselines (--gain scales AGD's update)")
    if args.optimizer != "agd" and args.gain != 1:
        p.error(f"--gain is AGD's; {args.optimizer} has --lr")
    if args.optimizer in BASELINES and args.lr is None:
        args.lr = BASELINES[args.optimizer][1]
    if check and args.optimizer not in ("agd", *BASELINES):
        try:
            optimizer_class(args.optimizer)
        except ValueError as error:
            p.error(str(error))
    folder = flags.is_folder(args)
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
        args.test_bs = flags.test_batch(args)
    if check and args.cuda_graph == "on" and flags.no_graph(args):
        p.error(f"--cuda_graph on: {flags.no_graph(args)}")
    if probe and args.precision == "tf32" and lacks_tf32(torch.device(args.device)):
        p.error(f"--precision tf32: device {args.device} has none; NVIDIA GPUs from Ampere on do")
    return args


def spread(key, values):
    """The least, the mean and the greatest of an epoch's finite values, or None for each."""
    values = [x for x in values or [] if math.isfinite(x)]
    found = (min(values), sum(values) / len(values), max(values)) if values else (None,) * 3
    return dict(zip((f"{key}_min", f"{key}_mean", f"{key}_max"), found))


def epoch_row(epoch, train, test, seconds, training_seconds):
    steps = train["steps"]
    return {
        "kind": "epoch",
        "epoch": epoch,
        "train_loss": train["loss"],
        "train_acc": train["acc"],
        "test_loss": test["loss"],
        "test_acc": test["acc"],
        **spread("eta", steps["eta"]),
        **(spread("update", steps["update"]) if steps["update"] else {}),
        "seconds": seconds,
        "images_per_second": train["examples"] / training_seconds,
    }


def step_rows(epoch, steps):
    columns = {key: values for key, values in steps.items() if values or key == "eta"}
    columns["eta"] = steps["eta"] or [None] * len(steps["loss"])
    return [
        {"kind": "step", "epoch": epoch, "step": i, **dict(zip(columns, values))}
        for i, values in enumerate(zip(*columns.values()), 1)
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


def main(argv=None):
    """Run the command line; returns the exit code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = parse(argv)
    if args.check:
        import check  # what a run does not need

        return check.main(args)
    try:
        world = distributed.start(torch.device(args.device), args.distribute)
    except (distributed.LaunchError, KeyboardInterrupt) as error:
        return say("interrupted" if isinstance(error, KeyboardInterrupt) else str(error))
    try:
        with stream_of_its_own(world):
            code = train(args, world)
    except (Exception, KeyboardInterrupt) as error:
        reason, trace = world.failed(error, EXPECTED)
        if trace and world.size == 1:
            raise
        code = say(reason, trace) if world.speaks else exit_code(reason)
    return world.leave(code)


def say(reason, trace=None):
    """Print why nothing came of it; returns the exit code."""
    if reason == "interrupted":
        print("interrupted", file=sys.stderr)
    elif reason:
        print(f"{trace or ''}error: {reason}", file=sys.stderr)
    return exit_code(reason)


def stream_of_its_own(world):
    """A context in which a single process works on a GPU in a stream of its own: where a graph can
    be recorded, and where other threads of the process do not wait."""
    if world.device.type != "cuda" or world.size > 1:
        return nullcontext()
    return torch.cuda.stream(torch.cuda.Stream(world.device))


def train(args, world):
    """Data, network, optimiser, epochs; returns the exit code."""
    first = world.rank == 0  # the rank that prints and writes
    if first:
        settings = [(key, value) for key, value in vars(args).items() if value is not None]
        display.table(("Setting", "Value"), settings)
    else:
        world.agree()  # the first rank prepares the data
    data = load(
        args.dataset, args.data_dir, args.train_bs, args.test_bs, world.device, args.seed,
        args.workers, args.image_size, args.skip_bad_images, world.rank, world.size,
        args.train_examples, args.test_examples,
    )  # fmt: skip
    if first:
        world.agree()

    with SEEDING:
        torch.manual_seed(args.seed)
        net = build(args.arch, data.shape, data.classes, args.depth, args.width)
    net.to(world.device)
    set_precision(net, args.precision, world.device)
    channels_last = set_channels_last(net, args.channels_last, args.precision, world.device)
    optimizer = make_optimizer(args, net)
    no_graph = "--cuda_graph off" if args.cuda_graph == "off" else flags.no_graph(args)
    facts = {
        "weights": sum(p.numel() for p in net.parameters()),
        "layers": len(list(net.parameters())),
        "train_examples": data.train.examples,
        "test_examples": data.test.examples,
        "precision": args.precision,
        "compile": args.compile,
        "channels_last": channels_last,
        "cuda_graph": no_graph is None,
        **({} if no_graph is None else {"no_cuda_graph": no_graph}),
        "test_bs": args.test_bs,
    }
    if first:
        layers = [(name, tuple(p.shape)) for name, p in net.named_parameters()]
        display.table(("Layer", "Shape"), layers)
        print("{weights:,} weights in {layers} layers; {train_examples:,} training and "
              "{test_examples:,} test images\n".format(**facts))  # fmt: skip

    name, settings = name_and_settings(args)
    finished = None
    if first:
        run = Run(args.out, name, {**settings, "data": data.source})
        if args.fresh:
            run.lock_or_fail()
            run.discard()
        finished = run.finished(args.epochs)
    finished = world.agree(finished)
    if finished is not None:
        if first:
            display.already(run, *finished)
        return exit_code(finished[-1])

    checkpoint = None
    if first:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        checkpoint = run.start(
            {"kind": "run", "name": name, "flags": vars(args), **environment(world.device),
             "ranks": world.size, "launcher": world.launcher, "data": data.source, **facts,
             "date": now},
        )  # fmt: skip
    checkpoint = world.agree(checkpoint)
    done, rows = 0, world.agree(run.epochs() if first else None)
    if checkpoint is not None:
        done = checkpoint["epoch"]
        net.load_state_dict(checkpoint["net"])
        optimizer.load_state_dict(checkpoint["optimizer"])
    set_capturable(optimizer, no_graph is None, world.device)
    if checkpoint is not None and first:
        print(f"Going on after epoch {done} of {run.log_path}\n", flush=True)

    model, loss_fn = world.wrap(net, args.sync_bn), LOSSES[args.loss]
    # What had to be lowered for want of memory stays so, unless the command says otherwise.
    lowered = rows[-1].get("micro_bs") if rows and rows[-1].get("lowered") else None
    profile = make_profile(args, name, world, len(data.train)) if first else None
    gradient = Gradient(
        model, loss_fn, world, args.micro_bs or lowered, args.sync_bn,
        torch.compile(model, dynamic=False) if args.compile else None,
        profile.span if profile else nullcontext,
    )  # fmt: skip
    replay = None
    if no_graph is None:
        step = Step(model, loss_fn, optimizer, gradient, args.log_updates)
        steps = profile.last if profile else 0  # which are profiled as they are
        replay = Replay(step, data.train, args.cuda_graph == "on", after=steps)
    stopped, final, began = None, True, time.perf_counter()
    progress = display.Progress(args.epochs, len(data.train), done, quiet=not first)

    def on_step():
        progress.step()
        if profile:
            profile.step()

    if profile and replay:
        progress.note("The steps of the profile run one kernel at a time, without a CUDA graph")
    try:
        for epoch in range(done + 1, args.epochs + 1):
            start, micro_bs = time.perf_counter(), gradient.micro_bs
            data.train.set_epoch(epoch)
            if profile and epoch == done + 1:
                profile.step()
            failure = replay and replay.failure
            trained = train_epoch(
                model, data.train, loss_fn, optimizer, gradient, on_step, args.log_updates, replay
            ).read(world.sum)
            complete(trained, data.train, world)
            if replay and replay.failure != failure:
                progress.note(f"No CUDA graph of a step: {replay.failure}")
            if gradient.micro_bs != micro_bs:
                progress.note(f"Memory ran out: {gradient.micro_bs} images at a time from now on")
            training_seconds = time.perf_counter() - start
            world.share(net.buffers())  # batch-norm statistics: those of the first rank
            with profile.evaluation() if profile and epoch == done + 1 else nullcontext():
                tested = evaluate(net, data.test, loss_fn, gradient.micro_bs).read(world.sum)
            complete(tested, data.test, world)
            together(net, epoch, world)
            row = epoch_row(epoch, trained, tested, time.perf_counter() - start, training_seconds)
            if replay and replay.failure:
                row["no_cuda_graph"] = replay.failure
            if gradient.micro_bs is not None:
                row["micro_bs"] = gradient.micro_bs
                row["lowered"] = gradient.micro_bs != args.micro_bs
            stopped = not_finite(args, epoch, trained["steps"]["loss"])
            if first:
                steps = args.log_steps == "all" or epoch <= (args.log_steps or 0)
                run.log(*(step_rows(epoch, trained["steps"]) if steps else []), row)
                progress.epoch(row)
                if profile and epoch == done + 1:
                    profile.write()
                    progress.profile(profile)
                if stopped is None:
                    run.save(epoch, net.state_dict(), optimizer.state_dict())
            rows.append(row)
            if stopped is not None:
                break
        bad = sorted(set().union(*world.gather(bad_images(data))))
    except (Exception, KeyboardInterrupt) as error:
        if world.size > 1:  # a second Ctrl-C, while the ranks hear of one another, changes nothing
            for ending in (signal.SIGINT, signal.SIGTERM):
                signal.signal(ending, signal.SIG_IGN)
        (stopped, trace), final, bad = world.failed(error, EXPECTED), False, bad_images(data)
        if trace and first:
            print(trace, end="", file=sys.stderr)
    finally:
        progress.close()
    if first:
        last = rows[-1] if rows else {}
        last = {k: last.get(k) for k in ("train_loss", "train_acc", "test_loss", "test_acc")}
        # A device may wait for ranks that are gone: what it holds is not asked for then.
        readable = args.optimizer == "agd" and (world.size == 1 or stopped is None)
        skipped = int(optimizer.skipped) if readable else 0
        seconds = sum(row["seconds"] for row in rows)
        run.log({"kind": "end", "epochs": len(rows), **last, "stopped": stopped, "final": final,
                 "skipped_steps": skipped, "bad_images": len(bad), "seconds": seconds})
        run.release()
        display.summary(run, rows, done, stopped, time.perf_counter() - began, skipped, bad)
    elif world.speaks:
        return say(stopped)
    return exit_code(stopped)


def make_profile(args, name, world, steps):
    """The Profile that --profile asks for, or None."""
    if not args.profile:
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks of devices it cannot find
    from profiling import Profile  # what a run does not need

    return Profile(os.path.join(args.out, "profiles"), name, world.device, steps)


def bad_images(data):
    """The paths of the images that could not be decoded on this rank."""
    return sorted(set().union(*(getattr(part, "bad_images", ()) for part in data[:2])))


def complete(figures, batches, world):
    """Raises where an epoch did not see every image once, over all the ranks."""
    missing = sum(world.gather(batches.missing))
    if figures["examples"] + missing != batches.examples:
        raise distributed.RankError(
            f"{figures['examples']} images went through the network and {missing} could not be "
            f"decoded, of {batches.examples}: the ranks' shares are not the whole"
        )
    if not figures["examples"]:
        raise distributed.RankError(f"none of the {batches.examples} images can be decoded")


def together(net, epoch, world):
    """Raises where the ranks do not hold the same weights, to the bit."""
    drifted = world.drifted(net.parameters())
    if drifted:
        ranks = f"rank {drifted[0]} holds other weights than the rest"
        if len(drifted) > 1:
            ranks = f"ranks {', '.join(map(str, drifted))} hold other weights than the rest"
        if world.size == 2:
            ranks = "ranks 0 and 1 hold different weights"
        raise distributed.RankError(
            f"{ranks} after epoch {epoch}: nodes of different hardware or software, or faulty "
            "memory"
        )


def exit_code(stopped):
    """0 for a run that came to its end, else by what stopped it."""
    return {None: 0, "interrupted": 130}.get(stopped, 1)


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C; a queue's way to end a job
        signal.signal(ending, signal.default_int_handler)
    sys.exit(main())
