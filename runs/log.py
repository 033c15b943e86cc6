"""The files of a run: <out>/logs/<name>.jsonl, a row {"kind": "run"}, a row an epoch, and a row
{"kind": "end"}; <name>.run.json beside it, see record.py; <out>/checkpoints/<name>.pt, see
checkpoint.py."""

import json
import os
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

from cli import UserError
from runs.checkpoint import Checkpoints, Damaged, plain, settings_of
from runs.files import cannot, reason, shown, write_whole
from runs.name import wherever
from runs.rows import check

# What a run that goes on compares with its first row: of the environment, and of the flags.
ENVIRONMENT = ("python", "torch", "device", "device_name", "threads", "cores", "commit", "ranks",
               "compile", "channels_last", "cuda_graph", "deterministic")  # fmt: skip
BATCH_FLAGS = ("micro_bs", "test_bs")

# The ways out of files that cannot be used: the one that keeps them comes first.
ANEW = "another --out keeps {}, --fresh starts over"

# A forked process would hold the locks for seconds after the run.
LOCKS = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [lock.close() for lock in list(LOCKS)])


class RunError(UserError):
    """The run cannot begin, or go on from the files on disk; the message says what to do."""


@contextmanager
def disk_errors(path, what, advice=""):
    """A context in which an OSError becomes RunError: `path` cannot be `what`."""
    try:
        yield
    except OSError as error:
        raise RunError(cannot(path, what, error) + advice) from error


def as_logged(row):
    """A row as `read_rows` returns it: null for numbers that are not finite."""
    return json.loads(json.dumps(row), parse_constant=lambda name: None)


def json_line(row, sort_keys=False):
    """A row as a line of strict JSON, in bytes."""
    return json.dumps(as_logged(row), sort_keys=sort_keys, allow_nan=False).encode() + b"\n"


def read_rows(path):
    """The rows of a log, a dict each; a last line that was cut off is left out.

    Raises RunError where the file is no log of a run.
    """
    rows = []
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        lines = Path(path).read_bytes().split(b"\n")
        for i, line in enumerate(lines, 1):
            try:
                row = json.loads(line.decode()) if line else None
            except (ValueError, RecursionError) as error:
                if i == len(lines):
                    break
                raise ValueError(f"line {i}: {error}") from error
            if line:
                check(row, i, first=not rows)
                rows.append(row)
        if not rows:
            raise ValueError("it has no row")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is no log of a run: {reason(error)}") from error
    return rows


def read_first_row(path):
    """The first row of a log. Raises RunError where the file has none."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        with open(path, "rb") as file:
            row = json.loads(file.readline().decode())
        check(row, 1, first=True)
    except (OSError, ValueError, RecursionError) as error:
        raise RunError(f"{path} is no log of a run: {reason(error)}") from error
    return row


def differences(then, now):
    """In words, one after the other, how the settings `now` differ from `then`, those of a run on
    disk. Where the images lie is none, nor are class names, which earlier versions did not log."""
    for key, value in as_logged(now).items():
        was = then.get(key)
        if was == value or key == "classes" and was is None:
            continue
        if key == "dataset" and isinstance(was, str) and wherever(was) == wherever(value):
            continue
        if key == "classes" and isinstance(was, list):
            gone, new = _without(was, value), _without(value, was)
            yield f"classes {gone} then, {new} now" if gone != new else "the order of the classes"
        else:
            yield from _pairs(key, was, value)


def _without(names, others):
    """The first names that are not among others, in words."""
    others = set(map(str, others))
    rest = [shown(name) for name in names if str(name) not in others]
    return ", ".join(rest[:3]) + ", ..." * (len(rest) > 3) or "none"


def _pairs(name, then, now):
    """`name then, now` of two values; where both are dicts, of what differs in them."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            if then.get(key) != now.get(key):
                yield from _pairs(f"{name} {shown(key)}", then.get(key), now.get(key))
    else:
        yield f"{name} {shown(then)} then, {shown(now)} now"


