"""The checkpoints of a run on disk: <name>.pt, the newest; .pt.previous, the one before;
.pt.partial, the next one, while it is written; .pt.damaged, a newest one that could not be read;
<name>.best.pt, the one of the epoch with the least test loss, where it is wanted.

A file is what torch.save makes of a dict of plain types and of tensors on the CPU: "epoch", the
number of completed epochs; "settings", the run's, as JSON; "net" and "optimizer", their state
dicts; and the keys of PROGRESS.
"""

import errno
import io
import json
import math
import os
import pickle
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy
import torch

from cli import printable
from runs.files import reason, sync_folder, write_whole

NUMBERS = (bool, int, float, complex)


class Damaged(ValueError):
    """These bytes are no checkpoint; the message says what is wrong with them."""


class Checkpoints:
    """The checkpoints of one run, of which `path` is the newest."""

    def __init__(self, path):
        self.path = Path(path)
        names = (f"{self.path.name}.{what}" for what in ("previous", "partial", "damaged"))
        self.previous, self.partial, self.damaged = map(self.path.with_name, names)
        self.best = self.path.with_name(f"{self.path.name.removesuffix('.pt')}.best.pt")
        self.linked = self.best.with_name(f"{self.best.name}.partial")

    def write(self, content):
        """Make `content`, a dict from `plain`, the newest checkpoint. Raises OSError where it
        cannot be written; the earlier checkpoints stay."""
        write_whole(self.path, pack(content), self.previous)

    def keep_best(self):
        """Make the newest checkpoint the best one, too: another name of its file, or a copy where
        the file system has no links. Raises OSError where it cannot; the earlier best one stays."""
        newest = self.path if self.path.exists() else self.previous
        try:
            self.linked.unlink(missing_ok=True)
            os.link(newest, self.linked)
            os.replace(self.linked, self.best)
            self.linked.unlink(missing_ok=True)  # both stay where they are one file already
            sync_folder(self.best.parent)
        except (OSError, AttributeError):  # not every system has os.link
            write_whole(self.best, newest.read_bytes())

    def epoch_of_best(self):
        """The epoch at whose end the best checkpoint was written, or None."""
        return _epoch(self.best)

    def epoch_of_newest(self):
        """That of the newest one, or None, also where it is of the middle of an epoch."""
        return _epoch(self.path if self.path.exists() else self.previous)

    def read(self):
        """(the newest whole checkpoint or None, the warning or None of a newer one that is damaged,
        and is set aside). Raises Damaged where there are files and none is whole, OSError where one
        cannot be read for another reason than damage."""
        damage, warning = [], None
        for path in (self.path, self.previous):
            try:
                if path.exists() and not path.is_file():  # a pipe would be waited for
                    raise Damaged("it is no file")
                checkpoint = unpack(path.read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, Damaged) as error:
                if isinstance(error, OSError) and error.errno != errno.EIO:
                    raise
                damage.append(f"{path} is damaged: {error}")
                warning = (f"{path} is damaged ({error}): set aside as {self.damaged.name}, and "
                           f"{self.previous.name} is used")  # fmt: skip
                continue
            if damage:
                with suppress(OSError):
                    os.replace(self.path, self.damaged)
            return checkpoint, warning
        if damage:
            raise Damaged("; ".join(damage))
        return None, None

    def discard(self):
        for path in (self.path, self.previous, self.partial, self.best, self.linked):
            path.unlink(missing_ok=True)


