"""Make a file, or a folder of documents, into the token files train.bin and val.bin.

The files are cut into shares of about SHARE bytes, at places that depend on nothing but the files.
Processes make the tokens of a share each, in a folder of its number in <target>.partial; the
command appends them to train.bin and val.bin there, in their order, and its meta.json counts those
that are in. So it goes on after any end, and any number of processes makes the same bytes.
"""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from cli import command, expand
from data.common import VALIDATION, DataError, data_folder, reason
from data.documents import (
    CHUNK,
    SPLITS,
    Job,
    Piece,
    bound,
    make_share,
    parts_of_name,
    whole_character,
)
from data.encoding import read_encoding
from data.imagenet_layout import entries_of, few
from data.workers import usable_cores, work

SHARE = 2**23  # bytes of a task
FILES = 2000  # at most, of a task
# The validation text is about VALIDATED bytes of many documents, which is what main.py reads of it
# (2,000 windows of 1,024 of GPT-2's tokens), but at least one in MOST and at most one in LEAST.
VALIDATED, LEAST, MOST = 10**7, 10, 2000
FEW = 100  # texts, below which they are not taken as documents: the end of each is for validation


class File(NamedTuple):
    name: str  # relative to the root
    size: int
    changed: int  # ns


def prepare(source, data_dir, encoding=None, jobs=None):
    """Make <data_dir>/<name>-<encoding> of the file or folder `source`, report, and return the
    exit code. Raises DataError for what is no text, and where the result cannot be written."""
    source = Path(os.path.abspath(expand(source)))
    lacks = encoding is None and not importlib.util.find_spec("tiktoken")
    encoding = encoding or ("bytes" if lacks else "gpt2")
    try:
        coder = read_encoding({"kind": encoding})
    except DataError as error:
        raise DataError(f"{error}; --encoding bytes does without it") from error
    print(f"Looking through {source}", file=sys.stderr)
    try:
        root, name, files = find(source)
    except OSError as error:
        raise DataError(f"{error.filename or source} cannot be read: {reason(error)}") from error
    if lacks:
        print("Each byte is a token: GPT-2's take the package tiktoken (pip install tiktoken)",
              file=sys.stderr)  # fmt: skip
    dtype = np.promote_types(np.uint16, np.min_scalar_type(coder.size - 1))
    job, tasks, sizes = plan(root, files, {"kind": encoding}, dtype.name)
    target = Path(os.path.abspath(data_folder(data_dir)), f"{name}-{encoding}")
    partial = target.with_name(f"{target.name}.partial")
    meta = {
        "vocab_size": coder.size, "encoding": job.encoding, "dtype": job.dtype,
        **{split: {"tokens": 0, "bytes": 0} for split in SPLITS},
        "source": {"id": _identity(job, tasks, files), "shares": 0},
    }  # fmt: skip
    try:
        if os.path.lexists(target):
            meta = _same(target, meta)
        else:
            partial.mkdir(parents=True, exist_ok=True)
            with _locked(partial):
                meta = _fill(partial, job, tasks, sizes, meta, jobs or usable_cores())
                if not all(meta[split]["tokens"] for split in SPLITS):
                    shutil.rmtree(partial)
                    raise DataError(f"{source} has too little text to train on and to validate: "
                                    "give more, or train.txt and val.txt")  # fmt: skip
                partial.rename(target)
    except OSError as error:
        begun = os.path.isdir(partial)
        then = "the same command goes on from what is there" if begun else "give another --data_dir"
        raise DataError(f"{target} cannot be written: {reason(error)}; {then}") from error
    for split in SPLITS:
        tokens, count = (meta[split][key] for key in ("tokens", "bytes"))
        print(f"{split:<5} {tokens:,} tokens of {count:,} bytes")
    arch = "gpt2" if encoding == "gpt2" else "gpt"
    print(f"text is ready: {target}\nTrain on it:   "
          + command("main", "--arch", arch, "--dataset", f"tokens:{target}"))  # fmt: skip
    return 0


# What there is


def find(source):
    """(the folder that the names are relative to, the name of the result, {"train": [File], "val":
    [File]} of a pair or {None: [File]}) of a file or a folder."""
    if source.is_dir():
        names = _pair(source) or {None: [""]}
        files = {split: [file for x in group for file in _files(source, x)]
                 for split, group in names.items()}  # fmt: skip
        return source, source.name or "text", files
    if not source.is_file():  # a pipe would be waited for
        raise DataError(f"there is no file or folder {source}")
    root, (stem, _, _) = source.parent, parts_of_name(source.name)
    others = (f"{x}{source.name[len(stem) :]}" for x in VALIDATION)
    other = stem == "train" and next((x for x in others if (root / x).is_file()), None)
    if not other:
        return root, stem, {None: [_file(root, source.name)]}
    print(f"{root / other} is the validation text of {source}", file=sys.stderr)
    files = {"train": [_file(root, source.name)], "val": [_file(root, other)]}
    return root, root.name or "text", files


