"""The logs below a folder, followed while they grow: of a file only what is new is read, and of a
run a bounded number of rows is kept."""

import hashlib
import json
import math
import os
import secrets
import stat
import threading
import time
from array import array
from bisect import bisect_right
from pathlib import Path

import flags
from cli import command, printable
from data import is_text
from runs.files import reason
from runs.rows import check
from scripts.words import LOSSES, described

POINTS = 2048  # rows of a run that are kept, an even number: of more every second one goes
RUNS, NOTES, ENTRIES = 1000, 50, 200_000  # shown at most; files and folders that are looked at
LONGEST, LARGEST = 2**20, 2**28  # bytes of a line, and of a log
LOOK = 1.0  # seconds between two looks at the files
DUTY = 0.03  # of the time at most is spent on the search for new files
STALLED, BEGINNING = 120, 1800  # seconds without a row at least, and before the first epoch
FOREVER = 1e9  # seconds that an epoch takes at most
EPOCH = ("epoch", "train_loss", "test_loss", "train_acc", "test_acc", "eta_min", "eta_mean",
         "eta_max", "seconds")  # fmt: skip
STEP = ("epoch", "loss", "acc", "eta")


def short(x, digits=5):
    """A number with so many significant digits; NaN where it is none, or not finite."""
    try:
        x = float(f"{x:.{digits}g}")
    except (OverflowError, TypeError):
        return math.nan
    return x if math.isfinite(x) else math.nan  # also where the digits round it up to infinity


def null(x):
    """None for NaN, which JSON does not have."""
    return None if x != x else x


class Series:
    """Columns of numbers. `versions` has for each row the version of the Runs that brought it."""

    def __init__(self, names):
        self.columns, self.versions = {name: array("d") for name in names}, array("Q")
        self.count, self.stride = 0, 1

    def append(self, values, version):
        if self.count % self.stride == 0:
            if len(self.versions) == POINTS:
                for column in self.columns.values():
                    del column[1::2]
                self.versions = array("Q", [version]) * (POINTS // 2)
                self.stride *= 2
            self.versions.append(version)
            for column, value in zip(self.columns.values(), values):
                column.append(value)
        self.count += 1

    def since(self, version):
        """{"from": the index of the first row after a version, a name: the values from there on}"""
        start = bisect_right(self.versions, version)
        columns = {name: [*map(null, x[start:])] for name, x in self.columns.items()}
        return {"from": start, **columns}


def opened(path, folder):
    """A file below a folder, to be read. Raises OSError; ValueError for a link, where a folder on
    the way has become one, and for a pipe, which would be waited for."""
    place = os.path.join(os.path.realpath(folder), path.relative_to(folder))
    if os.path.realpath(path) != place or not stat.S_ISREG(os.lstat(path).st_mode):
        raise ValueError("it is a link, or no file")
    extra = (getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))
    return os.fdopen(os.open(path, os.O_RDONLY | sum(extra)), "rb")


