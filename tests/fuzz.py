"""Feed hostile files to the readers of a user's files: `python -m tests.fuzz` (Linux).

Hypothesis damages and forges whole files of main.py (prepared data sets, a log, a record, a
checkpoint), images, and folders of them. A finding is an input that makes its reader raise anything
but the documented error, run code, write, start a process, take more than SECONDS or its memory, or
end the process: it ends the fuzzing of that reader, and its file is kept. Inputs are a function of
--seed. Prints Markdown; exit code: 0 without findings, 1 with one.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import faulthandler
import io
import json
import multiprocessing
import os
import pickle
import resource
import shutil
import subprocess
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from datetime import date
from typing import NamedTuple

import hypothesis
import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image, features

from cli import UserError
from data import load
from data.arrays import load_arrays
from runs import record
from runs.checkpoint import Damaged, unpack
from runs.log import read_rows

ROOT = Path(__file__).resolve().parents[1]
BATCH = 1000  # inputs for which hypothesis remembers what it has drawn
SECONDS = 5  # for an input
EVENTS = ("os.", "subprocess.", "socket.", "shutil.", "pickle.find_class", "ctypes.dlopen", "pty.")
HARMLESS = ("os.listdir", "os.scandir", "os.walk")
LENGTHS = (0, 1, 1, 2, 4, 8, 30, 200, 2000, 2**20)
# Words of the formats, and what other readers have fallen over.
TOKENS = [
    b"",
    *(n.to_bytes(8, order) for n in (1, 2**31, 2**63, 2**64 - 1) for order in ("little", "big")),
    b"'|O'", b"'<i8'", b"True", b"(9999999999, 9, 9, 3)", b"PK\1\2", b"PK\3\4", b"PK\5\6", b"-1",
    b"\x93NUMPY\2\0", b"[" * 3000, b'{"a":' * 3000, b"9" * 4400, b"null", b"NaN", b"1e999", b"{",
    b'"\\ud800"', b'"kind"', b"}", b"]", b",", b"\n", b"\r", b"\0", b"\xff", b"\xef\xbb\xbf", b")R",
    b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nTensor\n", b"ctorch\nFloatStorage\n", b"]2a",
    b"ctorch._utils\n_rebuild_tensor_v2\n", b"\x8e" + b"\xff" * 8, b"r\xff\xff\xff\x7f", b"IHDR",
    b"IDAT", b"\xff\xd8", b"\xff\xda", b"\xff\xc2", b"GIF89a", b"II*\0", b"MM\0*", b"RIFF",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
]  # fmt: skip
CLASSES = ("train/a", "train/b", "val/a", "val/b")


class Harm:
    def __reduce__(self):
        return os.system, ("true",)


def make_seeds(folder):
    """{reader: [whole files of its kind, and some that would run code]}; uses an empty folder."""
    flags = "--arch fcn --depth 2 --width 4 --dataset digits --epochs 1 --log_steps --out".split()
    command = [sys.executable, ROOT / "main.py", *flags, folder]
    subprocess.run(command, check=True, capture_output=True)
    log, checkpoint, facts = (
        next(Path(folder).rglob(x)).read_bytes() for x in ("*.jsonl", "*.pt", "*.run.json")
    )
    facts = json.loads(facts)
    facts["code"]["diff"] = None
    pixels = np.arange(6 * 4 * 4 * 3, dtype=np.uint8).reshape(6, 4, 4, 3)
    arrays = {f"{split}_{key}": x for split in ("train", "test")
              for key, x in (("images", pixels), ("labels", np.arange(6) % 3))}  # fmt: skip
    objects = {**arrays, "train_images": np.array([Harm()] * 6, dtype=object)}
    y, x = np.mgrid[:20, :30]
    image = Image.fromarray(np.stack([8 * x, 12 * y, x * y % 256], 2).astype(np.uint8))
    kinds = ("RGB JPEG", "L JPEG", "CMYK JPEG", "RGB PNG", "P PNG", "RGBA PNG", "P GIF", "RGB BMP",
             "RGB PPM", "RGB WEBP", "RGB TIFF", "1 TIFF", "RGB EPS", "L JPEG2000", "RGB DDS",
             "RGB SGI", "RGB PCX", "RGB QOI", "RGBA ICO", "RGB ICNS", "P BLP", "1 MSP", "1 XBM",
             "RGB TGA", "P TGA", "I PPM", "I;16 TIFF", "I;16 PNG")  # fmt: skip
    kinds += ("RGB AVIF",) if features.check("avif") else ()
    modes = {mode: image.convert("L").convert(mode) for mode in ("I", "I;16")}  # not from RGB
    images = [made((modes.get(mode) or image.convert(mode)).save, kind)
              for mode, kind in map(str.split, kinds)]  # fmt: skip
    images += [made(image.save, "JPEG", progressive=True), made(image.save, "MPO", save_all=True),
               made(image.save, "TIFF", compression="tiff_lzw")]  # fmt: skip
    harmful = [pickle.dumps({"epoch": 1, "net": Harm()}), made(lambda f: torch.save(Harm(), f))]
    return {
        "npz": [made(np.savez, **arrays), made(np.savez_compressed, **arrays),
                made(np.savez, **objects)],
        "log": [log, log[:-5]], "record": [json.dumps(facts, indent=1).encode()],
        "checkpoint": [checkpoint] * 4 + harmful, "images": images, "folders": images[:1],
    }  # fmt: skip


def made(write, *args, **options):
    file = io.BytesIO()
    write(file, *args, **options)
    return file.getvalue()


def write_file(path, data, program):
    path.write_bytes(mutated(data, program))


def write_image(path, data, program):
    """A mutated image, and folders in which each image is a link to it."""
    write_file(path, data, program)
    for name in () if path.with_name("images").exists() else CLASSES:
        folder = path.with_name("images") / name
        folder.mkdir(parents=True)
        (folder / "x.jpg").symlink_to(path)


def write_folders(path, data, program):
    """The image `data` in folders with a change for each of the first two pairs in `program`: a
    name is taken away, and something else is put there."""
    root = path.with_name("images")
    shutil.rmtree(root, ignore_errors=True)
    write_image(path, data, b"")
    for where, what in zip(program[:4:2], program[1:4:2]):
        folder = CLASSES[where % 4]
        target = f"{root}/" + (folder, f"{folder}/x.jpg", f"{folder}/\n.jpg", "val")[where // 64]
        with contextlib.suppress(OSError):
            os.rename(target, f"{target}.{what}") if what % 8 else os.mkdir(f"{target}/c")
            (os.mkfifo, os.mkdir, lambda x: os.symlink("..", x), lambda x: os.symlink("gone", x),
             lambda x: os.symlink("/dev/zero", x))[what % 5](target)  # fmt: skip


def read_images(path):
    data = load(f"folder:{path.parent}/images", None, 4, 4, torch.device("cpu"), image_size=16)
    for _ in (batch for part in (data.train, data.test) for batch in part):
        pass


class Reader(NamedTuple):
    """read(path) reads what write(path, file, program) has written, within `memory` bytes."""

    read: Callable
    write: Callable = write_file
    memory: int = 2**28


READERS = {
    "npz": Reader(load_arrays), "log": Reader(read_rows), "record": Reader(record.read),
    "checkpoint": Reader(lambda path: unpack(path.read_bytes())),
    "images": Reader(read_images, write_image, 2**30),  # PIL decodes up to 179 million pixels
    "folders": Reader(read_images, write_folders),
}  # fmt: skip


def mutated(data, program):
    """`data` with a change for every five bytes of `program`: in which record of an archive, whose
    checksum is made right again, from which byte on, of how many, and what replaces them."""
    records = [("", data)]
    if archive := data[:2] == b"PK" and program and program[0] % 4:
        with zipfile.ZipFile(io.BytesIO(data)) as file:
            records = [(name, file.read(name)) for name in file.namelist()]
    for which, high, low, length, new in zip(*[iter(program)] * 5):
        i = which * (which % 2) % len(records)  # half of all in the first: a checkpoint's pickle
        name, content = records[i]
        at = (low if high % 2 else 256 * high + low) % (len(content) + 1)  # often in the header
        end = at + LENGTHS[length % len(LENGTHS)]
        new = [*TOKENS, content[at:end] * 3, bytes([new])][min(new, len(TOKENS) + 1)]
        if high > 250:
            records[i] = f"{name}{new.decode('latin-1')}"[:99], records[-1][1]
        else:
            records[i] = name, content[:at] + new + content[end:]
    return made(write_archive, records) if archive else records[0][1]


def write_archive(file, records):
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records:
            archive.writestr(zipfile.ZipInfo(name), content)  # without the time of day


def fuzz(*args):
    """Call feed(*args, counts) in a process of its own; returns [begun, refused, accepted], and
    the finding or ""."""
    context = multiprocessing.get_context("fork")
    counts = context.Array("q", 3, lock=False)
    process = context.Process(target=feed, args=(*args, counts))
    process.start()
    process.join()
    message = Path(args[3], "stderr").read_text(errors="replace")[-8000:]
    return counts[:], f"exit code {process.exitcode}: {message}" if process.exitcode else ""


def feed(reader, files, inputs, folder, seed, seconds, counts):
    """Feed `inputs` made of `files` to the reader in this process, which a finding ends."""
    torch.set_num_threads(1)  # more would wait for threads that a fork leaves behind
    path, watching = Path(folder, "input"), False
    with open(Path(folder, "stderr"), "wb") as file:
        os.dup2(file.fileno(), 1)  # libtiff and libjpeg print
        os.dup2(file.fileno(), 2)

    def end(message):
        os.write(2, message.encode())
        os._exit(1)

    def audit(event, args):
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        runs = event == "compile" and args[1] == "<string>"
        if watching and (writes or runs or event.startswith(EVENTS) and event not in HARMLESS):
            end(f"it ran {event}")

    def attempt(data, program):
        nonlocal watching
        reader.write(path, data, program)
        counts[0] += 1
        faulthandler.dump_traceback_later(seconds, exit=True, file=2)
        watching = True
        try:
            reader.read(path)
            outcome = 2
        except (UserError, Damaged):
            outcome = 1
        except BaseException:
            watching = False
            end(traceback.format_exc())
        watching = False
        faulthandler.cancel_dump_traceback_later()
        counts[outcome] += 1

    for data in files:  # what is imported at first use is no finding
        attempt(data, b"")
    counts[:] = 0, 0, 0
    sys.addaudithook(audit)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, [pages * resource.getpagesize() + reader.memory] * 2)
    for first in range(0, inputs, BATCH):
        limits = hypothesis.settings(
            max_examples=min(BATCH, inputs - first), deadline=None, database=None,
            phases=[hypothesis.Phase.generate], suppress_health_check=list(hypothesis.HealthCheck),
        )  # fmt: skip
        given = hypothesis.given(st.sampled_from(files), st.binary(min_size=5, max_size=20))
        hypothesis.seed(f"{seed} {first}")(limits(given(attempt)))()


def main(argv=None):
    """Print a table in Markdown; returns the exit code."""
    parser = argparse.ArgumentParser("python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000, help="of all readers together")
    parser.add_argument("--seed", type=int, default=0)
    args, code, folder = parser.parse_args(argv), 0, tempfile.mkdtemp(prefix="fuzz-")
    seeds, inputs = make_seeds(folder), args.inputs // len(READERS)
    print(f"`python -m tests.fuzz --inputs {args.inputs} --seed {args.seed}`, torch "
          f"{torch.__version__}, {date.today()}:\n\n| reader | inputs | refused | accepted | "
          f"finding | seconds |\n{'| --- ' * 6}|")  # fmt: skip
    for name, reader in READERS.items():
        began = time.monotonic()
        counts, finding = fuzz(reader, seeds[name], inputs, folder, args.seed, SECONDS)
        kept = f"{folder}/{name}" if finding else "none"
        cells = [name, *(f"{n:,}" for n in counts), kept, round(time.monotonic() - began)]
        print(f"| {' | '.join(map(str, cells))} |", flush=True)
        if finding:
            code = 1
            shutil.move(Path(folder, "images" if name == "folders" else "input"), kept)
            print(finding)
    if not code:
        shutil.rmtree(folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
