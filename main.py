"""Train a network with AGD, or with a baseline, from one command: see `python main.py --help`."""

import signal
import sys

from training.control import Requests, ignore

if __name__ == "__main__":
    REQUESTS = Requests()
    REQUESTS.install(ending=False)
    # No traceback of half an import, until main() takes over.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import os
import time
from collections import deque
from contextlib import contextmanager, nullcontext
from datetime import datetime, timezone

import torch

import distributed
import flags
from architecture import build, is_library
from architecture.weights import start
from cli import UserError
from data import load
from distributed.slurm import restarted
from runs.log import RunError, RunLog, as_logged
from runs.name import name_and_settings
from runs.provenance import environment
from runs.record import Record, deviation
from training import display
from training.course import SEEDING, Course, Ended
from training.cuda_graph import GraphedSteps
from training.epochs import Epochs
from training.gradient import Gradient, is_out_of_memory
from training.losses import LOSSES
from training.optimizers import AUTOMATIC, make_optimizer, set_capturable
from training.precision import refused, set_channels_last, set_deterministic, set_precision
from training.step import Step

BAD = 2  # the exit code for what nothing can be done with, as that for flags
IDLE_STREAMS = {}  # by device: those in which no run of this process works


def main(argv=None, requests=None):
    """Run the command line; returns the exit code. `requests`: what signals ask of it."""
    requests = requests or Requests()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    args = flags.parse(argv)
    if args.check:
        import check  # what a run does not need

        return check.main(args)
    try:
        world = distributed.start(torch.device(args.device), args.distribute)
    except (distributed.LaunchError, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        code = say("interrupted" if interrupted else str(error))
        return code if interrupted else BAD
    try:
        with stream_of_its_own(world):
            code = train(args, world, requests)
    except (Exception, KeyboardInterrupt) as error:
        failure = world.failed(error)
        if failure.trace and world.size == 1:
            raise
        code = say(*failure[:2]) if failure.first else exit_code(failure.reason)
        code = BAD if exit_code_of(error) == BAD else code
    return world.leave(code)


def say(reason, trace=None):
    """Print why nothing came of it; returns the exit code."""
    if reason == "interrupted":
        print("interrupted", file=sys.stderr)
    elif reason:
        print(f"{trace or ''}error: {reason}", file=sys.stderr)
    return exit_code(reason)


@contextmanager
def stream_of_its_own(world):
    """A context in which a single process works on a GPU in a stream of its own: where a graph can
    be recorded, and where other threads of the process do not wait."""
    if world.device.type != "cuda" or world.size > 1:
        yield
        return
    # torch has 32 and hands them out in turn, whoever still works in one. Every run gives its own
    # back to the next one, so that 32 runs at once never share one.
    free = IDLE_STREAMS.setdefault(world.device, deque())
    try:
        stream = free.pop()
    except IndexError:
        stream = torch.cuda.Stream(world.device)
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        free.append(stream)


def set_up(args, world):
    """(data, network, optimiser, what is to be told of them) of a run."""
    if args.deterministic:
        set_deterministic()
    first = world.rank == 0  # the rank that prints and writes
    if first:
        settings = [(key, value) for key, value in vars(args).items() if value is not None]
        display.table(("Setting", "Value"), settings)
    else:
        world.broadcast_object()  # the first rank prepares the data
    data = load(
        args.dataset, args.data_dir, args.train_bs, args.test_bs, world.device, args.seed,
        args.workers, args.image_size, args.skip_bad_images, world.rank, world.size,
        args.train_examples, args.test_examples,
    )  # fmt: skip
    if first:
        world.broadcast_object()

    with SEEDING:
        torch.manual_seed(args.seed)
        try:
            net = build(
                args.arch, data.shape, data.classes, args.depth, args.width, args.bias, args.affine
            )
            notes = start(net, args.weights, args.freeze)
            net.to(world.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise RunError("the network does not fit into memory") from error
    set_precision(net, args.precision, world.device)
    channels_last = set_channels_last(net, args.channels_last, args.precision, world.device)
    try:
        group = torch.distributed.group.WORLD if world.size > 1 else None
        optimizer = make_optimizer(
            args.optimizer, net, data.shape, lr=args.lr, gain=args.gain, layers=flags.layers(args),
            drawn=not is_library(args.arch) and args.weights is None, seed=args.seed,
            process_group=group,
        )  # fmt: skip
    except (TypeError, ValueError) as error:  # of a class that someone else has written
        said = f"does not take these weights: {' '.join(str(error).split())}"
        raise RunError(f"--optimizer {args.optimizer} {said}") from error
    no_graph = "--cuda_graph off" if args.cuda_graph == "off" else flags.no_graph(args)
    measured = args.optimizer in AUTOMATIC and flags.layers(args) == "paths"
    paths = float(optimizer.L) if measured else None
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    facts = {
        "weights": sum(p.numel() for p in net.parameters()),
        "layers": sum(p.ndim > 1 for p in net.parameters()),
        **({} if not frozen else {"frozen_weights": frozen}),
        **({} if paths is None else {"paths": paths}),
        "train_examples": data.train.examples,
        "test_examples": data.test.examples,
        "precision": args.precision,
        "compile": args.compile,
        "deterministic": args.deterministic,
        "channels_last": channels_last,
        "cuda_graph": no_graph is None,
        **({} if no_graph is None else {"no_cuda_graph": no_graph}),
        "test_bs": args.test_bs,
    }
    if first:
        layers = [(name, f"{tuple(p.shape)}{'' if p.requires_grad else '  frozen'}")
                  for name, p in net.named_parameters()]  # fmt: skip
        display.table(("Layer", "Shape"), layers)
        print("{weights:,} weights in {layers} layers".format(**facts)
              + (f", {frozen:,} of them frozen" if frozen else "")
              + (f", {paths:.4g} layers on a path" if measured else "")
              + "; {train_examples:,} training and {test_examples:,} test images".format(**facts))
        print(*notes, "", sep="\n")
    return data, net, optimizer, facts


def train(args, world, requests):
    """Data, network, optimiser, epochs; returns the exit code."""
    data, net, optimizer, facts = set_up(args, world)
    first, graphs = world.rank == 0, facts["cuda_graph"]
    name, settings = name_and_settings(args)
    run = finished = begun = record = promised = None
    if first:
        run = RunLog(args.out, name, {**settings, "data": data.source})
        command = flags.words(flags.parser(), vars(args))
        record = Record(run.record_path, args, command, run.settings, data, facts, world)
        if args.replay is not None:
            promised = record.promised(args.replay, display.table)
        # A replay that was broken goes on; one that came to its end is made again.
        over = args.fresh if args.replay is None else run.finished(args.epochs) is not None
        if over and not restarted():
            run.lock_or_fail()
            run.discard()
        finished = run.finished(args.epochs)
    finished = world.broadcast_object(finished)
    if finished is not None:
        if first:
            display.already(run, *finished)
        return exit_code(finished[-1])
    if first:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        begun = run.start(
            {"kind": "run", "name": name, "flags": vars(args), **environment(world.device),
             "ranks": world.size, "launcher": world.launcher, "data": data.source, **facts,
             "date": now},
        )  # fmt: skip
        record.begin(begun[0]["epoch"] if begun[0] else None)
    checkpoint, warning = world.broadcast_object(begun or (None, None))
    rows = world.broadcast_object(run.epochs() if first else None)
    done, progress = len(rows), display.Progress(args.epochs, len(data.train), quiet=not first)
    course = Course(
        world, run, data, net, optimizer, LOSSES[args.loss], requests,
        flags.every(args.save_every), progress.note, args.micro_bs, "." in args.optimizer,
        args.seed if is_library(args.arch) else None,
    )  # fmt: skip
    if warning:
        progress.note(f"Warning: {warning}")
    if checkpoint is not None:
        try:
            course.restore(checkpoint)
        except RunError:
            if first:
                run.release()
            raise
        step = f", step {course.step} of {len(data.train)}" if course.step else ""
        if first:
            progress.note(f"Going on after epoch {done}{step}, of {run.log_path}")
            if run.changed:
                odd = ", ".join(key.replace("_", " ") for key in run.changed)
                progress.note(f"Note: not as it began ({odd}): the last digits may differ")
            progress.note("")
    if course.epoch >= args.epochs and course.step:
        if first:
            run.release()
            display.further(run, course.epoch + 1, args.epochs)
        return 0
    set_capturable(optimizer, graphs, world.device)

    model = world.wrap(net, args.sync_bn)
    profile = make_profile(args, name, world, len(data.train)) if first else None
    course.gradient = Gradient(
        model, course.loss_fn, world, course.micro_bs, args.sync_bn,
        torch.compile(model, dynamic=False) if args.compile else None,
        profile.span if profile else nullcontext,
        len(range(world.rank, min(args.train_bs, data.train.examples), world.size)), course.tried,
    )  # fmt: skip
    course.gradient.lowered = course.micro_bs != args.micro_bs
    replay = None
    if graphs:
        step = Step(model, course.loss_fn, optimizer, course.gradient, args.log_updates)
        eager = profile.last if profile else 0  # which are profiled as they are
        required = args.cuda_graph == "on" or requests.shared
        replay = GraphedSteps(step, data.train, required, after=eager)
    if profile and replay:
        progress.note("The steps of the profile run one kernel at a time, without a CUDA graph")
    stopped, final, own, began = None, True, {}, time.perf_counter()
    code, bad, failure = None, None, None
    progress.begin(course.epoch * len(data.train) + course.step)
    try:
        requests.listening = True
        stopped = Epochs(args, course, model, rows, progress, replay, profile).run()
        bad = sorted(set().union(*world.all_gather_object(bad_images(data))))
    except Ended as ended:
        stopped, final, own = ended.reason, ended.final, ended.facts
    except (Exception, KeyboardInterrupt) as error:
        failure, final = world.failed(refused(error) or error), False
        stopped, code = failure.reason, BAD if exit_code_of(error) == BAD else None
        if world.size > 1 and failure.first:
            say(stopped, failure.trace)  # at once: a launcher may end this rank while it writes
        elif failure.first and failure.trace:
            print(failure.trace, end="", file=sys.stderr)
    finally:
        progress.close()
        if replay is not None:
            replay.close()
        for part in data[:2]:
            part.close()
    if stopped is None and course.failure is not None:
        stopped, final = (
            f"all {args.epochs} epochs are done, but not saved: {course.failure}. Once it can be "
            "written, the same command goes on from the last checkpoint"
        ), False
    code = exit_code(stopped) if code is None else code
    if first:
        bad = bad_images(data) if bad is None else bad
        last = rows[-1] if rows else {}
        last = {k: last.get(k) for k in ("train_loss", "train_acc", "test_loss", "test_acc")}
        # A device may wait for ranks that are gone: what it holds is not asked for then.
        readable = args.optimizer in AUTOMATIC and (world.size == 1 or not failure)
        skipped = int(optimizer.skipped) if readable else 0
        seconds = sum(row.get("seconds") or 0 for row in rows)
        end = as_logged(
            {"kind": "end", "epochs": len(rows), **last, "stopped": stopped, "final": final,
             "skipped_steps": skipped, "bad_images": len(bad), "seconds": seconds,
             "saving_seconds": course.saving, **own},
        )  # fmt: skip
        result = None
        if final and not own and not run.pending:  # of whole epochs, all of them in the log
            # First: a run whose end is not logged comes by here again.
            result = record.end(net.state_dict(), [*run.rows(), end])
        unlogged = run.log(end)
        run.release()
        where = course.step and (course.step, len(data.train))
        told = failure is not None and world.size > 1
        if code == BAD and not told:
            say(stopped)
        display.summary(
            run, rows, done, stopped, time.perf_counter() - began, skipped, bad, where,
            told or code == BAD,
        )  # fmt: skip
        if unlogged is not None:
            print(f"error: {run.log_path} lacks its last rows: {unlogged}", file=sys.stderr)
            code = code or 1
        if result is not None and record.problem is not None:
            print(f"There is no record of this result: {record.problem}", file=sys.stderr)
        if result is not None and promised is not None:
            code = compared(promised, result, args.replay)
    if not failure:
        world.broadcast_object()  # launchers end all when one rank ends: none does before all print
    return code


def compared(promised, result, path):
    """Say whether the result of a replay is the one that the record promised; returns the exit
    code."""
    other = deviation(promised, result)
    if other is not None:
        print(f"error: the replay has {other}: {path}", file=sys.stderr)
        return 1
    print(f"The same bits as those of {path}, in the weights and in all rows of the log")
    return 0


def make_profile(args, name, world, steps):
    """The Profile that --profile asks for, or None."""
    if not args.profile:
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler talks of devices it cannot find
    from training.profile import Profile  # what a run does not need

    try:
        return Profile(os.path.join(args.out, "profiles"), name, world.device, steps)
    except OSError as error:
        raise RunError(f"--profile cannot write to {error.filename}: {error.strerror}") from error


def bad_images(data):
    """The paths of the images that could not be decoded on this rank."""
    return sorted(set().union(*(getattr(part, "bad_images", ()) for part in data[:2])))


def exit_code_of(error):
    return error.exit_code if isinstance(error, UserError) else 1


def exit_code(stopped):
    """0 for a run that came to its end, else by what stopped it."""
    return {None: 0, "interrupted": 130, "requeued": 130}.get(stopped, 1)


if __name__ == "__main__":
    REQUESTS.install()
    try:
        CODE = main(requests=REQUESTS)
    except KeyboardInterrupt:  # before there was anything to end
        CODE = say("interrupted")
    ignore()
    sys.exit(CODE)
