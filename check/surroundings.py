"""What is around a run: its images, its folders, its ranks and processes."""

import os
import random
import shutil
import socket
import tempfile
import time
from pathlib import Path

import torch

from check.common import Facts, Fault, size
from data import DATASETS, is_folder, load
from data.imagenet import find
from data.imagenet_layout import read_layout
from data.workers import usable_cores
from runs.log import RunLog
from runs.name import name_and_settings

IMAGES = 64  # of a folder that are decoded, or as many as can be in
DECODING = 1.5  # seconds
SHM = "/dev/shm"  # where worker processes leave their batches


def no_launcher():
    yield "note", ("no launcher has started this check: what differs between ranks and nodes was "
                   "not looked at")  # fmt: skip
    port = os.environ.get("MASTER_PORT")
    if port is not None:
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, ValueError, OverflowError) as error:
            raise Fault(f"MASTER_PORT {port} cannot be used: {error}; choose another") from error
        yield "ok", f"port {port} is free"


def ranks(args, world):
    """The ranks of the group, and the cores of this node."""
    here = world.all_gather_object(socket.gethostname()).count(socket.gethostname())
    yield "ok", f"{world.size} ranks, started by {world.launcher}, {here} of them on this node"
    if args.train_bs < world.size:
        yield "note", (f"--train_bs {args.train_bs} is the batch of all the {world.size} ranks, "
                       "and some have no image of it")  # fmt: skip
    cores, threads = usable_cores(), torch.get_num_threads()
    if world.device.type == "cpu" and here * threads > cores:
        yield "note", (f"{here} ranks of {threads} threads share {cores} cores: "
                       f"OMP_NUM_THREADS={max(1, cores // here)}")  # fmt: skip


def images(args):
    """The Facts of the data set; the files of an array set are read whole."""
    if is_folder(args.dataset):
        return (yield from folder(args))
    path = Path(args.data_dir).expanduser() / f"{args.dataset}.npz"
    if args.dataset in DATASETS and args.dataset != "digits" and not path.exists():
        raise Fault(
            f"there is no {path} yet, and the run would fetch it: `python -m data.prepare "
            f"{args.dataset} --data_dir {args.data_dir}`, where there is a network"
        )
    data = load(
        args.dataset, args.data_dir, args.train_bs, args.test_bs, torch.device("cpu"),
        train_examples=args.train_examples, test_examples=args.test_examples,
    )  # fmt: skip
    facts = Facts(data.shape, data.classes, data.train.examples, data.test.examples, None,
                  data.source)  # fmt: skip
    yield "ok", counted(facts)
    return facts


def folder(args):
    """The images as training lists them, and some of them decoded."""
    if args.dataset == "imagenet":
        root = find(args.data_dir)
        splits = read_layout(root, wanted=DATASETS["imagenet"].classes)
        if splits["val"].flat or not all(split.tidy for split in splits.values()):
            what = "is not sorted" if splits["val"].flat else "holds more than sorted images"
            raise Fault(f"{root} {what}: `python -m data.prepare imagenet --from {root}` makes it "
                        "ready")  # fmt: skip
    data = load(
        args.dataset, args.data_dir, args.train_bs, args.test_bs, torch.device("cpu"),
        image_size=args.image_size,
    )  # fmt: skip
    images = [part.loader.dataset for part in (data.train, data.test)]
    paths = [(part, i) for part in images for i in range(len(part.samples))]
    chosen = random.Random(0).sample(paths, min(IMAGES, len(paths)))
    chosen[0][0][0, chosen[0][1]]  # the first one takes longer
    bad, done, began = [], 0, time.perf_counter()
    for part, i in chosen:
        bad += [found for found in [part[0, i][2]] if found]
        done += 1
        if time.perf_counter() - began > DECODING:
            break
    rate = done / (time.perf_counter() - began)
    if bad and not args.skip_bad_images:
        path, reason = bad[0]
        raise Fault(
            f"{len(bad)} of {done} images that were tried cannot be decoded, {path} among them "
            f"({reason}): replace them, or leave such images out with --skip_bad_images"
        )
    facts = Facts(data.shape, data.classes, data.train.examples, data.test.examples, rate,
                  data.source)  # fmt: skip
    yield "ok", f"{counted(facts)}, {rate:.0f} a second decoded"
    return facts


def counted(facts):
    return (f"{facts.train:,} training and {facts.test:,} test images in {facts.classes:,} "
            "classes")  # fmt: skip


def fixed(args):
    """(shape, classes) of a set that cannot be had, as far as they are fixed."""
    spec = DATASETS.get(args.dataset)
    if spec is None:
        return None, None
    height, width, channels = spec.shape
    side = args.image_size
    return (channels, height or side, width or side), spec.classes


def results(args, net, facts):
    """Folders that can be written to, with room; and what a run of this name has left there."""
    name, settings = name_and_settings(args)
    for part in ("logs", "checkpoints"):
        path = Path(args.out, part)
        while not path.exists():
            path = path.parent
        try:
            with tempfile.TemporaryFile(dir=path):
                pass
        except OSError as error:
            raise Fault(
                f"{Path(args.out, part)} cannot be written: {error.strerror or error}; choose "
                "another --out"
            ) from error
        if net is not None and part == "checkpoints":
            # The new one beside the last two; baselines keep two numbers a weight, the spectral
            # rule three: at the end of an epoch the weights that it trains, too.
            numbers = sum(p.numel() for p in net.parameters())
            need = 3 * 4 * numbers * (1 + {"agd": 0, "spectral": 3}.get(args.optimizer, 2))
            free = shutil.disk_usage(path).free
            if free < need:
                raise Fault(f"{path} has {size(free)} free, and checkpoints take {size(need)}: "
                            "make room, or choose another --out")  # fmt: skip
    log = Path(args.out, "logs", f"{name}.jsonl")
    if not log.exists():
        yield "ok", f"{log}, a new run"
        return
    if facts is None:
        yield "note", f"{log} is there, of images that could not be compared"
        return
    run = RunLog(args.out, name, {**settings, "data": facts.source})
    run.lock_or_fail()
    run.release()
    if args.fresh:
        yield "ok", f"{log}, which --fresh forgets"
        return
    finished = run.finished(args.epochs)
    if finished is not None:
        yield "note", f"{log} is finished: nothing would be done without --fresh or more --epochs"
    else:
        yield "ok", f"{log}, which goes on after {len(run.epochs())} epochs"


def workers(args, world, neighbours, facts):
    """The batches that worker processes hand over lie in shared memory."""
    if facts.decoding is None or not args.workers:
        return
    channels, height, width = facts.shape
    batch = -(-max(args.train_bs, args.test_bs) // world.size) * channels * height * width
    need = 2 * args.workers * batch * neighbours
    if Path(SHM).is_dir() and shutil.disk_usage(SHM).free < need:
        raise Fault(
            f"{SHM} has {size(shutil.disk_usage(SHM).free)} free, and {args.workers} workers may "
            f"fill {size(need)}: fewer --workers, or a container with a larger --shm-size"
        )
    yield "ok", f"{args.workers} processes decode, {size(need)} of {SHM} at most"
    cores = usable_cores()
    if args.workers > cores:
        yield "note", f"{args.workers} workers share {cores} cores: --workers {cores}"
