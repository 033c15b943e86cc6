"""What a run has left, in a form that can be compared to the last bit."""

import hashlib
import json
from pathlib import Path

import torch

# What no two runs have in common: times, dates, and where a run was resumed.
APART = {"seconds", "saving_seconds", "images_per_second", "date", "resumed"}


class Remains:
    """The checkpoint, the log and the names of the files below `out`, as they are now."""

    def __init__(self, out):
        self.out = Path(out)
        self.files = sorted(
            str(path.relative_to(out)) for path in self.out.rglob("*")
            if path.is_file() and path.suffix != ".lock"
        )  # fmt: skip
        logs = sorted(self.out.glob("logs/*.jsonl"))
        self.rows = read_whole_rows(logs[0]) if logs else []
        self.epochs = sum(row.get("kind") == "epoch" for row in self.rows)

    def place(self):
        """(whole epochs, steps of the next one) of the newest good checkpoint, (0, 0) without."""
        content = good_checkpoint(self.out)
        return (content["epoch"], content.get("step", 0)) if content else (0, 0)

    def content(self):
        """{place: what is there} of the newest checkpoint: of a tensor its dtype, its shape and
        the SHA-256 of its bytes, of all else its repr."""
        content = newest_checkpoint(self.out)
        return {} if content is None else dict(flat(content))

    def sha256(self):
        """Of the weights: their names, dtypes, shapes and bytes."""
        digest = hashlib.sha256()
        for place, found in sorted(self.content().items()):
            if place.startswith("net."):
                digest.update(f"{place} {found}\n".encode())
        return digest.hexdigest()


def read_whole_rows(path):
    rows = []
    for line in path.read_bytes().split(b"\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:  # the last line, empty or torn
            rows.append({"kind": "torn"} if line else None)
    # That a checkpoint could not be written is no part of the result.
    return [row for row in rows if row is not None and row["kind"] != "unsaved"]


def newest(out):
    """The paths of the newest checkpoint and of the one before, whether or not they are there."""
    for path in sorted(Path(out, "checkpoints").glob("*.pt*")):
        path = path.with_name(path.name.rpartition(".pt")[0] + ".pt")
        return path, path.with_name(f"{path.name}.previous")
    return ()


def newest_checkpoint(out):
    """What is in the newest checkpoint, None where there is none; raises if it cannot be read."""
    path = next(iter(newest(out)), None)
    if path is None or not path.exists():
        return None
    return torch.load(path, map_location="cpu", weights_only=True)


def good_checkpoint(out):
    """What is in the newest checkpoint that can be read, None where there are none at all; raises
    if there are some and all are damaged."""
    damage = None
    for path in newest(out):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError:
            continue
        except Exception as error:  # torch raises many kinds for a damaged file
            damage = damage or error
    if damage is not None:
        raise damage
    return None


def flat(value, place=""):
    """(place, description) of every leaf of a checkpoint."""
    if isinstance(value, dict):
        if not value:
            yield place, "{}"
        for key, item in value.items():
            yield from flat(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, (list, tuple)):
        if not value:
            yield place, "[]"
        for i, item in enumerate(value):
            yield from flat(item, f"{place}[{i}]")
    elif isinstance(value, torch.Tensor):
        content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(content).hexdigest()
        yield place, f"{value.dtype} {tuple(value.shape)} {digest}"
    else:
        yield place, repr(value)


def differences(unbroken, broken):
    """What tells `broken` Remains from `unbroken` ones, a line each; empty where they are equal."""
    found = list(unequal("the checkpoint's ", unbroken.content(), broken.content()))
    if len(unbroken.rows) != len(broken.rows):
        found.append(f"the log has {len(broken.rows)} rows, not {len(unbroken.rows)}")
    for i, (one, other) in enumerate(zip(unbroken.rows, broken.rows), 1):
        rows = ({key: x for key, x in row.items() if key not in APART} for row in (one, other))
        found += unequal(f"row {i} ({one.get('kind')}) of the log: ", *rows)
    for name in sorted({*unbroken.files} ^ {*broken.files}):
        found.append(f"{name} is {'missing' if name in unbroken.files else 'left over'}")
    last = broken.rows[-1] if broken.rows else {}
    if not (last.get("kind") == "end" and last.get("final") and last.get("stopped") is None):
        found.append("the log does not say that the run has finished")
    return found


def unequal(what, one, other):
    for key in sorted({*one, *other}):
        if key not in one or key not in other:
            yield f"{what}{key} is {'new' if key not in one else 'missing'}"
        elif one[key] != other[key]:
            yield f"{what}{key} is {other[key]}, not {one[key]}"
