"""Ways to break a process: a signal at a moment that is drawn, or the disk below the run, which is
mended before the run goes on:

    full       a small tmpfs is filled to its last bytes; takes root
    errors     every open, rename and fsync fails for a while with ENOSPC, EDQUOT, EROFS or EIO
    limit      no file may outgrow some size (EFBIG, from the kernel)
    damaged    the run is killed; a bit of the newest checkpoint is flipped, or its end cut off

On a broken disk a run goes on or ends with one sentence, and keeps its last checkpoint.
"""

import contextlib
import errno
import math
import random
import shutil
import signal
import subprocess
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from tests.crash.lab import PATIENCE, Case, Child, Report, end_all
from tests.crash.remains import read_rows
from tests.crash.victim import KINDS, MOMENT

SIGNALS = {name: getattr(signal, f"SIG{name}") for name in ("KILL", "TERM", "INT", "USR1")}
SOFT = (signal.SIGTERM, signal.SIGINT)  # of which a run saves and ends with 130
DISKS = ("full", "errors", "limit", "damaged")
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
LEAST = 20_000  # bytes of a limit: the run's output goes to a file, too


def make_cases(workers, images):
    """The cases; those of the image folder `images` with each number of `workers`."""
    fcn = ("--arch", "fcn", "--depth", "3", "--width", "64")
    folder = (*fcn, "--dataset", f"folder:{images}", "--image_size", "32", "--train_bs", "16")
    digits = (*fcn, "--dataset", "digits", "--log_updates")
    few = ("--train_examples", "64", "--test_examples", "32", "--train_bs", "16")
    return [
        *(Case(f"folder, {n} workers", (*folder, "--workers", str(n), "--log_steps"), 15, 8)
          for n in workers),
        Case("digits", digits, 40, 12),
        Case("digits, adam", (*digits, "--optimizer", "adam"), 40, 12),
        Case("digits, spectral", (*digits, "--optimizer", "spectral"), 40, 12),
        Case("digits, batch norm", ("--arch", "resnet18", "--dataset", "digits", *few), 3, 4),
    ]  # fmt: skip


