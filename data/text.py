"""Texts as windows of tokens: the embedded plays, a user's text by bytes, files of token ids.

A window is `context` tokens and the one after them. Training takes windows from random places, a
function of (seed, epoch, index); validation takes the same ones every time. Files are read window
by window, so that one of any size opens at once and takes no more memory than the windows in use.
"""

import bz2
import codecs
import json
import os
import zlib
from copy import copy
from pathlib import Path

import numpy as np
import torch

from cli import expand
from data.batches import Batches
from data.common import VALIDATION, DataError, reason

LOOK = 1000  # numbers of a file that tell its type
LONGEST = 2**24  # windows of an epoch, whose places are held
MOST = 2000  # windows of a validation, unless --test_examples says otherwise
CHUNK = 2**20  # bytes of a text that are decoded at a time
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
LARGEST = 2**24  # bytes of a meta.json
MOST_TOKENS = 2**31 - 1  # in a vocabulary


class Ids:
    """The token ids of a file, (N,), or a slice of them. A window is read when it is asked for:
    mapped pages would count as memory of the process, of some systems 2 MB around each window."""

    def __init__(self, path, dtype):
        self.path, self.dtype, self.first = path, dtype, 0
        self.file = open(path, "rb", buffering=0)
        self.size = os.fstat(self.file.fileno()).st_size
        self.count = self.size // dtype.itemsize

    def __len__(self):
        return self.count

    def __getitem__(self, cut):
        part, (start, stop, _) = copy(self), cut.indices(self.count)
        part.first, part.count = self.first + start, stop - start
        return part

    def windows(self, starts, length):
        """(n, length) of the file's dtype, from each of `starts` on. Raises DataError where the
        file has been cut since it was opened."""
        windows = np.empty((len(starts), length), self.dtype)
        for row, start in zip(windows, starts.tolist()):
            self.file.seek((self.first + start) * self.dtype.itemsize)
            if self.file.readinto(row) < row.nbytes:
                raise DataError(f"{self.path} has been cut while it was read: it had "
                                f"{self.size:,} bytes")  # fmt: skip
        return windows


class Tokens:
    """Token ids, a numpy array (N,) or Ids. `what` names them."""

    def __init__(self, ids, what, vocabulary):
        self.ids, self.what, self.vocabulary = ids, what, vocabulary

    def __len__(self):
        return len(self.ids)

    def windows(self, starts, length):
        """int64 (n, length), from each of `starts` on. Raises DataError for an id that is not in
        the vocabulary, and for a file that cannot be read."""
        if isinstance(self.ids, Ids):
            try:
                windows = self.ids.windows(starts, length)
            except OSError as error:
                raise DataError(f"{self.ids.path} cannot be read: {reason(error)}") from error
        else:
            windows = self.ids[starts[:, None] + np.arange(length)]
        if windows.size and windows.max() >= self.vocabulary:
            raise DataError(
                f"{self.what} has the token {windows.max()}, and a vocabulary of "
                f"{self.vocabulary} has those from 0 to {self.vocabulary - 1}: give --vocab N"
            )
        return windows.astype(np.int64)


