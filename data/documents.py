"""Read texts and documents from files, packed or not, in pieces that processes share, and write
their tokens.

A long text, and a file that several tasks share, is cut before a space or a newline that follows
another character. There GPT-2's encoding begins a new piece in any case, so no token differs from
those of the whole text. A text that has no such place in a million characters is cut between two
of them.
"""

import bz2
import codecs
import contextlib
import gzip
import json
import lzma
import os
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cli import size
from data.common import DataError, reason
from data.encoding import read_encoding

KINDS = (".txt", ".jsonl")
PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
DAMAGED = (OSError, EOFError, zlib.error, lzma.LZMAError)  # of files, packed or not
CHUNK = 2**20  # bytes of a text that are encoded at a time
WINDOW = 2**12  # bytes in which a place to cut is looked for
LINE = 2**28  # bytes of a line of JSONL
PLACE = re.compile(r"(?<=\S)[ \n]")
LAST_PLACE = re.compile(r"[ \n](?=\S)")  # of the text turned round
SPLITS = ("train", "val")


class Piece(NamedTuple):
    """The `i`-th of `n` cuts of the bytes `start` to `end` of a file; None is the unknown end of a
    packed one. split: the file's, or None for a split by document or place. `closes`: a document
    ends where they do."""

    name: str
    start: int
    end: int | None
    i: int
    n: int
    split: str | None
    closes: bool


class Job(NamedTuple):
    """What the tasks have in common: one document in `every` of JSONL is for validation, and the
    first one of the file `lead`, so that there is one."""

    root: Path
    encoding: dict
    dtype: str
    every: int
    lead: str | None


def parts_of_name(name):
    """(stem, .txt, .jsonl or None, .gz, .bz2, .xz or None) of a file's name."""
    stem, suffix = os.path.splitext(name)
    packed = suffix.lower() if suffix.lower() in PACKED else None
    if packed:
        stem, suffix = os.path.splitext(stem)
    if suffix.lower() in KINDS:
        return stem, suffix.lower(), packed
    return os.path.splitext(name)[0] if not packed else stem, None, packed


class TokenFile:
    """A file of tokens that grows, with its counts."""

    def __init__(self, path, coder, dtype):
        self.file, self.coder, self.dtype = open(path, "wb"), coder, dtype
        self.tokens = self.bytes = 0

    def add(self, text):
        ids = self.coder.encode(text).astype(self.dtype.newbyteorder("<"))
        self.file.write(ids)
        self.tokens += len(ids)
        self.bytes += len(text.encode())

    def close_document(self, last):
        """End a document whose text ends with `last`."""
        if self.coder.end is not None:
            self.file.write(np.array([self.coder.end], self.dtype.newbyteorder("<")))
            self.tokens += 1
        elif not last.endswith("\n"):
            self.add("\n")


def make_share(job, pieces, made, target):
    """Write the tokens of some pieces to the folder `target`, by way of `made`: train.bin, val.bin
    and their counts, meta.json."""
    coder, dtype = read_encoding(job.encoding), np.dtype(job.dtype)
    made.mkdir()
    try:
        out = {x: TokenFile(made / f"{x}.bin", coder, dtype) for x in SPLITS}
        with contextlib.ExitStack() as stack:
            for tokens in out.values():
                stack.enter_context(tokens.file)
            for piece in pieces:
                for split, texts, closes in _documents(job, piece):
                    last = ""
                    for last in texts:
                        out[split].add(last)
                    if closes and last:
                        out[split].close_document(last)
    except MemoryError:
        raise DataError("a process has too little memory: fewer --jobs; the same command goes on "
                        "from there") from None  # fmt: skip
    counts = {x: {"tokens": y.tokens, "bytes": y.bytes} for x, y in out.items()}
    text = json.dumps({**counts, "dtype": job.dtype, "source": {"id": None, "shares": 1}})
    (made / "meta.json").write_text(text, encoding="utf-8")
    made.rename(target)