def _epoch(path):
    """The epoch at whose end a checkpoint was written, or None; its tensors are not read."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return None if content.get("step") else content["epoch"]
    except Exception:  # torch raises whatever it comes upon
        return None


def _count(x):
    return type(x) is int and 0 <= x < 2**53


def _all(valid, length=None):
    """A predicate: a list or tuple of valid items, of this length where it is given."""
    return lambda x: type(x) in (list, tuple) and length in (None, len(x)) and all(map(valid, x))


def _totals(x):
    """Whether x is None, or columns of one length, a value a step."""
    if not isinstance(x, dict) or not _all(_count)(x.get("counts")):
        return x is None
    needed = {"counts", "losses", "correct"}
    return needed <= set(x) <= needed | {"eta", "update"} and all(
        isinstance(t, torch.Tensor) and t.shape == (len(x["counts"]),)
        and (t.dtype == torch.int64 if key == "correct" else t.is_floating_point())
        for key, t in x.items() if key != "counts"
    )  # fmt: skip


def _parsed(text, kind):
    """The value of JSON text, or None where it is none of this kind."""
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, kind) else None


# key -> (its value at the end of an epoch and in files that lack it, whether a value is valid)
PROGRESS = {
    "step": (0, _count),  # finished batches of the epoch under way
    "totals": (None, _totals),  # the state of training.metrics.Totals after them
    "missing": (0, _count),  # their images that could not be decoded
    "seconds": (0.0, lambda x: type(x) is float and 0 <= x < math.inf),  # spent on them
    # (epoch, step) of the last steps in a row without a finite gradient
    "not_finite": ((), _all(_all(_count, 2))),
    # the micro-batch that was asked for, and the one that memory allows
    "micro_bs": ((None, None), _all(lambda n: n is None or _count(n) and n > 0, 2)),
    "here": (None, lambda x: True),  # [ranks, device type, torch's version] of the writer
    # torch's, of the CPU and the GPU, where the optimiser draws from them
    "generators": ((), _all(lambda t: isinstance(t, torch.Tensor) and t.dtype == torch.uint8)),
    # JSON: [paths in train/, paths in val/] of images that could not be decoded
    "bad_images": ("[]", lambda x: _parsed(x, list) is not None),
}


def validate(checkpoint, steps):
    """`checkpoint`, a dict, with the defaults of keys that it lacks; `steps`: batches an epoch.
    Raises ValueError, with the reason, where it has a value that no run writes."""
    checkpoint = {key: default for key, (default, _) in PROGRESS.items()} | checkpoint
    for key, (_, valid) in PROGRESS.items():
        if not valid(checkpoint[key]):
            raise ValueError(f"its {key} cannot be used")
    step, totals = checkpoint["step"], checkpoint["totals"]
    if step > steps:
        raise ValueError(f"step {step} of {steps}")
    if (step > 0) != (totals is not None):
        raise ValueError(f"step {step} and {'no ' if totals is None else ''}totals")
    return checkpoint


def settings_of(checkpoint):
    """The settings of the run that wrote a checkpoint, or None where no run wrote it."""
    whole = isinstance(checkpoint, dict) and {"net", "optimizer"} <= set(checkpoint)
    if whole and _count(checkpoint.get("epoch")) and _count(checkpoint.get("step", 0)):
        return _parsed(checkpoint.get("settings"), dict)
    return None


def pack(content):
    """The bytes of a checkpoint."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def unpack(data):
    """The content that `pack` made `data` of. Raises Damaged.

    Nothing in the data is run, and it takes no more memory than it has bytes.
    """
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
    except (Damaged, MemoryError):  # a lack of memory is no damage
        raise
    except pickle.UnpicklingError as error:  # torch's message is how to load it all the same
        raise Damaged("it holds other things than numbers, strings and tensors") from error
    except Exception as error:  # both raise whatever they come upon
        raise Damaged(printable(reason(error).splitlines()[0])) from error


def plain(value, name="it"):
    """`value` as a checkpoint can hold it: numbers, strings, None, torch's dtypes and devices, and
    lists, tuples and dicts of them, with tensors on the CPU that keep nothing alive but their own
    elements.

    Raises TypeError, with the place of it below `name`, for anything else.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().as_subclass(torch.Tensor)
        whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
        return value if whole else value.clone()
    if isinstance(value, dict):
        return {plain(k, name): plain(x, f"{name}[{k!r}]") for k, x in value.items()}
    if isinstance(value, (list, tuple)):
        items = [plain(x, f"{name}[{i}]") for i, x in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) else items
    for kind in (*NUMBERS, str, bytes):  # plain types for their subclasses
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, numpy.generic) and type(value.item()) in NUMBERS:
        return value.item()
    if value is None or isinstance(value, (torch.dtype, torch.device)):
        return value
    raise TypeError(f"{name} is a {type(value).__name__}")
