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


class RunError(RuntimeError):
    """The run cannot go on from what lies on disk; the message says what to do about it."""


class Run:
    """The files of one run. `settings` is what shapes its result; an unfinished run of the same
    name goes on only with the same settings."""

    def __init__(self, out, name, settings):
        self.name, self.settings = name, settings
        self.log_path = Path(out, "logs", f"{name}.jsonl")
        self.checkpoint_path = Path(out, "checkpoints", f"{name}.pt")
        for path in (self.log_path, self.checkpoint_path):
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(f"{path.parent} cannot be made: {error}; choose --out") from error

    def rows(self):
        """The rows of the log; a last line that was cut off is left out."""
        rows = []
        if self.log_path.exists():
            for line in self.log_path.read_text(encoding="utf-8").splitlines():
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    break
        return rows

    def finished(self, epochs):
        """The last row of the log if nothing is left to do up to `epochs`, else None."""
        rows = self.rows()
        end = rows[-1] if rows else {"kind": None}
        if end["kind"] != "end" or end["stopped"] == "interrupted":
            return None
        return None if end["stopped"] is None and end["epochs"] < epochs else end

    def start(self, first_row, device):
        """Open the log, cut to the last checkpoint; returns that checkpoint, or None at the start.

        A checkpoint is a dict with "epoch", "net" and "optimizer".
        """
        rows, checkpoint = self.rows(), None
        if self.checkpoint_path.exists():
            try:
                checkpoint = torch.load(
                    self.checkpoint_path, map_location=device, weights_only=True
                )
            except Exception as error:  # torch raises many kinds for a damaged file
                raise RunError(
                    f"{self.checkpoint_path} cannot be read ({type(error).__name__}); "
                    "--fresh starts over"
                ) from error
            self._check(checkpoint, rows)
            done = checkpoint["epoch"]
            first_row = {**rows[0], "flags": first_row["flags"]}
            rows = [r for r in rows if r["kind"] in ("epoch", "step") and r["epoch"] <= done]
        else:
            rows = []
        # The cut log replaces the old one at once, or not at all.
        partial = self.log_path.with_suffix(".partial")
        partial.write_text("".join(_line(r) for r in [first_row, *rows]), encoding="utf-8")
        os.replace(partial, self.log_path)
        self.file = open(self.log_path, "a", encoding="utf-8")
        return checkpoint

    def _check(self, checkpoint, rows):
        epochs = [row["epoch"] for row in rows if row["kind"] == "epoch"]
        if epochs[: checkpoint["epoch"]] != list(range(1, checkpoint["epoch"] + 1)):
            raise RunError(
                f"{self.log_path} lacks epochs that {self.checkpoint_path} has behind it; "
                "--fresh starts over"
            )
        then = json.loads(checkpoint["settings"])
        odd = [k for k in self.settings if then.get(k) != self.settings[k]]
        if odd:
            was = ", ".join(f"{k} {then.get(k)} then, {self.settings[k]} now" for k in odd)
            raise RunError(
                f"{self.checkpoint_path} is of another run of this name ({was}); use another "
                "--out, or --fresh to start over"
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
            path.unlink(missing_ok=True)


def run_name(*parts):
    """A file name for every system from words and numbers; None is left out."""
    words = [re.sub(r"[^A-Za-z0-9.+]+", "_", str(part)).strip("_.") for part in parts if part]
    name = "-".join(words)
    if len(name) > 120:  # systems allow 255 bytes, with the folder's length beside it
        name = f"{name[:110]}-{zlib.crc32(name.encode()):08x}"
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
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": sys.platform,
        "device": str(device),
        "device_name": name,
        "threads": torch.get_num_threads(),
        "commit": commit,
    }


def _line(row):
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def _finite(value):
    """`value` with null for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
