"""Train a network with AGD, or with a baseline, from one command: see `python main.py --help`."""

import signal
import sys

from training.control import Requests, ignore

if __name__ == "__main__":
    REQUESTS = Requests()
    REQUESTS.install(ending=False)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # no traceback of half an import
    import flags

    flags.read()  # a mistake is refused before torch is imported, which takes seconds

import math
import os
import socket
import time
from collections import deque
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timezone

import torch

import distributed
import flags
from architecture import GPTS, build, is_library
from architecture.weights import start
from cli import every
from data import is_text, load
from data.workers import lost
from distributed.slurm import restarted
from runs.images import find_run
from runs.log import RunError, as_logged
from runs.provenance import environment
from runs.record import Record, deviation
from training import display
from training.control import Control
from training.losses import LOSSES
from training.memory import does_not_fit, is_out_of_memory
from training.metrics import least
from training.optimizers import AUTOMATIC, make_optimizer
from training.precision import set_channels_last, set_deterministic, set_precision
from training.schedule import make_schedule
from training.trainer import SEEDING, Trainer

FORMER_OUT = "results"  # the default of --out in earlier versions
IDLE_STREAMS = {}  # by device: streams in which no run of this process works


def main(argv=None, requests=None):
    """Run the command line. Returns the exit code. `requests`: what signals ask of the run."""
    requests = requests or Requests()
    args = flags.parse(argv)
    if args.check:
        import check  # a run does without

        return check.main(args)
    try:
        world = distributed.start(torch.device(args.device), args.distribute)
    except distributed.LaunchError as error:
        display.error(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        display.error("interrupted")
        return 130
    try:
        alone = flags.alone(argv) and world.rank == 0
        if alone:
            display.alone(flags.ALONE)
        with stream_of_its_own(world):
            code = train(args, world, requests)
        if alone and code == 0:
            display.next_steps(flags.ALONE, args.out)
    except (Exception, KeyboardInterrupt) as error:
        failure = world.failed(error)
        if failure.trace and world.size == 1:
            raise
        code = 130 if failure.reason == "interrupted" else getattr(error, "exit_code", 1)
        if failure.first:
            display.error(failure.reason, failure.trace)
    return world.leave(code)


def train(args, world, requests):
    """Train, or evaluate, the run that the flags describe. Returns the exit code."""
    if args.deterministic:
        set_deterministic()
    if world.rank == 0:
        display.settings(flags.settings(args))
    with closing(load_data(args, world)) as data:
        try:
            if args.evaluate is not None:
                return evaluate_on(data, args, world)
            return train_on(data, args, world, requests)
        except RuntimeError as error:
            if data.train.workers and (killed := lost(error)):
                raise killed from error
            raise


def train_on(data, args, world, requests):
    """Train the run on the Data of the flags. Returns the exit code."""
    net, notes = build_network(args, data, world.device)
    channels_last = set_channels_last(net, args.channels_last, args.precision, world.device)
    optimizer = build_optimizer(args, net, data, world)
    steps = args.epochs * len(data.train)
    schedule = make_schedule(args.schedule, optimizer, steps, args.warmup)
    facts = facts_of(args, data, net, optimizer, channels_last)
    if args.train_bs > data.train.examples:
        notes = [*notes, f"Note: --train_bs {args.train_bs} is more than the training images: a "
                         "step takes all of them, and an epoch is one step"]  # fmt: skip
    if world.rank == 0:
        display.network(net, facts, notes)
        for note in data.notes:
            print(f"Note: {note}", file=sys.stderr)

    log, record, promised, anew = open_log(args, world, data, facts)
    finished = world.broadcast_object(log.finished(args.epochs) if log and not anew else None)
    if finished is not None:
        if log:
            display.already(log, *finished)
            if args.keep_best:
                keep_best(log)
            if args.track:
                send(args.track, log, len(data.train))
        return 0 if finished[-1] is None else 1
    # Before the log is written: a run that is refused leaves none, on no rank.
    nodes = world.all_gather_object(socket.gethostname())
    remarks = world.all_gather_object(data.start(nodes.count(nodes[world.rank])))[0]
    if anew:
        log.lock_or_fail()
        log.discard()
    resumed = log.start(first_row(args, world, data, facts, log.name)) if log else None
    if record:
        record.begin(resumed[0]["epoch"] if resumed[0] else None)
    checkpoint, warning = world.broadcast_object(resumed)
    rows = world.broadcast_object(log.epochs() if log else None)

    tokens = args.train_bs * data.positions if is_text(args.dataset) else None
    progress = display.Progress(args.epochs, len(data.train), quiet=log is None, tokens=tokens)
    for remark in [*remarks, f"Warning: {warning}"] if warning else remarks:
        progress.note(remark)
    profile = make_profile(args, log, world, len(data.train))
    trainer = Trainer(
        world, data, net, optimizer, LOSSES[args.loss],
        Control(world, requests, every(args.save_every)), progress, log, rows,
        epochs=args.epochs, micro_bs=args.micro_bs, sync_bn=args.sync_bn, compiled=args.compile,
        graphs=args.cuda_graph if facts["cuda_graph"] else None,
        log_steps=math.inf if args.log_steps == "all" else args.log_steps or 0,
        log_updates=args.log_updates, foreign="." in args.optimizer, schedule=schedule,
        seed=args.seed if is_library(args.arch) or args.dropout else None, profile=profile,
        keep_best=args.keep_best,
    )  # fmt: skip
    if checkpoint is not None:
        try:
            trainer.resume(checkpoint)
        except RunError:
            if log:
                log.release()
            raise
        if log:
            display.resumed(progress, log, trainer)
        if trainer.epoch >= args.epochs and trainer.step:
            if log:
                log.release()
                display.further(log, trainer.epoch + 1, args.epochs)
            return 0

    if log and args.track:
        from runs.track import Tracker  # a run does without

        log.tracker = Tracker(args.track, log, len(data.train), progress.note)
    began = time.perf_counter()
    ending = trainer.run()
    code = ending.exit_code
    if log:
        code = finish(args, trainer, ending, record, promised, time.perf_counter() - began)
    if not ending.failed:
        world.broadcast_object()  # launchers end all when one rank ends: none does before all print
    return code


def evaluate_on(data, args, world):
    """Evaluate a checkpoint of the run on the Data of the flags. Returns the exit code."""
    from training.saved import open_run  # a run does without

    saved = open_run(args.evaluate, args.out)
    net, _ = build_network(args, data, world.device)
    set_channels_last(net, args.channels_last, args.precision, world.device)
    nodes = world.all_gather_object(socket.gethostname())
    remarks = world.all_gather_object(data.start(nodes.count(nodes[world.rank])))[0]
    progress = display.Progress(args.epochs, len(data.train), quiet=world.rank > 0)
    if world.rank == 0:
        for remark in [*remarks, *saved.remarks(data)]:
            print(f"Note: {remark}", file=sys.stderr)
    with closing(progress):
        row = saved.evaluate(net, data, LOSSES[args.loss], world, progress)
    if world.rank == 0:
        display.evaluated(saved, row, text=args.arch in GPTS)
    world.broadcast_object()  # launchers end all when one rank ends
    return 0


def load_data(args, world):
    """The Data of the flags; rank 0 prepares the files before the others read them."""
    if world.rank > 0:
        world.broadcast_object()
    data = load(
        args.dataset, args.data_dir, args.train_bs, args.test_bs, world.device, args.seed,
        args.workers, args.image_size, args.skip_bad_images, world.rank, world.size,
        args.train_examples, args.test_examples, args.augment, **flags.windows(args),
    )  # fmt: skip
    if world.rank == 0:
        world.broadcast_object()
    return data


def build_network(args, data, device):
    """The network of the flags, on the device; sentences about weights that were loaded."""
    net = None
    with SEEDING:
        torch.manual_seed(args.seed)
        try:
            net = build(args.arch, data.shape, data.classes, **flags.network(args))
            notes = start(net, args.weights if args.evaluate is None else None, args.freeze)
            flags.check_network(args, net)
            net.to(device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            with suppress(Exception), torch.device("meta"):  # a library may need numbers
                net = net or build(args.arch, data.shape, data.classes, **flags.network(args))
            raise RunError(does_not_fit(error, net)) from error
    set_precision(net, args.precision, device)
    return net, notes


def build_optimizer(args, net, data, world):
    """The optimiser of the flags; AGD draws the weights of the paper's networks anew."""
    try:
        return make_optimizer(
            args.optimizer, net, data.shape, lr=args.lr, weight_decay=args.weight_decay,
            gain=args.gain, layers=flags.layers(args), drawn=flags.drawn(args), seed=args.seed,
            process_group=torch.distributed.group.WORLD if world.size > 1 else None,
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RunError(
            f"--optimizer {args.optimizer} does not take these weights: {reason}"
        ) from error


def facts_of(args, data, net, optimizer, channels_last):
    """What the log's first row says of the network, the data and the way of computing."""
    no_graph = "--cuda_graph off" if args.cuda_graph == "off" else flags.no_graph(args)
    facts = {
        "weights": sum(p.numel() for p in net.parameters()),
        "layers": sum(p.ndim > 1 for p in net.parameters()),
        "shape": list(data.shape), "classes": data.classes,  # what the network takes and gives
    }
    if args.arch in GPTS:
        facts["network"] = flags.network(args)
    frozen = sum(p.numel() for p in net.parameters() if not p.requires_grad)
    if frozen:
        facts["frozen_weights"] = frozen
    if args.optimizer in AUTOMATIC and flags.layers(args) == "paths":
        facts["paths"] = float(optimizer.L)
    facts |= {
        "train_examples": data.train.examples,
        "test_examples": data.test.examples,
        "precision": args.precision,
        "compile": args.compile,
        "deterministic": args.deterministic,
        "channels_last": channels_last,
        "cuda_graph": no_graph is None,
    }
    if no_graph is not None:
        facts["no_cuda_graph"] = no_graph
    return {**facts, "test_bs": args.test_bs}


def open_log(args, world, data, facts):
    """(RunLog, Record, the result that a replay has to reproduce or None, whether an earlier run of
    the name is to be discarded) of rank 0; of the other ranks None each."""
    if world.rank > 0:
        return None, None, None, None
    log = find_run(args.out, vars(args), data)
    new = args.out == flags.parser().get_default("out") and not os.path.exists(log.log_path)
    if new and os.path.exists(os.path.join(FORMER_OUT, "logs", log.log_path.name)):
        print(f"Note: {FORMER_OUT}/ has a run of this name: --out {FORMER_OUT} goes on with it")
    command = flags.command_of(vars(args))
    record = Record(log.record_path, vars(args), command, log.settings, log.images, facts,
                    len(data.train), world)  # fmt: skip
    promised = None
    if args.replay is not None:
        promised = record.promised(args.replay, display.table)
    # An interrupted replay resumes; a finished one is made again.
    over = args.fresh if args.replay is None else log.finished(args.epochs) is not None
    return log, record, promised, over and not restarted()


def first_row(args, world, data, facts, name):
    """The first row of the log: flags, environment, facts."""
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {
        "kind": "run", "name": name, "flags": vars(args), **environment(world.device),
        "ranks": world.size, "launcher": world.launcher, "data": data.source, **facts, "date": now,
    }  # fmt: skip


def keep_best(log):
    """Keep the best checkpoint of a run that has nothing left to do, where that is its newest one,
    and print which one is kept."""
    best, checkpoints = least(log.epochs()), log.checkpoints
    if best is None:
        return
    if checkpoints.epoch_of_best() != best["epoch"]:
        log.lock_or_fail()
        if checkpoints.epoch_of_newest() == best["epoch"] and (failure := log.keep_best()):
            print(f"The best checkpoint is not kept: {failure}", file=sys.stderr)
        log.release()
    print(f"Best     {display.best_checkpoint(checkpoints, best['epoch'])}")


def send(tracker, log, batches):
    """Send the log of a run that has nothing left to do to a tracker, which may lack it."""
    end = log.rows()[-1]
    if end["kind"] == "end":
        from runs.track import Tracker  # a run does without

        lines = []
        Tracker(tracker, log, batches, lines.append).finish(end)
        print(*dict.fromkeys(lines), sep="\n")


def make_profile(args, log, world, steps):
    """The Profile that --profile asks for on rank 0, or None."""
    if not args.profile or not log:
        return None
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports devices that are absent
    from training.profile import Profile  # a run does without

    try:
        return Profile(os.path.join(args.out, "profiles"), log.name, world.device, steps)
    except OSError as error:
        raise RunError(f"--profile cannot write to {error.filename}: {error.strerror}") from error


def finish(args, trainer, ending, record, promised, seconds):
    """Log and print on rank 0 how the run ended. Returns the exit code."""
    log, rows, code = trainer.log, trainer.rows, ending.exit_code
    last = rows[-1] if rows else {}
    # After a failure a device may wait for ranks that are gone: nothing is read from it.
    readable = args.optimizer in AUTOMATIC and (trainer.world.size == 1 or not ending.failed)
    skipped = int(trainer.optimizer.skipped) if readable else 0
    end = as_logged({
        "kind": "end", "epochs": len(rows),
        **{k: last.get(k) for k in ("train_loss", "train_acc", "test_loss", "test_acc")},
        "stopped": ending.reason, "final": ending.final, "skipped_steps": skipped,
        "bad_images": len(ending.bad_images), "seconds": sum(x.get("seconds") or 0 for x in rows),
        "saving_seconds": trainer.saving_seconds, **ending.facts,
    })  # fmt: skip
    result = None
    if ending.final and not ending.facts and not log.pending:  # all epochs are whole, and logged
        # Before the end row: without that row, the same command comes here again.
        result = record.end(trainer.net.state_dict(), [*log.rows(), end])
    unlogged = log.log(end)
    log.release()
    display.summary(trainer, ending, seconds, skipped)
    if unlogged is not None:
        print(f"error: {log.log_path} lacks its last rows: {unlogged}", file=sys.stderr)
        code = code or 1
    if log.tracker is not None:
        log.tracker.finish(end)
    if result is not None and record.problem is not None:
        print(f"There is no record of this result: {record.problem}", file=sys.stderr)
    if result is not None and promised is not None:
        difference = deviation(promised, result)
        if difference is not None:
            print(f"error: the replay has {difference}: {args.replay}", file=sys.stderr)
            return 1
        print(f"The same bits as those of {args.replay}, in the weights and in all rows of the log")
        return 0
    return code


@contextmanager
def stream_of_its_own(world):
    """A context in which a single process works on a GPU in a stream of its own: a graph can be
    captured there, and other threads of the process do not wait for it."""
    if world.device.type != "cuda" or world.size > 1:
        yield
        return
    # torch has 32 and hands them out in turn, also those in use. Every run returns its own, so
    # that 32 runs at once never share one.
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


if __name__ == "__main__":
    REQUESTS.install()
    try:
        CODE = main(requests=REQUESTS)
    except KeyboardInterrupt:  # before the run began
        display.error("interrupted")
        CODE = 130
    ignore()
    sys.exit(CODE)
