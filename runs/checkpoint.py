"""Checkpoints on disk: at every moment there is a good one, and a bad one does no harm.

    <name>.pt             the newest
    <name>.pt.previous    the one before
    <name>.pt.partial     the next one, while it is written
    <name>.pt.damaged     a newest one that could not be read

A file is what torch.save makes of plain types and of tensors on the CPU.
"""

import contextlib
import errno
import io
import math
import numbers
import os
import pickle
import warnings
import zipfile
from pathlib import Path

import torch

from cli import printable
from runs.files import sync_folder


class Damaged(ValueError):
    """These bytes are no checkpoint; the message says what is wrong with them."""


class Checkpoints:
    """The checkpoints of one run, of which `path` is the newest."""

    def __init__(self, path):
        self.path = Path(path)
        self.previous = self._beside("previous")
        self.partial = self._beside("partial")

    def _beside(self, what):
        return self.path.with_name(f"{self.path.name}.{what}")

    def write(self, content):
        """Make `content`, of what `plain` takes, the newest checkpoint. OSError where it cannot be
        written, and then those that were there are there still."""
        data = pack(content)
        try:
            with open(self.partial, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            if not _holds(self.partial, data):
                raise OSError(errno.EIO, f"{self.partial} does not read as it was written")
            if self.path.exists():
                os.replace(self.path, self.previous)
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
        except OSError:
            with contextlib.suppress(OSError):
                self.partial.unlink()
            raise

    def read(self):
        """(The newest checkpoint that is whole, or None where there is none; what is to be said of
        a newer one, which is set aside, or None). Damaged where there are files and none is whole,
        OSError where one cannot be read for another reason than damage.
        """
        damage = {}
        for path in (self.path, self.previous):
            try:
                if path.exists() and not path.is_file():  # a pipe would be waited for
                    raise Damaged("it is no file")
                content = unpack(path.read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, Damaged) as error:
                if isinstance(error, OSError) and error.errno != errno.EIO:
                    raise
                damage[path] = error
                continue
            return content, self._set_aside(path, damage)
        if damage:
            raise Damaged("; ".join(f"{path} is damaged: {x}" for path, x in damage.items()))
        return None, None

    def _set_aside(self, good, damage):
        if not damage:
            return None
        (bad, error), aside = damage.popitem(), self._beside("damaged")
        try:
            os.replace(bad, aside)
        except OSError:
            aside = bad
        return f"{bad} is damaged ({error}): set aside as {aside.name}, and {good.name} is used"

    def discard(self):
        for path in (self.path, self.previous, self.partial):
            path.unlink(missing_ok=True)


def pack(content):
    """The bytes of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def unpack(data):
    """What `pack` made `data` of; nothing in it is run, and it takes no more memory than it has
    bytes. Raises Damaged."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            records = archive.infolist()
            # torch.save compresses nothing; what unpacks to more than there is was made to harm.
            stored = all(x.compress_type == zipfile.ZIP_STORED for x in records)
            if not stored or sum(x.file_size for x in records) > len(data):
                raise Damaged("its records are not those of torch.save")
            broken = archive.testzip()  # torch.load does not look at the checksums
            if broken is not None:
                raise Damaged(f"the checksum of {broken} is wrong")
        with warnings.catch_warnings():  # about pickles that it goes on to refuse
            warnings.simplefilter("ignore")
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (Damaged, MemoryError):  # for want of memory nothing is damaged
        raise
    except pickle.UnpicklingError as error:  # torch's message is how to load it all the same
        raise Damaged("it holds other things than numbers, strings and tensors") from error
    except Exception as error:  # both raise whatever they come upon
        said = str(error).strip().splitlines()
        raise Damaged(printable(said[0] if said else type(error).__name__)) from error


def plain(value, name="it"):
    """`value` as a checkpoint can hold it: numbers, strings, None, and lists, tuples and dicts of
    them, with tensors on the CPU that keep nothing alive but their own elements.

    Raises TypeError, with the place of it below `name`, for anything else.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().as_subclass(torch.Tensor)
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value if whole else value.clone()
    if value is None:
        return value
    for kind in (bool, int, float, str, bytes):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        return {plain(k, name): plain(x, f"{name}[{k!r}]") for k, x in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(x, f"{name}[{i}]") for i, x in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    if isinstance(value, numbers.Number) and hasattr(value, "item"):  # numpy's
        return value.item()
    raise TypeError(f"{name} is a {type(value).__name__}")


def _holds(path, data):
    """Whether a file's content is `data`."""
    with open(path, "rb") as file, memoryview(data) as view:
        i, size = 0, 1 << 22
        while part := file.read(size):
            if part != view[i : i + len(part)]:
                return False
            i += len(part)
    return i == len(data)


EMPTY = {  # what a checkpoint has beside the states, at the end of an epoch
    "step": 0, "totals": None, "missing": 0, "seconds": 0.0, "not_finite": [],
    "micro_bs": [None, None], "here": None, "generators": [], "bad_images": "[]",
}  # fmt: skip
TOTALS = {"losses", "correct", "counts", "eta", "update"}


def validate(checkpoint, steps):
    """What a checkpoint has by the names of EMPTY, in an epoch of so many steps. ValueError where a
    value is not what a run writes."""
    rest = {**EMPTY, **checkpoint}

    def counts(x, least=0):
        return type(x) is int and least <= x < 2**53

    state, seconds = rest["totals"], rest["seconds"]
    if not (counts(rest["step"]) and rest["step"] <= steps):
        raise ValueError(f"step {rest['step']} of {steps}")
    if (rest["step"] > 0) != (state is not None):
        raise ValueError(f"step {rest['step']} and {'no ' if state is None else ''}totals")
    if state is not None:
        columns = [x for key, x in state.items() if key != "counts"]
        lengths = {x.shape for x in columns}
        if (
            not {"losses", "correct", "counts"} <= set(state) <= TOTALS
            or lengths != {torch.Size([len(state["counts"])])}
            or not all(x.dtype.is_floating_point for x in columns if x is not state["correct"])
            or state["correct"].dtype != torch.int64
            or not all(map(counts, state["counts"]))
        ):
            raise ValueError("its totals are others")
    whole = all(type(x) in (list, tuple) and len(x) == 2 and all(map(counts, x))
                for x in rest["not_finite"])  # fmt: skip
    micro = len(rest["micro_bs"]) == 2 and all(
        x is None or counts(x, 1) for x in rest["micro_bs"]
    )
    if not (whole and micro and counts(rest["missing"]) and type(seconds) is float
            and 0 <= seconds < math.inf):  # fmt: skip
        raise ValueError("its counts are others")
    return rest
