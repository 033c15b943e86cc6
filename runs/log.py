"""What a run leaves on disk: its name, its JSONL log, its checkpoint.

    <out>/logs/<name>.jsonl           a row {"kind": "run"}, a row an epoch, a row {"kind": "end"}
    <out>/logs/<name>.run.json        what it was made with; see record.py
    <out>/checkpoints/<name>.pt       weights, optimiser, and how far the run is; see checkpoint.py
"""

import contextlib
import json
import math
import os
import stat
import weakref
from pathlib import Path

from cli import UserError
from runs.checkpoint import Checkpoints, Damaged, plain
from runs.files import sync_folder

KEYS = {"epoch", "settings", "net", "optimizer"}  # of a checkpoint
FIGURES = {  # of rows, numbers or null
    "loss", "acc", "train_loss", "train_acc", "test_loss", "test_acc", "seconds",
    "images_per_second", "eta", "eta_min", "eta_mean", "eta_max", "update", "update_min",
    "update_mean", "update_max", "length", "turn",
}  # fmt: skip
NEEDED = {  # of the row of an epoch, and whether null will do
    "train_loss": True, "train_acc": False, "test_loss": True, "test_acc": False, "eta_mean": True,
    "seconds": False,
}  # fmt: skip

# What a process that was forked holds of a lock would outlive the run by seconds.
LOCKS = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: [lock.close() for lock in list(LOCKS)])


class RunError(UserError):
    """The run cannot begin, or go on from what lies on disk; the message says what to do about it.
    """


