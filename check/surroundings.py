"""Check the surroundings of a run: its data, folders, ranks and worker processes."""

import os
import random
import shutil
import socket
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

import distributed
import flags
from cli import UserError, command, size
from data import DATASETS, data_folder, is_folder, is_text, load
from data.imagenet import find
from data.imagenet_layout import read_layout
from data.workers import SHM, shared_bytes, usable_cores
from distributed.launch import check_alone, port_number
from runs.files import cannot
from runs.images import find_run
from runs.name import name_and_settings

IMAGES = 64  # of a folder that are decoded, or as many as DECODING seconds allow
DECODING = 1.5
STATE = {"agd": 0, "spectral": 3}  # numbers a weight in a checkpoint; 2 of other optimisers


class Fault(UserError):
    """A check has found what would stop the run; the message has the remedy."""


class Facts(NamedTuple):
    """The data of a run."""

    shape: tuple  # (channels, height, width), or of a text (context,)
    classes: int
    train: int
    test: int
    source: dict  # as in Data, and so the next two
    files: tuple
    class_names: list | None
    decoding: float | None  # images a second of one process; None for arrays
    data: object  # the Data


def alone():
    """No finding, unless a launcher has started several processes for this command."""
    check_alone()
    yield from ()


def no_launcher():
    yield "note", "no launcher has started this check: ranks and nodes were not compared"
    port = os.environ.get("MASTER_PORT")
    if port is not None:
        try:
            socket.create_server(("", port_number(port))).close()
        except OSError as error:
            raise Fault(f"MASTER_PORT {port} cannot be used: {error}; choose another") from error
        yield "ok", f"port {port} is free"


def ranks(args, seconds):
    """The World of the ranks that meet within `seconds`; the cores of this node."""
    world = distributed.start(torch.device(args.device), True, seconds)
    here = world.all_gather_object(socket.gethostname()).count(socket.gethostname())
    yield "ok", f"{world.size} ranks, started by {world.launcher}, {here} of them on this node"
    if args.train_bs < world.size:
        yield "note", (f"--train_bs {args.train_bs} is the batch of all the {world.size} ranks, "
                       "and some have nothing of it")  # fmt: skip
    cores, threads = usable_cores(), torch.get_num_threads()
    if world.device.type == "cpu" and here * threads > cores:
        yield "note", (f"{here} ranks of {threads} threads share {cores} cores: "
                       f"OMP_NUM_THREADS={max(1, cores // here)}")  # fmt: skip
    return world


def images(args):
    """The Facts of the data set: arrays are read whole; of a folder some images are decoded."""
    if args.dataset == "imagenet":
        root = find(args.data_dir)
        splits = read_layout(root)
        if splits["val"].flat or not all(split.tidy() for split in splits.values()):
            what = "is not sorted" if splits["val"].flat else "holds more than sorted images"
            mend = command("data.prepare", "imagenet", "--data_dir", args.data_dir, "--from", root)
            raise Fault(f"{root} {what}: `{mend}` mends it")
    elif args.dataset in DATASETS and args.dataset != "digits" and not (
            path := data_folder(args.data_dir) / f"{args.dataset}.npz").exists():  # fmt: skip
        fetch = command("data.prepare", args.dataset, "--data_dir", args.data_dir)
        raise Fault(f"there is no {path} yet, and the run would fetch it: `{fetch}`, where there "
                    "is a network")  # fmt: skip
    data = load(
        args.dataset, args.data_dir, args.train_bs, args.test_bs, torch.device("cpu"),
        workers=args.workers, image_size=args.image_size, train_examples=args.train_examples,
        test_examples=args.test_examples, augment=args.augment, **flags.windows(args),
    )  # fmt: skip
    for note in data.notes:
        yield "note", note
    rate = decoding_rate(data, args.skip_bad_images) if is_folder(args.dataset) else None
    train, test = data.train.examples, data.test.examples
    what = f"test images in {data.classes:,} classes"
    if is_text(args.dataset):
        what = (f"validation windows of {data.positions:,} tokens, in a vocabulary of "
                f"{data.classes:,}")  # fmt: skip
    yield "ok", (f"{train:,} training and {test:,} {what}"
                 + (f", {rate:.0f} a second decoded" if rate else ""))  # fmt: skip
    return Facts(data.shape, data.classes, train, test, data.source, data.files, data.class_names,
                 rate, data)  # fmt: skip


