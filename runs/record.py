"""The record of a run, <out>/logs/<name>.run.json: what its result was made with, and the result's
hashes, for `python main.py --replay` and for people.

    flags, settings, command     what was asked for
    code, data, versions,        what can change the bits of a result: the inputs
    hardware, environment
    counts                       images, weights, layers, steps an epoch
    resumed                      after which epochs the run went on with other inputs than before
    results                      {"epochs", "weights_sha256", "log_sha256", ...} of each end

Paths below the home directory are written with ~.
"""

import hashlib
import json
import os
import shlex
import threading
import zlib
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

import torch

from runs.log import RunError
from runs.provenance import code, data_sha256, hardware, tilde, variables, versions

LARGEST = 2**26  # bytes of a record, in reading

# Flags that choose where a run takes place and what it shows or keeps; its result has others.
WHERE = ("out", "data_dir", "device", "cpu", "distribute", "workers", "epochs", "fresh", "profile",
         "check", "save_every", "replay")  # fmt: skip
# What differs in the rows of two logs of the same bits: times, and what the record tells instead.
PASSING = ("date", "seconds", "images_per_second", "saving_seconds", "resumed", "python", "torch",
           "platform", "device", "device_name", "threads", "cores", "commit", "launcher",
           "no_cuda_graph")  # fmt: skip
COUNTED = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # the number of threads says what comes of them
HARDWARE = ("device", "device_name", "processor", "vectors", "threads", "ranks")  # inputs

TEXT, SCALAR = (str, type(None)), (str, int, float, bool, type(None))
RESULT = {"epochs": int, "weights_sha256": str, "log_sha256": str, "epoch_crc32": [str],
          "date": str}  # fmt: skip
FORM = {
    "format": int,
    "name": str,
    "command": [str],
    "flags": {str: SCALAR},
    "settings": dict,
    "code": {"sha256": str, "commit": TEXT, "diff": TEXT, "untracked": [str]},
    "data": {"sha256": str, "files": int, "bytes": int, "contents": bool},
    "versions": {str: TEXT},
    "hardware": {str: SCALAR},
    "environment": {str: str},
    "counts": {str: int},
    "resumed": [{"after_epoch": int, "changed": {str: [SCALAR]}}],
    "results": [RESULT],
}


class RecordError(RunError):
    """A file is no record that can be replayed; the message says why."""