class TextBatches(Batches):
    """Batches of (tokens (n, context), the tokens that follow them (n, context)), int64.

    Training takes `examples` windows an epoch from anywhere in the text, validation its windows in
    order, side by side; of more than `examples`, so many at even distances.
    """

    def __init__(
        self, tokens, context, batch_size, device, examples, shuffle=False, seed=0, rank=0, size=1
    ):
        super().__init__(examples, batch_size, device, shuffle, seed, rank, size)
        self.tokens, self.context = tokens, context
        self.starts = self.buffer = None  # of an epoch whose batches `at` gives

    def order(self, rng=None):
        """The starts of the windows of the epoch, int64 (examples,)."""
        if self.shuffle:
            rng = rng or np.random.default_rng((self.seed, self.epoch))
            return rng.integers(0, len(self.tokens) - self.context, self.examples)
        whole = (len(self.tokens) - 1) // self.context
        return np.arange(self.examples) * whole // self.examples * self.context

    def look(self):
        """Read windows of the whole text, those of a validation all. Raises DataError for an id
        that is not in the vocabulary."""
        starts = self.order()
        if self.shuffle:
            places = len(self.tokens) - self.context
            count = min(MOST, places)
            starts = np.arange(count) * (places - 1) // max(count - 1, 1)
        for i in range(0, len(starts), 100):
            self.tokens.windows(starts[i : i + 100], self.context + 1)

    def __iter__(self):
        order, self.position = self.order(), self.first
        for share in self.shares():
            super().advance()
            yield self._batch(self._windows(order[share]))

    def hold(self):
        """Make `advance` load the batches of this epoch, and `at` give them, from the same memory
        in every epoch."""
        self.starts, self.position = self.order(), self.first
        if self.buffer is None:
            count = min(self.batch_size, self.examples)
            self.buffer = torch.zeros(count, self.context + 1, dtype=torch.int64,
                                      device=self.device)  # fmt: skip

    def advance(self):
        super().advance()
        last = self.position * self.batch_size
        windows = self._windows(self.starts[last - self.batch_size : last])
        self.buffer[: len(windows)].copy_(windows, non_blocking=True)

    def at(self, position, size):
        """The batch of `size` windows that `advance` has loaded. One rank."""
        return self._batch(self.buffer[:size])

    def _windows(self, starts):
        """int64 (n, context + 1) on the device, on its way there from a GPU's point of view."""
        windows = torch.from_numpy(self.tokens.windows(starts, self.context + 1))
        if self.device.type == "cuda":
            windows = windows.pin_memory()
        return windows.to(self.device, non_blocking=True)

    @staticmethod
    def _batch(windows):
        return windows[:, :-1], windows[:, 1:]


def open_text(
    name, train_bs, test_bs, device, context=64, epoch_steps=250, vocabulary=None,
    test_examples=None, seed=0, rank=0, size=1,
):  # fmt: skip
    """The fields of a Data of a text, by name.

    name: "shakespeare"; "text:FILE", a UTF-8 text by bytes, its last tenth for validation unless a
    second text lies beside one that is called train, or "text:FOLDER" of two such; "tokens:FOLDER"
    of train.bin and val.bin, little-endian uint16 or uint32, as `data.prepare text` and nanoGPT
    write them. An epoch has `epoch_steps` batches. `vocabulary` wins over that of a folder of
    tokens, which may have none.
    """
    if epoch_steps * train_bs > LONGEST:
        raise DataError(f"an epoch of {epoch_steps * train_bs:,} windows is longer than "
                        f"{LONGEST:,}: take more --epochs of fewer --epoch_steps")  # fmt: skip
    kind, _, place = name.partition(":")
    path = Path(expand(place)) if place else None
    try:
        parts, source, files, notes = (
            _embedded() if kind == "shakespeare" else
            _bytes(path) if kind == "text" else _tokens(path, vocabulary)
        )  # fmt: skip
    except OSError as error:
        raise DataError(f"{error.filename or path} cannot be read: {reason(error)}") from error
    batches = []
    for tokens, batch_size, shuffle in zip(parts, (train_bs, test_bs), (True, False)):
        if len(tokens) <= context:
            raise DataError(
                f"{tokens.what} has {len(tokens):,} tokens, and a window takes {context + 1:,}: "
                "give a smaller --context, or a longer text"
            )
        examples = epoch_steps * train_bs
        if not shuffle:
            whole = (len(tokens) - 1) // context
            examples = min(whole, test_examples or MOST)
            if test_examples and whole < test_examples:
                raise DataError(f"{tokens.what} has {whole:,} windows for --test_examples, not "
                                f"{test_examples:,}")  # fmt: skip
        batches.append(TextBatches(tokens, context, batch_size, device, examples, shuffle, seed,
                                   rank, size))  # fmt: skip
    for part in batches if kind == "tokens" else ():  # a wrong vocabulary is found at once
        part.look()
    return {
        "train": batches[0], "test": batches[1], "shape": (context,),
        "classes": parts[0].vocabulary, "source": source, "files": files, "notes": tuple(notes),
        "positions": context, "bytes_a_token": _bytes_a_token(source),
    }  # fmt: skip