def decoding_rate(data, skip_bad_images):
    """Images a second that one process decodes. Raises Fault where some cannot be decoded."""
    parts = [part.images for part in (data.train, data.test)]
    places = [(part, i) for part in parts for i in range(len(part.samples))]
    chosen = random.Random(0).sample(places, min(IMAGES, len(places)))
    chosen[0][0][0, chosen[0][1]]  # the first one takes longer
    bad, done, began = [], 0, time.perf_counter()
    for part, i in chosen:
        bad += filter(None, [part[0, i][2]])
        done += 1
        if time.perf_counter() - began > DECODING:
            break
    if bad and not skip_bad_images:
        path, reason = bad[0]
        raise Fault(f"{len(bad)} of {done} images that were tried cannot be decoded, {path} among "
                    f"them ({reason}): replace them, or leave them out with --skip_bad_images")
    return done / (time.perf_counter() - began)


def fixed(args):
    """(shape, classes) of a data set that cannot be loaded, None where they are not known."""
    spec = DATASETS.get(args.dataset)
    if spec is None:
        return None, None
    height, width, channels = spec.shape
    return (channels, height or args.image_size, width or args.image_size), spec.classes


def results(args, net, facts):
    """Whether the run's folders can be written and have room; what a run of this name has left."""
    for part in ("logs", "checkpoints"):
        path = Path(args.out, part)
        while not path.exists():
            path = path.parent
        try:
            tempfile.TemporaryFile(dir=path).close()
        except OSError as error:
            unwritten = cannot(Path(args.out, part), "written", error)
            raise Fault(f"{unwritten}; choose another --out") from error
    if net is not None:  # three checkpoints, the new one beside the last two; the best one
        numbers = sum(p.numel() for p in net.parameters())
        need = (3 + args.keep_best) * 4 * numbers * (1 + STATE.get(args.optimizer, 2))
        free = shutil.disk_usage(path).free
        if free < need:
            raise Fault(f"{path} has {size(free)} free, and checkpoints take {size(need)}: "
                        "make room, or choose another --out")  # fmt: skip
    run = None if facts is None else find_run(args.out, vars(args), facts)
    log = run.log_path if run else Path(
        args.out, "logs", f"{name_and_settings(vars(args))[0]}.jsonl")  # fmt: skip
    if not log.exists():
        yield "ok", f"{log}, a new run"
        return
    if run is None:
        yield "note", f"{log} is there, of data that could not be compared"
        return
    run.lock_or_fail()
    run.release()
    if args.fresh:
        yield "ok", f"{log}, which --fresh forgets"
        return
    if run.finished(args.epochs) is not None:
        yield "note", f"{log} is finished: nothing would be done without more --epochs or --fresh"
    else:
        yield "ok", f"{log}, which goes on after {len(run.epochs())} epochs"
    if run.compare_images(run.rows()[0]):
        yield "note", f"{log} began with other data: their {run.other_images} differ"


def workers(args, world, neighbours, facts):
    """Whether the worker processes can be started, their batches fit in shared memory, and the
    cores are enough."""
    if facts.decoding is None or not args.workers:
        return
    parts, cores, notes = facts.data[:2], usable_cores(), []
    try:
        notes = facts.data.start(neighbours)
    finally:
        facts.data.close()
    for note in notes:
        yield "note", note
    if not notes:
        need = neighbours * shared_bytes(parts, facts.shape)
        yield "ok", f"{args.workers} processes decode, {size(need)} of {SHM} at most"
    if args.workers > cores:
        yield "note", f"{args.workers} workers share {cores} cores: --workers {cores}"