def _pair(folder):
    """{"train": names, "val": names} of the files and folders in `folder` to train on and to
    validate, or None: those called train and val, or all of them with such a word in their names,
    as story-train-2.txt."""
    names = [name for name, is_folder in entries_of(folder)
             if not name.startswith(".") and (is_folder or parts_of_name(name)[1])]  # fmt: skip
    called, having = defaultdict(list), defaultdict(list)
    for name in names:
        called[name if (folder / name).is_dir() else parts_of_name(name)[0]].append(name)
        words = re.split("[^a-z]+", name.lower())
        having[next((x for x in ("train", *VALIDATION) if x in words), None)].append(name)
    for found in (called, having):
        other = next((found[x] for x in VALIDATION if x in found), None)
        if "train" in found and other and (found is called or None not in found):
            left_out = [x for x in names if x not in found["train"] + other]
            more = f"; left out: {few(left_out)}" if left_out else ""
            print(f"{few(other)} for validation, {few(found['train'])} to train on{more}",
                  file=sys.stderr)  # fmt: skip
            return {"train": found["train"], "val": other}
    return None


def _file(root, name):
    try:
        known = os.stat(root / name)
    except OSError as error:
        raise DataError(f"{root / name} cannot be read: {reason(error)}") from error
    if not known.st_size:
        raise DataError(f"{root / name} is empty")
    return File(name, known.st_size, known.st_mtime_ns)


def _files(root, name):
    """The texts below a folder, as Files sorted by name, or the file of that name. Hidden and empty
    files are no texts. Raises DataError where there is none."""
    path, names, others, seen = root / name, [], Counter(), set()
    if path.is_file():
        return [_file(root, name)]

    def walk(folder, below):
        known = os.stat(folder)
        if (known.st_dev, known.st_ino) in seen:  # a link to a folder above it
            return
        seen.add((known.st_dev, known.st_ino))
        for entry, is_folder in entries_of(folder):
            here = f"{below}/{entry}" if below else entry
            if entry.startswith("."):
                continue
            if is_folder:
                walk(folder / entry, here)
            elif not parts_of_name(entry)[1]:
                others["".join(Path(entry).suffixes[-2:]) or "without a suffix"] += 1
            elif (folder / entry).is_file() and os.path.getsize(folder / entry):
                names.append(here)

    walk(path, name)
    if not names:
        there = ", ".join(f"{suffix} ({n:,})" for suffix, n in others.most_common(5))
        raise DataError(
            f"{path} holds no text: that is .txt or .jsonl, or either packed as .gz, .bz2 or .xz"
            + (f", and the files there are {there}" if there else "")
        )
    return [_file(root, name) for name in sorted(names)]


# The plan: which bytes are a task