class RunLog:
    """The log and the checkpoints of the run with these `settings`, which shape its result.

    `images`, an Images, are the files that it reads, where they are to be compared. Rows that a
    full disk refuses wait in `pending`, and no checkpoint is written before them. `saved` is the
    (epoch, step) of the newest checkpoint. `changed` has, after `start`, the environment, the flags
    and the images that differ from the run's first row, {key: value now}; `other_images` says how
    these do, in a word of Images.difference, or is None. `tracker`, a Tracker or None, is sent
    every row that is logged.
    """

    def __init__(self, out, name, settings, images=None):
        self.name, self.settings, self.images = name, settings, images
        self.log_path = Path(out, "logs", f"{name}.jsonl")
        self.record_path = Path(out, "logs", f"{name}.run.json")
        self.checkpoint_path = Path(out, "checkpoints", f"{name}.pt")
        self.checkpoints = Checkpoints(self.checkpoint_path)
        self.lock = self.file = self.saved = self.tracker = None
        self.pending, self.length, self.changed, self.other_images = b"", 0, {}, None

    def rows(self):
        """The rows of the log, none where there is no log. RunError where it is another run's."""
        path = self.log_path
        if not os.path.exists(path) or os.path.isfile(path) and not os.path.getsize(path):
            return []
        try:
            rows = read_rows(path)
        except RunError as error:
            raise RunError(f"{error}; {ANEW.format('it')}") from error
        self.compare(self.settings, rows[0]["settings"], path)
        return rows

    def epochs(self):
        """The epoch rows of the log."""
        return [row for row in self.rows() if row["kind"] == "epoch"]

    def finished(self, epochs):
        """(completed epochs, the row of the last one or None, reason for stopping) of a run with
        nothing left to do up to `epochs`, else None."""
        rows = self.rows()
        done = [row for row in rows if row["kind"] == "epoch"]
        end = rows[-1] if rows and rows[-1].get("final") else {}
        # An unfinished run may hold more epochs than this command asks for.
        if end and (end.get("stopped") or len(done) >= epochs) or len(done) > epochs:
            self.compare_images(rows[0])
            return len(done), done[-1] if done else None, end.get("stopped")
        return None

    def start(self, first_row):
        """Open the log, truncated to the last checkpoint, and lock the run. Returns the checkpoint
        to go on from, or None, and a warning, or None.

        A run that goes on keeps its own first row, in which "resumed" lists what has changed.
        Raises RunError, and then the run is not locked.
        """
        self.lock_or_fail()
        try:
            row = {**first_row, "settings": self.settings}
            if self.images is not None and self.images.summary is not None:
                row["image_files"] = self.images.summary
            return self._start(row)
        except BaseException:
            self.release()
            raise

    def _start(self, first_row):
        rows = self.rows()
        checkpoint, warning = self._read_checkpoint()
        done = checkpoint["epoch"] if checkpoint else 0
        epochs = [row["epoch"] for row in rows if row["kind"] == "epoch"]
        missing = len(epochs) < done or epochs[:done] != list(range(1, done + 1))
        if missing or (checkpoint and not rows):
            raise RunError(f"{self.log_path} lacks epochs of {self.checkpoint_path}; "
                           f"{ANEW.format('both')}")  # fmt: skip
        # One epoch may be logged before its checkpoint, and more where the disk was full.
        if checkpoint is None and len(epochs) > 1 and not any(r["kind"] == "unsaved" for r in rows):
            raise RunError(f"{self.log_path} holds {len(epochs)} epochs, and there is no "
                           f"checkpoint to go on from; {ANEW.format('them')}")
        if checkpoint:
            self.saved = checkpoint["epoch"], checkpoint.get("step", 0)
            first_row = self._resume(rows[0], first_row)
        rows = [r for r in rows if r["kind"] in ("epoch", "step") and r["epoch"] <= done]
        with disk_errors(self.log_path, "written", "; choose --out"):
            write_whole(self.log_path, b"".join(map(json_line, [first_row, *rows])))
            self.file = open(self.log_path, "ab", buffering=0)
            self.length = self.log_path.stat().st_size
        return checkpoint, warning

    def _resume(self, then, now):
        """The first row `then` of a run that goes on, with the flags of `now`, and with what has
        changed, where anything has."""
        def changed(keys, old, new):
            return {key: new.get(key) for key in keys if new.get(key) != old.get(key)}

        flags = changed(BATCH_FLAGS, then["flags"], now["flags"])
        self.changed = changed(ENVIRONMENT, then, now) | ({"flags": flags} if flags else {})
        if self.compare_images(then):
            self.changed["image_files"] = now["image_files"]
        row, (epoch, step) = {**then, "flags": now["flags"]}, self.saved
        if self.changed:
            place = {"after_epoch": epoch} | ({"step": step} if step else {})
            row["resumed"] = [*then.get("resumed", []),
                              {**place, "date": now.get("date"), **self.changed}]  # fmt: skip
        return row

    def compare_images(self, first_row):
        """Find out how the images differ from those of the first row, and return `other_images`."""
        if self.images is not None:
            then = first_row.get("image_files")
            self.other_images = self.images.difference(then, self.record_path)
        return self.other_images

    def _read_checkpoint(self):
        with disk_errors(self.checkpoint_path, "read"):
            try:
                checkpoint, warning = self.checkpoints.read()
            except Damaged as error:
                raise RunError(f"{error}; {ANEW.format('both')}") from error
        if checkpoint is not None:
            settings = settings_of(checkpoint)
            if settings is None:
                raise RunError(f"{self.checkpoint_path} is no checkpoint of a run; move it away, "
                               "or choose another --out")  # fmt: skip
            self.compare(self.settings, settings, self.checkpoint_path)
        return checkpoint, warning

    def lock_or_fail(self):
        """Make the folders of the run and lock it for this process. RunError where they cannot be
        made, or where another process has locked it."""
        if self.lock is not None:
            return
        for path in (self.log_path, self.checkpoint_path):
            with disk_errors(path.parent, "made", "; choose --out"):
                path.parent.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            self.lock = open(self.checkpoint_path.with_suffix(".lock"), "ab")
            LOCKS.add(self.lock)
            end = time.monotonic() + 0.2  # a child between fork and exec holds it for a moment
            while True:
                try:
                    return fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() > end:
                        raise
                    time.sleep(0.01)
        except BlockingIOError:
            self.release()  # so that a later call does not take it for locked
            raise RunError(f"another process is making {self.log_path}; wait for it, or choose "
                           "another --out") from None  # fmt: skip
        except OSError:  # a file system without locks, or a read-only one: noticed elsewhere
            return

    def release(self):
        """Let other processes go on with this run."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    @staticmethod
    def compare(settings, then, path):
        """Raises RunError, with the names, where the settings `then` of the file `path` differ."""
        odd = list(differences(then, settings))
        if odd:
            was = ", ".join(odd[:4]) + (", ..." if len(odd) > 4 else "")
            raise RunError(f"{path} is of another run of this name ({was}); "
                           f"{ANEW.format('it')}")  # fmt: skip

    def log(self, *rows):
        """Append rows. Returns None, or the reason why they wait in memory."""
        failure = self._append(rows)
        if self.tracker is not None:
            self.tracker.rows(rows)
        return failure

    def _append(self, rows):
        self.pending += b"".join(map(json_line, rows))
        try:
            self.file.truncate(self.length)  # removes a part that an earlier call has written
            rest = memoryview(self.pending)
            while rest:
                rest = rest[self.file.write(rest) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            return cannot(self.log_path, "written", error)
        self.length += len(self.pending)
        self.pending = b""
        return None

    def save(self, checkpoint):
        """Write a checkpoint, a dict with the keys of checkpoint.py except "settings". Returns
        None, or the reason why it was not written; the earlier ones stay then.

        Raises RunError where a value is of a type that a checkpoint cannot hold.
        """
        if self.pending and (failure := self.log()):
            return failure
        content = self.plain({**checkpoint, "settings": json.dumps(self.settings)})
        try:
            self.checkpoints.write(content)
        except OSError as error:
            return cannot(self.checkpoint_path, "written", error)
        self.saved = checkpoint["epoch"], checkpoint.get("step", 0)
        return None

    def keep_best(self):
        """Keep the newest checkpoint as the best one. Returns None, or the reason why not."""
        try:
            self.checkpoints.keep_best()
        except OSError as error:
            return cannot(self.checkpoints.best, "written", error)
        return None

    @staticmethod
    def plain(state):
        """`state` as a checkpoint holds it. Raises RunError where it cannot."""
        try:
            return plain(state, "the state")
        except TypeError as error:
            raise RunError(f"{error}, which a checkpoint of plain types cannot hold") from error

    def discard(self):
        """Delete the log, the record and the checkpoints of an earlier run of this name."""
        with disk_errors(self.log_path, "removed"):
            for path in (self.log_path, self.record_path):
                path.unlink(missing_ok=True)
            self.checkpoints.discard()
