"""The record of a run, <out>/logs/<name>.run.json: what its result was made with, and the result's
hashes, for `python main.py --replay` and for people.

The inputs are what can change the bits of a result: code, data, versions, hardware, environment,
weights to start from. "resumed" has the epochs after which the run went on with other inputs,
"results" an entry for each end of the run. Paths below the home directory are written with ~.
"""

import hashlib
import json
import math
import os
import threading
import zlib
from datetime import datetime, timezone
from itertools import zip_longest
from pathlib import Path

import torch

from cli import command
from runs.files import cannot, shown, write_whole
from runs.log import RunError, as_logged, json_line
from runs.name import LATER, PARTS, wherever
from runs.provenance import code, hardware, tilde, variables, versions

LARGEST = 2**26  # bytes of a record that is read
THREAD = "record"  # the name of the thread that writes it

# Flags that choose where a run takes place and what it shows or keeps, and not its result.
PLACEMENT_FLAGS = ("out", "data_dir", "device", "cpu", "distribute", "workers", "epochs", "fresh",
                   "profile", "check", "save_every", "keep_best", "replay", "evaluate",
                   "track")  # fmt: skip
# Keys of the log that comparisons leave out: times, and facts that the record holds.
VOLATILE_KEYS = ("date", "seconds", "images_per_second", "tokens_per_second", "saving_seconds",
                 "resumed", "python", "torch", "platform", "device", "device_name", "threads",
                 "cores", "commit", "launcher", "no_cuda_graph", "name", "image_files")  # fmt: skip
# Variables that set the number of threads, which is an input itself.
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
HARDWARE = ("device", "device_name", "processor", "vectors", "threads", "ranks")  # inputs
COUNTS = ("train_examples", "test_examples", "weights", "layers")
HASHES = ("code", "data", "weights")  # inputs

TEXT, SCALAR = (str, type(None)), (str, int, float, bool, type(None))
FORM = {  # of the file; see _check
    "format": int, "name": str, "command": [str], "flags": {str: SCALAR}, "settings": dict,
    "code": {"sha256": str, "commit": TEXT, "diff": TEXT, "untracked": [str]},
    "data": {"sha256": str, "files": int, "bytes": int, "contents": bool},
    "versions": {str: TEXT}, "hardware": {str: SCALAR}, "environment": {str: str},
    "counts": {str: int}, "resumed": [{"after_epoch": int, "changed": {str: [SCALAR]}}],
    "results": [{"epochs": int, "weights_sha256": str, "log_sha256": str, "epoch_crc32": [str],
                 "date": str}],
}  # fmt: skip


class RecordError(RunError):
    """A file is no record that can be replayed; the message says why."""