def plan(root, files, encoding, dtype):
    """(Job, [[Piece] of a task], [bytes of a task on disk])."""
    total = sum(file.size for group in files.values() for file in group)
    every = min(max(total // VALIDATED, LEAST), MOST)
    rows = [file.name for file in files.get(None, ()) if parts_of_name(file.name)[1] == ".jsonl"]
    many = sum(map(len, files.values()))
    texts = many - len(rows)
    nth = min(every, texts) if texts >= FEW else None
    job = Job(root, encoding, dtype, every, rows[0] if rows else None)
    tasks, sizes, count = [[]], [0], 0
    for split, group in files.items():
        for file in group:
            _, kind, packed = parts_of_name(file.name)
            if kind != ".jsonl" and split is None:
                count += 1
            for piece in _pieces(root, file, kind, packed, split, count, nth, many > 1):
                tasks[-1].append(piece)
                sizes[-1] += file.size if packed else bound(piece, 1) - bound(piece, 0)
                if sizes[-1] >= SHARE or len(tasks[-1]) >= FILES:
                    tasks.append([])
                    sizes.append(0)
    return job, tasks[: len(tasks) - (not tasks[-1])], sizes


def _pieces(root, file, kind, packed, split, count, nth, followed):
    """The Pieces of a file, which is the `count`-th of the texts where it is one. nth: one text in
    so many is for validation; None: the last tenth of each is. `followed`: by another file."""
    end = None if packed else file.size
    spans = [(0, end, split, True)]
    if kind != ".jsonl" and split is None and nth:
        spans = [(0, end, "train" if count % nth else "val", True)]
    elif kind != ".jsonl" and split is None:
        # The text goes on behind the cut, unless another one's beginning is what follows.
        spans = [(0, end, None, followed)]
        if not packed:
            cut = whole_character(root / file.name, 9 * file.size // 10)
            spans = [(0, cut, "train", followed), (cut, file.size, "val", True)]
    for start, end, split, closes in spans:
        n = 1 if end is None else max((end - start) // SHARE, 1)
        for i in range(n):
            yield Piece(file.name, start, end, i, n, split, closes)


def _identity(job, tasks, files):
    """Tells whether a command has the files and cuts of an earlier one."""
    known = hashlib.sha256(repr(job[1:]).encode())
    for group in (*tasks, *files.values()):
        for x in group:
            known.update(repr(tuple(x)).encode())
    return known.hexdigest()[:32]


# The result


def _same(target, meta):
    """The meta.json of a finished result. Raises DataError if it is of other files, or damaged."""
    known = _meta(target)
    if known is None or known["source"]["id"] != meta["source"]["id"] or any(
        not _holds(target / f"{x}.bin", known, x, exactly=True) for x in SPLITS
    ):  # fmt: skip
        raise DataError(f"{target} is there and was not made of these files as they are now: "
                        "remove it, or give another --data_dir")  # fmt: skip
    return known


def _meta(folder):
    """The meta.json that this command has left in a folder, or None."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        known = json.loads((folder / "meta.json").read_bytes())
        numbers = [known["source"]["shares"], *(known[x]["tokens"] for x in SPLITS)]
        known["source"]["id"], np.dtype(known["dtype"])
        return known if all(type(x) is int for x in numbers) else None


def _holds(path, meta, split, exactly=False):
    """Whether a file has the tokens that a meta.json counts."""
    wanted = meta[split]["tokens"] * np.dtype(meta["dtype"]).itemsize
    have = path.stat().st_size if path.exists() else 0
    return have == wanted if exactly else have >= wanted


def _fill(partial, job, tasks, sizes, meta, jobs):
    """Make the token files in a folder, from what is there on. Returns the meta.json."""
    before = _meta(partial)
    if before and before["source"]["id"] != meta["source"]["id"]:
        if before["source"]["shares"]:
            raise DataError(f"{partial} was begun from other files, or before they changed: remove "
                            "it, or give another --data_dir")  # fmt: skip
        before = None  # nothing is in, as after a file that was refused and has been mended
    if before and all(_holds(partial / f"{x}.bin", before, x) for x in SPLITS):
        meta = before
    there = set()
    for path in list(partial.iterdir()):
        if path.is_dir():
            share = before and path.name.isdecimal() and _meta(path)
            if share and int(path.name) >= meta["source"]["shares"] and all(
                _holds(path / f"{x}.bin", share, x, exactly=True) for x in SPLITS
            ):  # fmt: skip
                there.add(int(path.name))
            else:  # what a command that was killed had in work
                shutil.rmtree(path)
    width = np.dtype(job.dtype).itemsize
    todo = [k for k in range(meta["source"]["shares"], len(tasks)) if k not in there]
    with contextlib.ExitStack() as stack:
        out = {x: stack.enter_context(open(partial / f"{x}.bin", "ab")) for x in SPLITS}
        for split, file in out.items():
            file.truncate(meta[split]["tokens"] * width)
        scratch = stack.enter_context(tempfile.TemporaryDirectory(".work", "", partial, True))
        _write(partial, meta, scratch)
        calls = {k: (job, tasks[k], Path(scratch, str(k)), partial / str(k)) for k in todo}
        if jobs == 1 or len(todo) < 2:
            results = ((k, make_share(*call)) for k, call in calls.items())
        else:
            results = work(make_share, calls, jobs)
        stack.enter_context(contextlib.closing(results))
        bar = stack.enter_context(tqdm(
            total=sum(sizes), initial=sum(sizes) - sum(sizes[k] for k in todo), unit="B",
            unit_scale=True, dynamic_ncols=True, disable=not todo,
            mininterval=0.1 if sys.stderr.isatty() else 30, maxinterval=30,
        ))  # fmt: skip
        _append(partial, out, meta, there, scratch)
        for k, _ in results:
            there.add(k)
            _append(partial, out, meta, there, scratch)
            bar.update(sizes[k])
        for file in out.values():
            os.fsync(file.fileno())
    return meta


def _append(partial, out, meta, there, scratch):
    """Append the next shares, as far as they are `there`. A share is removed when meta.json counts
    it; what an end in between has left in the files is cut off by the next command."""
    while (k := meta["source"]["shares"]) in there:
        share = _meta(partial / str(k))
        for split, file in out.items():
            with open(partial / str(k) / f"{split}.bin", "rb") as tokens:
                shutil.copyfileobj(tokens, file, CHUNK)
            file.flush()
            for key in ("tokens", "bytes"):
                meta[split][key] += share[split][key]
        meta["source"]["shares"] += 1
        _write(partial, meta, scratch)
        shutil.rmtree(partial / str(k))
        there.remove(k)


def _write(folder, meta, scratch):
    """Write the meta.json of a folder whole or not at all."""
    made = Path(scratch, "meta.json")
    made.write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
    made.replace(folder / "meta.json")


@contextlib.contextmanager
def _locked(folder):
    """Hold the lock of a folder. Raises DataError where another process does."""
    try:
        import fcntl

        handle = os.open(folder, os.O_RDONLY)
    except ImportError:  # Windows
        yield
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"another process is making {folder}: wait for it") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
