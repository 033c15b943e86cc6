"""What a run leaves on disk, in a form that can be compared to the last bit."""

import hashlib
import json
from pathlib import Path

import torch

# Keys of rows that no two runs have in common: times, dates, and where a run was resumed.
APART = {"seconds", "saving_seconds", "images_per_second", "date", "resumed"}


def snapshot(out):
    """{place: value} of the newest checkpoint, the log's rows and the files' names below `out`."""
    paths = (path for path in Path(out).rglob("*") if path.is_file())
    names = [str(x.relative_to(out)) for x in paths if x.suffix not in (".lock", ".damaged")]
    rows = [{k: x for k, x in row.items() if k not in APART} for row in read_rows(out)]
    try:
        checkpoint = good_checkpoint(out, ["*.pt"])
    except Exception as error:  # torch raises many kinds for a damaged file
        checkpoint = repr(error)
    files = dict.fromkeys(names, "there")
    return dict(leaves({"file": files, "checkpoint": checkpoint, "row": rows}))


def read_rows(out):
    """The rows of the log without those of kind "unsaved": a full disk is no part of the result."""
    rows = []
    for line in b"".join(x.read_bytes() for x in Path(out).glob("logs/*.jsonl")).splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            rows.append({"kind": "torn"})
    return [row for row in rows if row["kind"] != "unsaved"]


def good_checkpoint(out, patterns=("*.pt", "*.pt.previous")):
    """The first checkpoint that can be read, {} where there is none at all. Raises torch's error
    where there are some and all are damaged."""
    damage = None
    for path in (x for pattern in patterns for x in Path(out, "checkpoints").glob(pattern)):
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises many kinds for a damaged file
            damage = damage or error
    if damage is not None:
        raise damage
    return {}


def saved(out):
    """(completed epochs, steps of the next one) of the newest good checkpoint, (0, 0) without."""
    checkpoint = good_checkpoint(out)
    return checkpoint.get("epoch", 0), checkpoint.get("step", 0)


def leaves(value, place=""):
    """(place, value) of every leaf of dicts and lists: of a tensor dtype, shape and SHA-256 of its
    bytes, else the repr."""
    if isinstance(value, dict | list | tuple) and value:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value, 1):
            yield from leaves(item, f"{place}.{key}" if place else str(key))
    elif isinstance(value, torch.Tensor):
        content = value.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        yield place, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    else:
        yield place, repr(value)


def differences(unbroken, broken):
    """A line for each difference of two snapshots, 20 at most; none where they are equal."""
    lines = []
    for place in sorted({**unbroken, **broken}):
        one, other = unbroken.get(place, "absent"), broken.get(place, "absent")
        lines += [f"{place} is {other}, not {one}"] if one != other else []
    return lines if len(lines) <= 20 else [*lines[:20], f"and {len(lines) - 20} more"]