class Record:
    """The record of the run under way, at `path`; `problem` is why it cannot be written, or None.

    flags: a dict by name. command: the words of main.py's command line that make the run again.
    images: the run's Images. facts: a dict with COUNTS. steps: of an epoch.
    """

    def __init__(self, path, flags, command, settings, images, facts, steps, world):
        self.path, self.problem, self.thread = Path(path), None, None
        self.flags, self.device, self.images = flags, world.device, images
        self.content = {
            "format": 1,
            "name": self.path.name.removesuffix(".run.json"),
            "command": ["python", "main.py", *map(tilde, command)],
            "flags": {key: tilde(x) for key, x in flags.items() if key != "replay"},
            "settings": as_logged(settings),
            "hardware": hardware(world.device, world.size),
            "environment": variables(),
            "counts": {**{key: facts[key] for key in COUNTS}, "epoch_steps": steps},
            "resumed": [],
            "results": [],
        }

    def promised(self, path, table):
        """The result that this run has to come to as a replay of the record `path`.

        Raises RecordError where the inputs differ, after table(title, rows) has shown them.
        """
        if self.path.exists() and os.path.samefile(self.path, path):
            raise RecordError(f"the replay of {path} would take its place: choose another --out")
        then = read(path)
        self._find()
        if self.problem is not None:
            raise RecordError(f"{path} cannot be replayed: {self.problem}")
        odd = [(key, *(x[:12] if key in HASHES and x else x for x in values))
               for key, *values in _changes(then, self.content)]  # fmt: skip
        for again in then["resumed"]:
            changed = ", ".join(map(shown, again["changed"] or ["not known"]))
            odd.append((f"up to epoch {again['after_epoch']}", f"others ({changed})", "these"))
        if not odd:
            return then["results"][-1]
        table(("Input", "Then", "Now"), [tuple(map(shown, row)) for row in odd])
        commit, diff = then["code"]["commit"], then["code"]["diff"]
        advice = "The code that made it was no checkout of git."
        if commit is not None:
            more = " and apply the diff that the record holds (code, diff)" if diff else ""
            advice = f"To have its code: git checkout {shown(commit)}{more}."
        if odd[0][0] == "code":
            print(advice)
        words = self.content["command"][2:]  # after python main.py
        anyway = command("main", *words, f"--out={self.path.parent.parent}")
        print(f"To run it all the same: {anyway}")
        names = ", ".join(shown(key) for key, *_ in odd)
        raise RecordError(f"other inputs than those of {path} ({names}): the bits may differ")

    def begin(self, done=None):
        """Write the record, in a thread beside the first steps: to hash the data takes a while.

        done: completed epochs of a run that goes on; the record on disk has their inputs.
        """
        # A daemon: a run that is interrupted does not wait for it.
        self.thread = threading.Thread(target=self._begin, args=(done,), daemon=True,
                                       name=THREAD)  # fmt: skip
        self.thread.start()

    def _begin(self, done):
        self._find()
        if done is not None and self.problem is None:
            try:
                then = read(self.path)
            except RecordError:
                self.content["resumed"] = [{"after_epoch": done, "changed": {}}]
            else:
                changed = {key: x for key, *x in _changes(then, self.content, flags=True)}
                again = [{"after_epoch": done, "changed": changed}] if changed else []
                self.content["resumed"] = then["resumed"] + again
                self.content["results"] = [x for x in then["results"] if x["epochs"] <= done]
        self._write()

    def _find(self):
        """Add the inputs that take a while to find out."""
        try:
            if "data" not in self.content:
                self.content["code"] = code()
                self.content["versions"] = versions(self.flags, self.device)
                self.content["data"] = self.images.data_sha256
        except OSError as error:
            self.problem = str(error)

    def complete(self):
        """Wait until the record is written."""
        if self.thread is not None:
            self.thread.join()

    def end(self, net, rows):
        """Add the result: of the state dict `net` and the `rows` of the log. Returns it."""
        self.complete()
        new = result(net, rows)
        others = [x for x in self.content["results"] if x["epochs"] != new["epochs"]]
        self.content["results"] = [*others, new]
        self._write()
        return new

    def _write(self):
        if "data" not in self.content:
            return
        content = {key: self.content[key] for key in FORM}
        try:
            write_whole(self.path, json.dumps(content, indent=1) + "\n")
            self.problem = None
        except OSError as error:
            self.problem = cannot(self.path, "written", error)