def _bytes_a_token(source):
    """[of training, of validation], where the source has the numbers, else None."""
    parts = [source[part] for part in ("train", "val")]
    if not all(part.get("bytes") for part in parts):
        return None
    return [part["bytes"] / part["tokens"] for part in parts]


def _embedded():
    path = Path(__file__).with_name("shakespeare.txt.bz2")
    text = np.frombuffer(bz2.decompress(path.read_bytes()), np.uint8)  # ASCII: a byte a letter
    letters, tokens = np.unique(text, return_inverse=True)
    tokens, cut = tokens.astype(np.uint8), 9 * len(tokens) // 10
    encoding = {"kind": "characters", "letters": bytes(letters).decode()}
    return _halves(Tokens(tokens, "shakespeare", len(letters)), cut, encoding,
                   {"file": path.name, "crc32": f"{zlib.crc32(text):08x}"}, path)  # fmt: skip


def _bytes(path):
    """A text by its bytes."""
    path, other = _pair(path)
    tokens, crc32 = _text(path)
    if other is None:
        cut = 9 * len(tokens) // 10
        around = tokens.windows(np.array([cut]), min(4, len(tokens) - cut))[0]
        cut += next((i for i, x in enumerate(around) if x & 0xC0 != 0x80), 0)  # no character is cut
        source = {"file": path.name, "crc32": crc32}
        return _halves(tokens, cut, {"kind": "bytes"}, source, path)
    validation, crc32_of_other = _text(other)
    source = {"file": path.name, "crc32": crc32,
              "validation": {"file": other.name, "crc32": crc32_of_other},
              "encoding": {"kind": "bytes"}}  # fmt: skip
    for part, x in (("train", tokens), ("val", validation)):
        source[part] = {"tokens": len(x), "bytes": len(x)}
    note = f"{other} is the validation text of {path}"
    return (tokens, validation), source, (path.parent, [str(path), str(other)]), [note]


def _halves(tokens, cut, encoding, source, path):
    """The fields of one file that is cut in two."""
    parts = [Tokens(tokens.ids[part], f"the {name} part of {tokens.what}", tokens.vocabulary)
             for name, part in (("training", slice(cut)), ("validation", slice(cut, None)))]
    sizes = {name: {"tokens": len(x), "bytes": len(x)} for name, x in zip(("train", "val"), parts)}
    return parts, {**source, "encoding": encoding, **sizes}, (path,), []


def _pair(path):
    """(the text to train on, that of the validation or None) of a file or a folder."""
    if (path / "train.bin").is_file():
        raise DataError(f"{path} has token ids: --dataset tokens:{path}")
    if path.is_dir():
        stems = {x.stem: x for x in sorted(path.glob("*.txt"))}
        other = next((stems[x] for x in VALIDATION if x in stems), None)
        if "train" not in stems or other is None:
            raise DataError(f"{path} is a folder without train.txt and val.txt: name one file, or "
                            "a folder of these two")  # fmt: skip
        return stems["train"], other
    if path.stem == "train":
        beside = (path.with_name(f"{x}{path.suffix}") for x in VALIDATION)
        return path, next((x for x in beside if x.is_file()), None)
    return path, None


def _text(path):
    """(the bytes of a UTF-8 text as Tokens, their CRC)."""
    tokens = _file(path, np.dtype(np.uint8), 256)
    decoder, crc32, done = codecs.getincrementaldecoder("utf-8")(), 0, 0
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            try:
                decoder.decode(chunk, final=done + len(chunk) >= len(tokens))
            except UnicodeDecodeError as error:
                at = done + len(chunk) - len(error.object) + error.start
                raise DataError(f"{path} is not UTF-8 at byte {at:,}: save it as UTF-8, or make "
                                "tokens of it") from error  # fmt: skip
            crc32, done = zlib.crc32(chunk, crc32), done + len(chunk)
    return tokens, f"{crc32:08x}"