class Record:
    """What a run is made with. What takes a while to find out, the hash of the data above all, a
    thread finds beside the run's first steps: `content` is whole after `complete`.

    `path` is the record's, `data` the run's Data, `facts` its counts by FACTS, `command` the words
    that make it again.
    """

    FACTS = ("train_examples", "test_examples", "weights", "layers")

    def __init__(self, path, args, command, settings, data, facts, world):
        self.path, self.problem, self.writing = Path(path), None, None
        self.content = {
            "format": 1,
            "name": self.path.name.removesuffix(".run.json"),
            "command": ["python", "main.py", *map(tilde, command)],
            "flags": {key: tilde(x) for key, x in vars(args).items() if key != "replay"},
            "settings": json.loads(json.dumps(settings)),
            "hardware": hardware(world.device, world.size),
            "environment": variables(),
            "counts": {**{key: facts[key] for key in self.FACTS}, "epoch_steps": len(data.train)},
            "resumed": [],
            "results": [],
        }
        # A daemon: a run that is interrupted does not wait for it.
        self.finding = threading.Thread(
            target=self._find, args=(args, world.device, data.files), daemon=True
        )
        self.finding.start()

    def _find(self, args, device, files):
        try:
            self.content["code"] = code()
            self.content["versions"] = versions(args, device)
            self.content["data"] = data_sha256(*files)
        except OSError as error:
            self.problem = str(error)

    def begin(self, done=None):
        """Write the record as soon as it is whole. Of a run that goes on, `done` epochs lie behind
        it; the record that is there tells what they were made with."""
        self.writing = threading.Thread(target=self._begin, args=(done,), daemon=True)
        self.writing.start()

    def _begin(self, done):
        self.finding.join()
        if done is not None and self.problem is None:
            try:
                then = read(self.path)
            except RecordError:
                self.content["resumed"] = [{"after_epoch": done, "changed": {}}]
            else:
                self.content["results"] = [x for x in then["results"] if x["epochs"] <= done]
                self.content["resumed"] = then["resumed"]
                changed = {key: values for key, *values in changes(then, self.content)}
                if changed:
                    again = {"after_epoch": done, "changed": changed}
                    self.content["resumed"] = [*then["resumed"], again]
        self._write()

    def promised(self, path, table):
        """The result that this run has to come to, as a replay of the record `path`. Raises
        RecordError where the inputs are others, after table(title, rows) has shown them."""
        if self.path.exists() and os.path.samefile(self.path, path):
            raise RecordError(f"the replay of {path} would take its place: choose another --out")
        then = read(path)
        self.complete()
        if self.problem is not None:
            raise RecordError(f"{path} cannot be replayed: {self.problem}")
        found, advice = hindrances(then, self.content)
        if not found:
            return then["results"][-1]
        table(("Input", "Then", "Now"), [tuple(map(shown, row)) for row in found])
        anyway = shlex.join([*self.content["command"], f"--out={self.path.parent.parent}"])
        print(*advice, f"To run it all the same: {anyway}", sep="\n")
        names = ", ".join(shown(key) for key, *_ in found)
        raise RecordError(f"other inputs than those of {path} ({names}): the bits may differ")

    def complete(self):
        """Wait until all is found, and written if it is to be."""
        self.finding.join()
        if self.writing is not None:
            self.writing.join()

    def end(self, net, rows):
        """Add what came out: the state dict `net` and the `rows` of the log. Returns the result."""
        self.complete()
        found = result(net, rows)
        others = [x for x in self.content["results"] if x["epochs"] != found["epochs"]]
        self.content["results"] = [*others, found]
        self._write()
        return found

    def _write(self):
        if "data" not in self.content:  # what is not whole is no record
            return
        partial = self.path.with_suffix(".partial")
        try:
            with open(partial, "w", encoding="utf-8") as file:
                content = {key: self.content[key] for key in FORM}
                file.write(json.dumps(content, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path)  # the one before stays until then
            self.problem = None
        except OSError as error:
            self.problem = f"{self.path} cannot be written: {error}"
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def read(path):
    """The content of a record. Raises RecordError, with what is wrong, where it is none."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("there is no such file")
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ValueError(f"it has more than {LARGEST >> 20} MiB")
        content = json.loads(content.decode("utf-8"), parse_constant=_no_number)
        if isinstance(content, dict) and content.get("format", 1) != 1:
            raise ValueError(f"its format is {shown(content['format'])}, and this program reads 1")
        _check(content, FORM, "it")
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path} is no record of a run: {error}") from error
    return content


def _no_number(name):
    raise ValueError(f"{name} is no number of JSON")


def _check(value, form, where):
    """Raises ValueError where `value` has not the form: a type, or one of several; [form] of each
    item; {str: form} of each value; {key: form, ...} of just these keys."""
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


def inputs(content):
    """What can change the bits of a result, by name."""
    found = {"code": content["code"]["sha256"], "data": content["data"]["sha256"]}
    found["weights"] = content["settings"].get("weights")
    found |= content["versions"] | {key: content["hardware"].get(key) for key in HARDWARE}
    return found | {k: x for k, x in content["environment"].items() if k not in COUNTED}


def differences(then, now):
    """[(input, then, now)] of the inputs in which two records differ."""
    return _unlike(inputs(then), inputs(now))


def _unlike(a, b):
    return [(key, a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)]


def changes(then, now):
    """The same of the inputs and the flags of a run that goes on."""
    a, b = ({k: x for k, x in y["flags"].items() if k not in WHERE} for y in (then, now))
    flags = [(f"--{key}", *values) for key, *values in _unlike(a, b)]
    return [*differences(then, now), *flags]


def hindrances(then, now):
    """[(input, then, now)] of what keeps a run from giving the bits that a record promises, and
    what can be done about it, in sentences."""
    found, advice = [], []
    for key, *values in differences(then, now):
        hashes = key in ("code", "data", "weights")
        found.append((key, *(x[:12] if hashes and x else x for x in values)))
    if found and found[0][0] == "code":
        commit, changed = then["code"]["commit"], then["code"]["diff"]
        if commit is None:
            advice.append("The code that made it was no checkout of git.")
        else:
            diff = " and apply the diff that the record holds (code, diff)" if changed else ""
            advice.append(f"To have its code: git checkout {shown(commit)}{diff}.")
    for again in then["resumed"]:
        changed = ", ".join(map(shown, again["changed"] or ["not known"]))
        found.append((f"up to epoch {again['after_epoch']}", f"others ({changed})", "these"))
    return found, advice


def result(net, rows):
    """The hashes of a run's end, from its weights, a state dict, and the rows of its log."""
    epochs = [row["epoch"] for row in rows if row["kind"] == "epoch"]
    lines = dict.fromkeys(epochs, b"")
    for row in comparable(rows):
        if row.get("epoch") in lines:
            lines[row["epoch"]] += _line(row)
    return {
        "epochs": len(epochs),
        "weights_sha256": weights_sha256(net),
        "log_sha256": log_sha256(rows),
        "epoch_crc32": [f"{zlib.crc32(line):08x}" for line in lines.values()],
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def deviation(then, now):
    """In what two results differ, in words, or None where they are the same bits."""
    words = {"weights_sha256": "other weights", "log_sha256": "another log"}
    parts = [words[key] for key in words if then[key] != now[key]]
    if not parts:
        return None
    a, b = then["epoch_crc32"], now["epoch_crc32"]
    epochs = [i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1]]
    since = f"from epoch {epochs[0] + 1} on" if epochs else "with the same rows of all epochs"
    return f"{' and '.join(parts)} than the record's, {since}"


def weights_sha256(net):
    """SHA-256 of a state dict, whatever its device and layout in memory: for each tensor, in order,
    the line "<name> <dtype> <shape>" such as "layers.0.weight float32 [32, 64]", a newline, and the
    elements in row-major order, little-endian. Copies one tensor at a time, at most."""
    found = hashlib.sha256()
    for name, tensor in net.items():
        dtype = str(tensor.dtype).removeprefix("torch.")
        found.update(f"{name} {dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().view(-1)
        found.update(flat.view(torch.uint8).numpy())
    return found.hexdigest()


def comparable(rows):
    """The rows of a log without what differs between runs of the same bits: times, what they were
    made on, what the disk did not take, and the flags that are no inputs."""
    rows = [row for row in rows if row["kind"] != "unsaved"]
    rows = [{key: x for key, x in row.items() if key not in PASSING} for row in rows]
    for row in rows:
        if "flags" in row:
            row["flags"] = {key: x for key, x in row["flags"].items() if key not in WHERE}
    return rows


def log_sha256(rows):
    """SHA-256 of the comparable rows of a log, a line of JSON each, its keys sorted."""
    return hashlib.sha256(b"".join(map(_line, comparable(rows)))).hexdigest()


def _line(row):
    return json.dumps(row, sort_keys=True).encode() + b"\n"


def shown(value):
    """A value out of a file in a few words that no terminal takes for more than words."""
    text = str(value)
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 60 else f"{text[:57]}..."