class Run:
    """A log as far as it has been read. `problem` says why it is none, or is None."""

    def __init__(self, path, folder):
        self.path, self.folder, self.state = path, folder, None
        self.place = place = path.relative_to(folder).as_posix()
        self.shown = 0  # the version that brought it to the page
        self.id = hashlib.sha256(os.fsencode(place)).hexdigest()[:8]
        self._clear()

    def _clear(self):
        self.offset, self.line, self.tail = 0, 0, b""
        self.problem = self.first = self.end = self.epoch_steps = None
        self.epochs, self.steps, self.last = Series(EPOCH), Series(STEP), ()
        self.seconds = self.longest = 0.0

    def refresh(self, version):
        """Take in what is new in the file. Returns whether anything is."""
        problem = self.problem
        try:
            now = os.lstat(self.path)
            state = now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns
            if state == self.state:
                return False
            if self.problem or self.state and state[:2] != self.state[:2]:  # written anew
                self._clear()
            self.state, self.mtime, self.changed = state, now.st_mtime, version
            if now.st_size > LARGEST:
                raise ValueError(f"it has over {LARGEST >> 20} MiB")
            with opened(self.path, self.folder) as file:
                self._read(file, version)
        except (OSError, ValueError, ArithmeticError, RecursionError) as error:
            self.problem = reason(error)
            if isinstance(error, OSError):  # it may pass, and the file be as it was
                self.state = None
        return self.problem is None or self.problem != problem

    def _read(self, file, version):
        file.seek(self.offset - len(self.tail))
        if file.read(len(self.tail)) != self.tail:  # cut, or written anew
            self._clear()
            file.seek(0)
        while line := file.readline(LONGEST):
            number, whole = self.line + 1, line.endswith(b"\n")
            if len(line) == LONGEST and not whole:
                raise ValueError(f"line {number} is too long")
            try:
                row = json.loads(line.decode()) if line.strip() else None
            except (ValueError, RecursionError) as error:
                if not whole:  # it is being written
                    break
                raise ValueError(f"line {number}: {error}") from error
            if row is not None:
                check(row, number, first=self.first is None)
                self._take(row, version)
            self.offset, self.line, self.tail = self.offset + len(line), number, line[-200:]
        if self.first is None:
            raise ValueError("it has no row")

    def _take(self, row, version):
        if self.first is None:
            self._begin(row)
        elif row["kind"] == "epoch":
            seconds = min(max(0.0, null(short(row["seconds"])) or 0.0), FOREVER)
            self.seconds, self.longest = self.seconds + seconds, max(self.longest, seconds)
            self.last = [*(short(row.get(key)) for key in EPOCH[:-1]), short(self.seconds, 8)]
            self.epochs.append(self.last, version)
            self.end = None  # the run has gone on
        elif row["kind"] == "step" and self.epoch_steps:
            place = short(row["epoch"] - 1 + row["step"] / self.epoch_steps, 8)
            self.steps.append([place, *(short(row.get(key)) for key in STEP[1:])], version)
        elif row["kind"] == "end":
            self.end = {"stopped": row.get("stopped"), "final": row.get("final") is True}

    def _begin(self, row):
        """Take from the first row what the page needs. Its values may be anything."""
        settings, total = row["settings"], row["flags"].get("epochs")
        try:
            words = {key: (str(x)[:80], bool(usual)) for key, (x, usual) in described(row).items()}
        except Exception:
            words = {"name": (self.path.stem, False)}
        sizes = row.get("train_examples"), settings.get("train_bs")
        if all(isinstance(x, int) and x > 0 for x in sizes):
            self.epoch_steps = -(-sizes[0] // sizes[1])
        loss, data = map(settings.get, ("loss", "dataset"))
        total = total if isinstance(total, int) else None
        self.first = {"words": words, "total": total, "text": is_text(str(data)),
                      "loss": LOSSES.get(str(loss), "objective")}  # fmt: skip

    def summary(self, since):
        """The run for the page, with the rows that came after a version."""
        since = since if since >= self.shown else -1
        folders = self.place.split("/")[:-1]
        folders = folders[:-1] if folders[-1:] == ["logs"] else folders
        patience = max(STALLED, 3 * self.longest) if self.last else BEGINNING
        last = dict(zip(EPOCH, map(null, self.last)))
        return {"folder": "/".join(folders), "name": self.path.stem, "place": self.place,
                **self.first, "end": self.end, "done": self.epochs.count,
                "last": last, "mtime": self.mtime, "patience": patience,
                "rows": self.epochs.since(since), "steps": self.steps.since(since)}  # fmt: skip

    def details(self):
        """{"first": the first row, "command": the one that makes the run again, or None where its
        flags are not today's}. Raises OSError or ValueError."""
        with opened(self.path, self.folder) as file:
            row = json.loads(file.readline(LONGEST).decode(), parse_constant=lambda name: None,
                             parse_float=lambda text: null(short(float(text), 17)))  # fmt: skip
        check(row, 1, first=True)
        try:
            given = {x.dest: x.default for x in flags.parser()._actions} | row["flags"]
            line = command("main", *flags.command_of(given), "--out", given["out"])
        except Exception:
            line = None
        return {"command": line, "first": row}


class Runs:
    """The runs below a folder, which threads may share."""

    def __init__(self, folder):
        self.folder, self.lock, self.start = Path(folder), threading.Lock(), secrets.token_hex(4)
        self.runs, self.shown, self.notes, self.passed = {}, {}, [], []
        self.version = self.listed = 0
        self.next_look = self.next_walk = 0.0

    def _walk(self):
        """The paths that may be logs, below folders that are no links and not hidden."""
        entries, self.passed = 0, []
        for folder, folders, files in os.walk(self.folder):
            folders[:] = sorted(x for x in folders if not x.startswith("."))
            links = [path for x in folders if (path := Path(folder, x)).is_symlink()]
            self.passed += [f"{path.relative_to(self.folder)}/: it is a link" for path in links]
            yield from (Path(folder, x) for x in sorted(files) if x.endswith(".jsonl"))
            entries += len(files) + len(folders)
            if entries > ENTRIES:
                self.passed += [f"what is beyond the first {ENTRIES:,} files and folders"]
                return

    def _update(self):
        """Look at the files, unless that was a moment ago."""
        now = time.monotonic()
        if now < self.next_look:
            return
        version, runs = self.version + 1, self.runs
        if now >= self.next_walk:
            runs = {path: runs.get(path) or Run(path, self.folder) for path in self._walk()}
            self.next_walk = time.monotonic() + (time.monotonic() - now) / DUTY
        changed = [run for run in runs.values() if run.refresh(version)]
        good = [run for run in runs.values() if run.problem is None]
        shown = {run.id: run for run in good[:RUNS]}
        problems = (f"{run.place}: {run.problem}" for run in runs.values() if run.problem)
        notes = [*self.passed, *problems]
        notes[NOTES:] = [f"{len(notes) - NOTES} more"] * (len(notes) > NOTES)
        notes += [f"{len(good) - RUNS} runs beyond {RUNS}"] * (len(good) > RUNS)
        notes = [*map(printable, notes)]
        listed = (shown.keys(), notes) != (self.shown.keys(), self.notes)
        if changed or listed:
            self.version = version
            self.listed = version if listed else self.listed
            for name in shown.keys() - self.shown.keys():  # pages have none of its rows
                shown[name].shown = shown[name].changed = version
        self.runs, self.shown, self.notes = runs, shown, notes
        self.next_look = time.monotonic() + LOOK

    def changes(self, since=""):
        """What has changed since the "version" of an earlier answer, or None where nothing has."""
        with self.lock:
            self._update()
            start, _, known = since.partition("-")
            known = int(known) if start == self.start and known.isdecimal() else -1
            if known == self.version:
                return None
            runs = {x.id: x.summary(known) for x in self.shown.values() if x.changed > known}
            answer = {"version": f"{self.start}-{self.version}", "now": time.time(), "runs": runs}
            if self.listed > known:
                answer |= {"ids": [*self.shown], "notes": self.notes,
                           "folder": printable(self.folder),
                           "begin": command("main", "--dataset", "digits", "--out", self.folder)}
            return answer

    def details(self, name):
        """Run.details of an id. Raises KeyError, OSError or ValueError."""
        with self.lock:
            return self.shown[name].details()
