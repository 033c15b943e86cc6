"""What a run leaves on disk: its name, its JSONL log, its checkpoint.

    <out>/logs/<name>.jsonl           a row {"kind": "run"}, a row an epoch, a row {"kind": "end"}
    <out>/checkpoints/<name>.pt       weights and optimiser after the last whole epoch
"""

import json
import math
import os
import platform
import re
import subprocess
import sys
import zlib
from pathlib import Path

import torch

KEYS = {"epoch", "settings", "net", "optimizer"}  # of a checkpoint


class RunError(RuntimeError):
    """The run cannot go on from what lies on disk; the message says what to do about it."""


def read_rows(path):
    """The rows of a log; a last line that was cut off is left out.

    Raises RunError where there is something else in the file.
    """
    rows = []
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
        for i, line in enumerate(lines):
            try:
                row = json.loads(line or "null")
            except ValueError:
                if i < len(lines) - 1:
                    raise
                break
            if row is not None:
                rows.append(row)
        if not rows or any(not isinstance(row, dict) or "kind" not in row for row in rows):
            raise ValueError("it has other rows, or none")
        if rows[0]["kind"] != "run" or not {"flags", "settings"} <= set(rows[0]):
            raise ValueError("its first row is of another kind")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is no log of a run: {error}") from error
    return rows


class Run:
    """The files of one run. `settings` is what shapes its result: what lies there of a run of the
    same name counts only if it has the same settings."""

    def __init__(self, out, name, settings):
        self.name, self.settings, self.lock = name, settings, None
        self.log_path = Path(out, "logs", f"{name}.jsonl")
        self.checkpoint_path = Path(out, "checkpoints", f"{name}.pt")
        for path in (self.log_path, self.checkpoint_path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(f"{path.parent} cannot be made: {error}; choose --out") from error

    def rows(self):
        """The rows of the log, or none where there is no log; RunError where they are another's."""
        try:
            if not self.log_path.exists() or self.log_path.stat().st_size == 0:
                return []
        except OSError as error:
            raise RunError(f"{self.log_path} cannot be read: {error}") from error
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
        if end.get("final") and (end["stopped"] or len(done) >= epochs):
            return len(done), done[-1]["test_acc"], end["stopped"]
        # An unfinished run may hold more epochs than this command asks for.
        return (len(done), done[-1]["test_acc"], None) if len(done) > epochs else None

    def start(self, first_row):
        """Open the log, cut to the last checkpoint; returns that checkpoint, or None at the start.

        A checkpoint is a dict with "epoch", "net" and "optimizer", its tensors on the CPU.
        """
        self.lock_or_fail()
        rows, checkpoint = self.rows(), None
        first_row = {**first_row, "settings": self.settings}
        if self.checkpoint_path.exists():
            try:
                checkpoint = torch.load(
                    self.checkpoint_path, map_location="cpu", weights_only=True
                )
            except Exception as error:  # torch raises many kinds for a damaged file
                raise RunError(
                    f"{self.checkpoint_path} cannot be read ({type(error).__name__}); "
                    "--fresh starts over"
                ) from error
            if not isinstance(checkpoint, dict) or set(checkpoint) != KEYS:
                raise RunError(f"{self.checkpoint_path} is no checkpoint of a run; move it away")
            then = json.loads(checkpoint["settings"])
            self.compare(self.settings, then, self.checkpoint_path)
        done = checkpoint["epoch"] if checkpoint else 0
        epochs = [row["epoch"] for row in rows if row["kind"] == "epoch"]
        if epochs[:done] != list(range(1, done + 1)):
            raise RunError(
                f"{self.log_path} lacks epochs that {self.checkpoint_path} has behind it; "
                "--fresh starts over"
            )
        if len(epochs) > done + 1:
            raise RunError(
                f"{self.log_path} holds {len(epochs)} epochs, and there is no checkpoint to go on "
                "from; --fresh starts over, another --out keeps it"
            )
        if done:
            first_row = _resumed(rows[0], first_row, done)
        rows = [r for r in rows if r["kind"] in ("epoch", "step") and r["epoch"] <= done]
        # The cut log replaces the old one at once, or not at all.
        partial = self.log_path.with_suffix(".partial")
        try:
            partial.write_text("".join(_line(r) for r in [first_row, *rows]), encoding="utf-8")
            os.replace(partial, self.log_path)
            self.file = open(self.log_path, "a", encoding="utf-8")
        except OSError as error:
            raise RunError(f"{self.log_path} cannot be written: {error}; choose --out") from error
        return checkpoint

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
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process is making {self.log_path}; wait for it, or choose another --out"
            ) from None
        except OSError:  # a file system without locks, or one that is read-only: seen elsewhere
            return

    def release(self):
        """Let other processes go on with this run."""
        if self.lock is not None:
            self.lock.close()

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
        self.file.write("".join(_line(row) for row in rows))
        self.file.flush()

    def save(self, epoch, net, optimizer):
        """Write the checkpoint after `epoch`, from state dicts; the last one stays until then."""
        partial = self.checkpoint_path.with_suffix(".partial")
        settings = json.dumps(self.settings)
        torch.save(
            {"epoch": epoch, "settings": settings, "net": net, "optimizer": optimizer}, partial
        )
        os.replace(partial, self.checkpoint_path)

    def discard(self):
        """Forget what an earlier run of this name left."""
        for path in (self.log_path, self.checkpoint_path):
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise RunError(f"{path} cannot be removed: {error}") from error


def run_name(*parts):
    """A file name for every system from words and numbers; None is left out."""
    parts = [str(part) for part in parts if part is not None]
    words = [re.sub(r"[^A-Za-z0-9.+]+", "_", part).strip("_.") for part in parts]
    name = "-".join(words)
    # What was replaced or cut still tells runs apart; systems allow 255 bytes with the suffix.
    if words != parts or len(name) > 120:
        name = f"{name[:110]}-{zlib.crc32(repr(parts).encode()):08x}"
    return name


def environment(device):
    """Versions, hardware and commit that a result was made with."""
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5
        ).stdout.strip()
        if subprocess.run([*git, "diff", "--quiet", "HEAD"], timeout=5).returncode:
            commit += "-modified"
    except (OSError, subprocess.SubprocessError):
        commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": sys.platform,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "commit": commit,
    }


def processor():
    """The processor's name, as far as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except (OSError, IndexError):
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _resumed(then, now, done):
    """The first row of a run that goes on after `done` epochs: as it was, with the flags of now,
    and with the environment where that is another."""
    keys = ["python", "torch", "device", "device_name", "threads", "cores", "commit", "ranks"]
    keys += ["compile", "channels_last", "cuda_graph"]
    changed = {key: now.get(key) for key in keys if now.get(key) != then.get(key)}
    row = {**then, "flags": now["flags"]}
    if changed:
        resumed = {"after_epoch": done, "date": now.get("date"), **changed}
        row["resumed"] = [*then.get("resumed", []), resumed]
    return row


def _line(row):
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value):
    """`value` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