def make_images(root, seed):
    """180 JPEG and PNG files of 40 x 40 pixels in three classes: noise around a level a class."""
    rng = np.random.default_rng(seed)
    for split, number in (("train", 40), ("val", 20)):
        for level, name in enumerate("abc"):
            folder = Path(root, split, name)
            folder.mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(level * 40, level * 40 + 160, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.{'png' if i % 2 else 'jpg'}")


def draw(lab, name, rng, rest):
    """A plan of victim.py, or {"at": seconds, ...} for a signal from outside."""
    rest *= rng.choice((1, 0.25))  # sometimes soon, so that a run is hit many times
    plan = {"signal": int(SIGNALS[name]), "group": rng.random() < 0.5}
    if rng.random() < 0.3:
        return {**plan, "kind": "time", "at": draw_time(lab, rng, rest)}
    # A limit on files kills, so it stands in for SIGKILL only.
    kind = rng.choice([kind for kind in KINDS if lab.census.get(MOMENT.get(kind, kind))
                       and (name == "KILL" or kind not in MOMENT)])  # fmt: skip
    number = lab.census[MOMENT.get(kind, kind)]
    # The log is opened, truncated and renamed at the start, once more when a run is resumed.
    most = number + 4 if kind == "log" else max(1, math.ceil(number * rest))
    plan |= {"kind": kind, "k": rng.randint(1, most)}
    return {**plan, "bytes": rng.randint(1, lab.size if kind == "write" else 200)}


def draw_time(lab, rng, rest):
    """Seconds after which to strike a run of which the part `rest` is left."""
    return rng.uniform(0, lab.start + rest * (lab.seconds - lab.start))


def strike(lab, plan):
    """Run a process that meets `plan`; returns the Child."""
    number, at = plan["signal"], plan.get("at")
    # Before main.py takes over, a signal does what it does.
    codes = (-number, -signal.SIGXFSZ, *([130] if number in SOFT else []))
    child = Child(lab, None if at is not None else plan, plan["kind"], codes)
    child.plan = plan
    if at is not None and not child.wait(at):
        child.strike(number, plan["group"])
    when = f"{plan['kind']} {plan['k']}" if at is None else f"after {at:.2f} s"
    child.end(f"{when}, {'all processes' if plan['group'] else 'one process'}")
    if child.struck is None:  # it ended before that moment
        child.kind, child.codes = None, ()
    return child


def strike_disk(lab, way, rng, rest):
    """Run a process on a disk that breaks; returns the Child."""
    plan, codes = None, (1, 2, -signal.SIGKILL)
    at, lasts = draw_time(lab, rng, rest), rng.choice((0.1, 0.5, 2.0, PATIENCE))
    what = f"{way} after {at:.2f} s"
    if way == "errors":
        k, number = rng.randint(1, 60), rng.choice(ERRORS)
        plan = {"errno": number, "k": k, "until": k + rng.choice((1, 2, 5, 1000))}
        what = f"{errno.errorcode[number]} from change {k} to {plan['until'] - 1}"
    elif way == "limit":
        plan = {"limit": rng.randint(LEAST, max(lab.size, LEAST))}
        what = f"{plan['limit']:,} bytes a file"
    child = Child(lab, plan, way, codes)
    if plan is not None:
        return child.end(what)
    child.wait(at)
    if way == "full":
        left = rng.choice((0, rng.randint(0, 4096), rng.randint(0, lab.size)))
        fill(lab.disk, left)
        what += f" for {lasts} s, {left:,} bytes left"
        if not child.wait(lasts) and rng.random() < 0.7:
            mend(lab.disk)
            return child.end(what)
    child.strike(signal.SIGKILL)
    child.end(what)
    if way == "damaged" and (child.code == 0 or not damage(lab.out, rng)):
        child.kind = None
    return child


def damage(out, rng):
    """Flip a bit of the newest checkpoint, or cut it off there; returns whether it did: not
    where no other one is left, nor after the run's end, which no command reads again."""
    ended = any(row["kind"] == "end" for row in read_rows(out))
    for path in () if ended else out.glob("checkpoints/*.pt"):
        if path.with_name(f"{path.name}.previous").exists():
            content, at = bytearray(path.read_bytes()), rng.randrange(path.stat().st_size)
            content[at] ^= 1 << rng.randrange(8)
            return path.write_bytes(content[: rng.choice((at, None))]) >= 0
    return False


def fill(disk, left):
    """Leave at most `left` bytes on a disk."""
    amount = shutil.disk_usage(disk).free - left
    with contextlib.suppress(OSError), open(disk / "ballast", "wb", buffering=0) as file:
        while amount > 0:
            amount -= file.write(b"\0" * min(amount, 1 << 16))


def mend(disk):
    Path(disk, "ballast").unlink(missing_ok=True)


def break_case(lab, how, hits, seed, more=lambda: True):
    """The Report of `hits` hits by a signal or on a disk: `how` is of SIGNALS or DISKS."""
    rng = random.Random(f"{seed} {lab.case.name} {how}")
    if how in SIGNALS:
        return lab.break_runs(how, hits, lambda rest: strike(lab, draw(lab, how, rng, rest)), more)
    lab.fresh()
    lab.disk.mkdir(exist_ok=True)
    if how == "full":
        size = f"size={lab.bytes + 3 * lab.size}"
        mount = ["mount", "-t", "tmpfs", "-o", size, "crash", str(lab.disk)]
        if subprocess.run(mount, stderr=subprocess.DEVNULL).returncode:
            return Report(lab.case.name, how, note="no tmpfs can be mounted here")
    try:
        breaking = partial(strike_disk, lab, how, rng)
        return lab.break_runs(how, hits, breaking, more, partial(mend, lab.disk))
    finally:
        if how == "full":
            end_all()  # they hold files open there
            subprocess.run(["umount", "-l", str(lab.disk)])