def _documents(job, piece):
    """Generate (split, an iterator of the parts of a text, whether a document ends there)."""
    path = job.root / piece.name
    _, kind, packed = parts_of_name(piece.name)
    if kind == ".jsonl":
        lead = piece.name == job.lead and piece.i == 0
        for text in _rows(path, *(_cut(path, piece, x, _line) for x in (0, 1))):
            drawn = lead or not zlib.crc32(text.encode()) % job.every
            yield piece.split or SPLITS[drawn], _parts_of(text), True
            lead = False
    elif piece.split is None:  # packed, so that its length is not known before
        cut = whole_character(path, 9 * _unpacked_size(path) // 10)
        yield "train", _text(path, 0, cut), piece.closes
        yield "val", _text(path, cut, None), True
    else:
        bounds = (_cut(path, piece, x, _space) for x in (0, 1))
        yield piece.split, _text(path, *bounds), piece.closes and piece.i + 1 == piece.n


def _cut(path, piece, x, place):
    """Where a piece begins (x = 0) or ends (1): at the outer ends as it is, at the next `place`
    between."""
    if piece.i + x == 0:
        return piece.start
    if piece.i + x == piece.n:
        return piece.end
    return place(path, bound(piece, x))


def bound(piece, x):
    """Where a piece begins (x = 0) or ends (1) by division alone."""
    return piece.start + (piece.end - piece.start) * (piece.i + x) // piece.n


def _open(path):
    packed = parts_of_name(path.name)[2]
    return (PACKED[packed] if packed else open)(path, "rb")


@contextlib.contextmanager
def _reading(path):
    """Open a file; what goes wrong while it is read is a DataError."""
    try:
        with _open(path) as file:
            yield file
    except DAMAGED as error:
        raise DataError(f"{path} cannot be read: {reason(error)}") from error


def _unpacked_size(path):
    with _reading(path) as file:
        return sum(map(len, iter(lambda: file.read(CHUNK), b"")))


def whole_character(path, at):
    """The beginning of the first character from byte `at` on."""
    with _reading(path) as file:
        file.seek(at)
        following = file.read(3)
    return at + len(following) - len(following.lstrip(bytes(range(0x80, 0xC0))))


def _space(path, at):
    """The first place to cut from the character at byte `at` on, or that character's own."""
    at = whole_character(path, at)
    with _reading(path) as file:
        file.seek(at)
        window = file.read(WINDOW)
    with contextlib.suppress(UnicodeDecodeError):  # found again, and told of, when it is encoded
        text = codecs.getincrementaldecoder("utf-8")().decode(window)
        if found := PLACE.search(text):
            return at + len(text[: found.start()].encode())
    return at


def _line(path, at):
    """The beginning of the first line from byte `at` on."""
    with _reading(path) as file:
        file.seek(at - 1)
        while (part := file.readline(CHUNK)) and not part.endswith(b"\n"):
            pass
        return file.tell()


def _utf8(at):
    """The name of the encoding from byte `at` of a file on: a mark at its beginning is no text."""
    return "utf-8" if at else "utf-8-sig"


def _not_utf8(path, at):
    return DataError(f"{path} is not UTF-8 at byte {at:,}: save it as UTF-8, or give the texts "
                     "alone")  # fmt: skip


def _text(path, start, end):
    """Generate the parts of the UTF-8 text from byte `start` to byte `end` of a file."""
    decoder, at, rest = codecs.getincrementaldecoder(_utf8(start))(), start, ""
    with _reading(path) as file:
        file.seek(start)
        while True:
            chunk = file.read(CHUNK if end is None else min(CHUNK, end - at))
            try:
                rest += decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                at += len(chunk) - len(error.object) + error.start
                raise _not_utf8(path, at) from error
            at += len(chunk)
            if not chunk:
                break
            cut = _last_place(rest)
            if cut:
                yield rest[:cut]
                rest = rest[cut:]
    if end is not None and at < end:
        raise DataError(f"{path} has been cut while it was read")
    if rest:
        yield rest


def _last_place(text):
    """The last place to cut a text, its end if it is long and has none, or 0."""
    if found := LAST_PLACE.search(text[::-1]):
        return len(text) - found.start() - 1
    return len(text) if len(text) >= CHUNK else 0


def _parts_of(text):
    """Generate the parts of a text in memory."""
    at = 0
    while len(text) - at > CHUNK:
        part = text[at : at + CHUNK]
        part = part[: _last_place(part)]
        yield part
        at += len(part)
    yield text[at:]


def _rows(path, start, end):
    """Generate the texts of the lines of a JSONL file that begin from byte `start` on and before
    byte `end`."""
    at = start
    with _reading(path) as file:
        file.seek(start)
        while (end is None or at < end) and (line := file.readline(LINE + 1)):
            if len(line) > LINE:
                raise DataError(f"{path} has a line of more than {size(LINE)} at byte {at:,}: it "
                                "is no document")  # fmt: skip
            try:
                row = line.decode(_utf8(at))
                text = json.loads(row)["text"] if row.strip() else ""
                # JSON may have half a pair of surrogates, which is no character.
                text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            except UnicodeDecodeError as error:
                at += len(line) - len(error.object) + error.start
                raise _not_utf8(path, at) from error
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise DataError(f'{path} has a line at byte {at:,} that is no {{"text": "..."}}: '
                                "each has to be such an object") from error  # fmt: skip
            if text:
                yield text
            at += len(line)
