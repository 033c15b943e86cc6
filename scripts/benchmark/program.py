"""The start of main.py from outside, in a process of its own."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from runs.log import RunError

ROOT = Path(__file__).resolve().parents[2]


def spawn(flags, out, args, device):
    """(Popen of main.py, the folder of its logs)."""
    command = [sys.executable, str(ROOT / "main.py"), *flags, "--device", str(device)]
    command += ["--data_dir", str(args.data_dir), "--out", str(out)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"},
    )  # fmt: skip


def first_step(args, device):
    """Seconds from the start of main.py until it says what came of its first epoch, which is one
    batch in training and one in testing: the first step, and a little more."""
    flags = ["--dataset", args.dataset, "--arch", args.arch, "--depth", str(args.depth),
             "--width", str(args.width), "--train_bs", str(args.batch_size), "--epochs", "1",
             "--train_examples", str(args.batch_size), "--test_examples", "128"]  # fmt: skip
    with tempfile.TemporaryDirectory() as out:
        start = time.perf_counter()
        with spawn(flags, out, args, device) as process:
            seconds = None
            for line in process.stdout:
                if line.startswith("epoch 1/1"):
                    seconds = time.perf_counter() - start
            said = process.stderr.read()
        if seconds is None:
            said = said.strip()[-2000:] or f"exit code {process.returncode}"
            raise RunError(f"main.py did not come to its end: {said}")
        return seconds


def importing():
    """Seconds of a process that imports torch and ends."""
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return time.perf_counter() - start