def read_rows(path):
    """The rows of a log; a last line that was cut off is left out.

    Raises RunError where there is something else in the file.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("it is no file")
        lines, rows = Path(path).read_bytes().split(b"\n"), []
        for i, line in enumerate(lines):
            try:
                row = json.loads(line.decode()) if line else None
            except (ValueError, RecursionError) as error:
                if i < len(lines) - 1:
                    raise ValueError(f"line {i + 1}: {error}") from error
                break
            if row is not None:
                _check(row, i + 1)
                rows.append(row)
        if not rows:
            raise ValueError("it has no row")
        if rows[0]["kind"] != "run" or not all(
            isinstance(rows[0].get(key), dict) for key in ("flags", "settings")
        ):
            raise ValueError("its first row is of another kind")
        if not isinstance(rows[0].get("resumed", []), list):
            raise ValueError("its first row has no list of what resumed it")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is no log of a run: {reason(error)}") from error
    return rows


def reason(error):
    """What an error says, without the path that an OSError repeats."""
    return getattr(error, "strerror", None) or str(error)


def _check(row, line):
    """Raises ValueError unless a row has what those who read it rely on."""
    kind = row.get("kind") if isinstance(row, dict) else None
    if not isinstance(kind, str):
        raise ValueError(f"line {line} is no row")
    for key in {"epoch": ["epoch"], "step": ["epoch", "step"]}.get(kind, []):
        if type(row.get(key)) is not int or row[key] < 1:
            raise ValueError(f"line {line} has no {key}")
    for key, value in row.items() if kind in ("epoch", "step") else ():
        number = value is None or isinstance(value, (int, float))
        if key in FIGURES and not number:
            raise ValueError(f"line {line} has {repr(value)[:50]} for {key}")
    for key, null in NEEDED.items() if kind == "epoch" else ():
        if key not in row or (row[key] is None and not null):
            raise ValueError(f"line {line} has no {key}")


class RunLog:
    """The files of one run. `settings` is what shapes its result: what lies there of a run of the
    same name counts only if it has the same settings.

    What a full disk does not take of the log waits in memory for the next time, and no checkpoint
    is written before the rows that belong to it.
    """

    def __init__(self, out, name, settings):
        self.name, self.settings, self.lock = name, settings, None
        self.log_path = Path(out, "logs", f"{name}.jsonl")
        self.record_path = Path(out, "logs", f"{name}.run.json")
        self.checkpoint_path = Path(out, "checkpoints", f"{name}.pt")
        self.checkpoints = Checkpoints(self.checkpoint_path)
        self.file, self.length, self.pending = None, 0, b""
        self.saved, self.changed = None, {}  # the place of the newest checkpoint; see `start`
        for path in (self.log_path, self.checkpoint_path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                said = f"{path.parent} cannot be made: {reason(error)}; choose --out"
                raise RunError(said) from error

    def rows(self):
        """The rows of the log, or none where there is no log; RunError where they are another's."""
        try:
            found = self.log_path.stat()
            if stat.S_ISREG(found.st_mode) and found.st_size == 0:
                return []
        except FileNotFoundError:
            return []
        except OSError as error:
            raise RunError(f"{self.log_path} cannot be read: {reason(error)}") from error
        try:
            rows = read_rows(self.log_path)
        except RunError as error:
            raise RunError(f"{error}; --fresh starts over") from error
        self.compare(self.settings, rows[0]["settings"], self.log_path)
        return rows

    def epochs(self):
        """The epoch rows of the log."""
        return [row for row in self.rows() if row["kind"] == "epoch"]

    def finished(self, epochs):
        """(epochs done, test accuracy, why it stopped) if nothing is left to do up to `epochs`."""
        rows = self.rows()
        done = [row for row in rows if row["kind"] == "epoch"]
        end = rows[-1] if rows and rows[-1]["kind"] == "end" else {}
        test_acc = done[-1].get("test_acc") if done else None
        if end.get("final") and (end.get("stopped") or len(done) >= epochs):
            return len(done), test_acc, end.get("stopped")
        # An unfinished run may hold more epochs than this command asks for.
        return (len(done), test_acc, None) if len(done) > epochs else None

    def start(self, first_row):
        """Open the log, cut to the last checkpoint; returns (that checkpoint, or None at the start;
        what is to be said of one that is damaged, or None). `changed` maps what the run had in its
        beginning and has otherwise now to that. Where it raises, nothing stays locked.

        A checkpoint is a dict, see `save`, with its tensors on the CPU.
        """
        self.lock_or_fail()
        try:
            return self._start({**first_row, "settings": self.settings})
        except BaseException:
            self.release()
            raise

    def _start(self, first_row):
        rows = self.rows()
        checkpoint, warning = self._checkpoint()
        done = checkpoint["epoch"] if checkpoint else 0
        epochs = [row["epoch"] for row in rows if row["kind"] == "epoch"]
        if len(epochs) < done or epochs[:done] != list(range(1, done + 1)):
            raise RunError(
                f"{self.log_path} lacks epochs that {self.checkpoint_path} has behind it; "
                "--fresh starts over"
            )
        # One epoch may be logged before its checkpoint, and more where the disk was full.
        if checkpoint is None and len(epochs) > 1 and not any(r["kind"] == "unsaved" for r in rows):
            raise RunError(
                f"{self.log_path} holds {len(epochs)} epochs, and there is no checkpoint to go on "
                "from; --fresh starts over, another --out keeps it"
            )
        if checkpoint:
            self.saved = checkpoint["epoch"], checkpoint.get("step", 0)
            first_row, self.changed = _resumed(rows[0], first_row, checkpoint)
        rows = [r for r in rows if r["kind"] in ("epoch", "step") and r["epoch"] <= done]
        # The cut log replaces the old one at once, or not at all.
        partial = self.log_path.with_suffix(".partial")
        try:
            with open(partial, "wb") as file:
                file.write("".join(_line(r) for r in [first_row, *rows]).encode())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.log_path)
            sync_folder(partial.parent)
            self.file = open(self.log_path, "ab", buffering=0)
            self.length = self.log_path.stat().st_size
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink()
            said = f"{self.log_path} cannot be written: {reason(error)}; choose --out"
            raise RunError(said) from error
        return checkpoint, warning

    def _checkpoint(self):
        try:
            checkpoint, warning = self.checkpoints.read()
        except OSError as error:
            raise RunError(f"{error.filename} cannot be read: {error.strerror}") from error
        except Damaged as error:
            raise RunError(f"{error}; --fresh starts over") from error
        if checkpoint is None:
            return None, None
        whole = isinstance(checkpoint, dict) and KEYS <= set(checkpoint)
        try:
            then = json.loads(checkpoint["settings"]) if whole else None
            whole = whole and isinstance(then, dict)
            numbers = [checkpoint["epoch"], checkpoint.get("step", 0)] if whole else []
            whole = whole and all(type(x) is int and x >= 0 for x in numbers)
        except (TypeError, ValueError, RecursionError):
            whole = False
        if not whole:
            raise RunError(f"{self.checkpoint_path} is no checkpoint of a run; move it away")
        self.compare(self.settings, then, self.checkpoint_path)
        return checkpoint, warning

    def lock_or_fail(self):
        """Keep other processes from this run, for as long as this one lives."""
        if self.lock is not None:
            return
        try:
            import fcntl
        except ImportError:  # Windows
            return
        try:
            self.lock = open(self.checkpoint_path.with_suffix(".lock"), "a")
            LOCKS.add(self.lock)
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()  # what is not locked is not taken for it later
            raise RunError(
                f"another process is making {self.log_path}; wait for it, or choose another --out"
            ) from None
        except OSError:  # a file system without locks, or one that is read-only: seen elsewhere
            return

    def release(self):
        """Let other processes go on with this run."""
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    @staticmethod
    def compare(settings, then, path):
        """Raises RunError, naming the settings, if `then` of a file on disk has others."""
        now = json.loads(json.dumps(settings))
        odd = [k for k in now if then.get(k) != now[k]]
        if odd:
            was = ", ".join(f"{k} {then.get(k)} then, {now[k]} now" for k in odd)
            raise RunError(
                f"{path} is of another run of this name ({was}); use another --out, or --fresh to "
                "start over"
            )

    def log(self, *rows):
        """Append rows; returns why they wait in memory, or None."""
        self.pending += "".join(_line(row) for row in rows).encode()
        try:
            # What is left of an attempt that failed goes first.
            self.file.truncate(self.length)
            rest = memoryview(self.pending)
            while rest:
                rest = rest[self.file.write(rest) :]
            os.fsync(self.file.fileno())
        except OSError as error:
            return f"{self.log_path} cannot be written: {error.strerror or error}"
        self.length += len(self.pending)
        self.pending = b""
        return None

    def save(self, checkpoint):
        """Write a checkpoint, a dict of what `checkpoint.plain` takes; returns why it could not be,
        and then the last ones are there still, or None.

        It has "epoch", the number of whole epochs, "net" and "optimizer", the state dicts, and
        what Course adds. Raises RunError where a value in it is of another type.
        """
        failure = self.log() if self.pending else None
        if failure is not None:
            return failure
        try:
            self.checkpoints.write(
                self.plain({**checkpoint, "settings": json.dumps(self.settings)})
            )
        except OSError as error:
            return f"{self.checkpoint_path} cannot be written: {error.strerror or error}"
        self.saved = checkpoint["epoch"], checkpoint.get("step", 0)
        return None

    @staticmethod
    def plain(state):
        """`state` as a checkpoint holds it; RunError where it cannot."""
        try:
            return plain(state, "the state")
        except TypeError as error:
            raise RunError(f"{error}, which a checkpoint of plain types cannot hold") from error

    def discard(self):
        """Forget what an earlier run of this name left."""
        try:
            for path in (self.log_path, self.record_path):
                path.unlink(missing_ok=True)
            self.checkpoints.discard()
        except OSError as error:
            raise RunError(f"{error.filename} cannot be removed: {error.strerror}") from error


def _resumed(then, now, checkpoint):
    """(The first row of a run that goes on from a checkpoint: as it was, with the flags of now, and
    with the environment where that is another; what is another)."""
    keys = ["python", "torch", "device", "device_name", "threads", "cores", "commit", "ranks"]
    keys += ["compile", "channels_last", "cuda_graph", "deterministic"]
    changed = {key: now.get(key) for key in keys if now.get(key) != then.get(key)}
    keys = ("micro_bs", "test_bs")
    flags = {key: now["flags"].get(key) for key in keys
             if now["flags"].get(key) != then["flags"].get(key)}  # fmt: skip
    changed |= {"flags": flags} if flags else {}
    row = {**then, "flags": now["flags"]}
    if changed:
        where = {"after_epoch": checkpoint["epoch"]}
        if checkpoint.get("step"):
            where["step"] = checkpoint["step"]
        resumed = {**where, "date": now.get("date"), **changed}
        row["resumed"] = [*then.get("resumed", []), resumed]
    return row, changed


def as_logged(row):
    """A row as it is read from the log."""
    return json.loads(_line(row))


def _line(row):
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value):
    """`value` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