def _tokens(folder, vocabulary):
    """A folder of token ids."""
    if folder.is_file():
        other = f"tokens:{folder.parent}" if folder.suffix == ".bin" else f"text:{folder}"
        raise DataError(f"{folder} is a file, and no folder of train.bin and val.bin: --dataset "
                        f"{other}")  # fmt: skip
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}: tokens:FOLDER has train.bin and val.bin")
    meta_path = folder / "meta.json"
    meta = _meta(meta_path)
    vocabulary = vocabulary or meta.get("vocab_size")
    if vocabulary is None:
        raise DataError(f"{folder} has no meta.json with its vocab_size: give --vocab N (GPT-2's "
                        "has 50257 tokens)")  # fmt: skip
    dtype = meta.get("dtype") or ("uint16" if vocabulary <= 2**16 else "uint32")
    paths = [folder / "train.bin", folder / "val.bin"]
    parts = tuple(_file(path, DTYPES[dtype], vocabulary) for path in paths)
    if "dtype" not in meta and dtype == "uint16":
        for tokens in parts:
            start = tokens.ids.windows(np.zeros(1, np.int64), min(LOOK, len(tokens)))[0]
            if len(start) == LOOK and start[::2].any() and not start[1::2].any():
                raise DataError(f"{tokens.what} looks like uint32, as every other number is 0: "
                                f'"dtype": "uint32" in {folder / "meta.json"} says so')
    source = {"dtype": dtype, "vocab_size": vocabulary, "encoding": meta.get("encoding")}
    for name, tokens in zip(("train", "val"), parts):
        known = meta.get(name, {})
        source[name] = {"tokens": len(tokens)}
        if known.get("tokens") == len(tokens) and known.get("bytes"):
            source[name]["bytes"] = known["bytes"]
    paths += [meta_path] if meta_path.exists() else []
    return parts, source, (folder, [str(path) for path in paths]), []


def _meta(path):
    """The entries of a meta.json that are used, {} where there is none."""
    if not path.exists():
        return {}
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            raise ValueError("it is no small file")
        meta = json.loads(path.read_bytes().decode())
        if not isinstance(meta, dict):
            raise ValueError("it is no object")
        size, dtype, encoding = map(meta.get, ("vocab_size", "dtype", "encoding"))
        if size is not None and not (type(size) is int and 1 < size <= MOST_TOKENS):
            raise ValueError("its vocab_size is no number of tokens")
        if dtype is not None and dtype not in [*DTYPES]:
            raise ValueError(f"its dtype is none of {', '.join(DTYPES)}")
        if encoding is not None and not (
                isinstance(encoding, dict) and all(type(x) is str for x in encoding.values())):
            raise ValueError("its encoding is no object of strings")
        for part in ("train", "val"):
            known = meta.get(part, {})
            if not isinstance(known, dict) or any(
                    type(known.get(x, 0)) is not int or not 0 <= known.get(x, 0) < 2**63
                    for x in ("tokens", "bytes")):  # fmt: skip
                raise ValueError(f"its {part} has no counts")
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{path} cannot be used: {reason(error)}") from error
    keys = "vocab_size", "dtype", "encoding", "train", "val"
    return {key: meta[key] for key in keys if meta.get(key) is not None}


def _file(path, dtype, vocabulary):
    """The Tokens of a file."""
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"{path} is no file" if path.exists() else f"there is no file {path}")
    ids = Ids(path, dtype)
    if not ids.size:
        raise DataError(f"{path} is empty")
    if ids.size % dtype.itemsize:
        raise DataError(f"{path} has {ids.size:,} bytes, and a token of {dtype.name} takes "
                        f"{dtype.itemsize}: it is cut, or of another type")  # fmt: skip
    return Tokens(ids, str(path), vocabulary)