def read(path):
    """The content of a record. Raises RecordError, with the reason, where the file is none."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("there is no such file")
        if Path(path).stat().st_size > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MiB")
        content = json.loads(Path(path).read_bytes().decode())
        if isinstance(content, dict) and content.get("format", 1) != 1:
            raise ValueError(f"its format is {shown(content['format'])}, and this program reads 1")
        _check(content, FORM, "it")
        _check_numbers(content, "it")
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is no record of a run: {error}") from error
    return content


def _check(value, form, where):
    """Raises ValueError where `value` has not the form: a type, or one of several; [form] of each
    item; {str: form} of each value; {key: form, ...} of exactly these keys."""
    kind = type(form) if isinstance(form, (list, dict)) else form
    if not isinstance(value, kind) or (form is int and isinstance(value, bool)):
        raise ValueError(f"{where} is of the wrong type")
    if isinstance(form, list):
        for i, item in enumerate(value):
            _check(item, form[0], f"{where}[{i}]")
    elif isinstance(form, dict):
        if str not in form and set(value) != set(form):
            odd = ", ".join(sorted(shown(key) for key in set(value) ^ set(form)))
            raise ValueError(f"{where} has not the right entries ({odd})")
        for key, item in value.items():
            _check(item, form.get(str) or form[key], f"{where}.{shown(key)}")


def _check_numbers(value, where):
    """Raises ValueError with the place of a NaN or an infinity, which JSON has not."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, and no finite number")
    if isinstance(value, (list, dict)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            _check_numbers(item, f"{where}.{shown(key)}")


def _changes(then, now, flags=False):
    """[(name, then, now)] of the inputs in which two records differ, and of the flags."""

    def inputs(content):
        parts = {"code": content["code"]["sha256"], "data": content["data"]["sha256"],
                 "weights": content["settings"].get("weights"), **content["versions"]}  # fmt: skip
        parts |= {key: content["hardware"].get(key) for key in HARDWARE}
        parts |= {k: x for k, x in content["environment"].items() if k not in THREAD_VARIABLES}
        asked = placeless(content["flags"]).items() if flags else ()
        return parts | {f"--{key}": x for key, x in asked if key not in PLACEMENT_FLAGS
                        and not (key in LATER and x == PARTS[key][1])}  # fmt: skip

    a, b = inputs(then), inputs(now)
    return [(key, a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)]


def result(net, rows):
    """The hashes of a run's end, from its weights, a state dict, and the rows of its log."""
    rows = comparable(rows)
    epochs = [row["epoch"] for row in rows if row["kind"] == "epoch"]
    lines = dict.fromkeys(epochs, b"")
    for row in rows:
        if row.get("epoch") in lines:
            lines[row["epoch"]] += json_line(row, sort_keys=True)
    return {
        "epochs": len(epochs),
        "weights_sha256": weights_sha256(net),
        "log_sha256": log_sha256(rows),
        "epoch_crc32": [f"{zlib.crc32(line):08x}" for line in lines.values()],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def deviation(then, now):
    """How two results differ, in words, or None where they are the same bits."""
    words = {"weights_sha256": "other weights", "log_sha256": "another log"}
    parts = [words[key] for key in words if then[key] != now[key]]
    if not parts:
        return None
    pairs = enumerate(zip_longest(then["epoch_crc32"], now["epoch_crc32"]), 1)
    epoch = next((epoch for epoch, (a, b) in pairs if a != b), None)
    since = f"from epoch {epoch} on" if epoch else "with the same rows of all epochs"
    return f"{' and '.join(parts)} than the record's, {since}"


def weights_sha256(net):
    """SHA-256 of a state dict, whatever its device and layout in memory: for each tensor, in order,
    the line "<name> <dtype> <shape>" such as "layers.0.weight float32 [32, 64]", a newline, and the
    elements in row-major order, little-endian. Copies one tensor at a time, at most."""
    digest = hashlib.sha256()
    for name, tensor in net.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name} {dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy())
    return digest.hexdigest()


def comparable(rows):
    """The rows of a log without what differs between runs of the same bits: VOLATILE_KEYS, the rows
    about a full disk, PLACEMENT_FLAGS, and the places of files."""
    def without(row, keys):
        return {key: x for key, x in row.items() if key not in keys}

    rows = [without(row, VOLATILE_KEYS) for row in rows if row["kind"] != "unsaved"]
    parts = {"flags": lambda x: without(placeless(x), PLACEMENT_FLAGS),
             "settings": lambda x: without(x, ("dataset",))}  # fmt: skip
    return [row | {key: of(row[key]) for key, of in parts.items() if key in row} for row in rows]


def placeless(flags):
    """Flags without the places of files: the contents are inputs of their own."""
    places = {"dataset": wherever, "weights": lambda path: "FILE"}
    return {k: places[k](x) if k in places and isinstance(x, str) else x for k, x in flags.items()}


def log_sha256(rows):
    """SHA-256 of the comparable rows of a log, a line of JSON each, its keys sorted."""
    lines = (json_line(row, sort_keys=True) for row in comparable(rows))
    return hashlib.sha256(b"".join(lines)).hexdigest()
