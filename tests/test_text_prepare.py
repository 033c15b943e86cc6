"""Texts made into tokens by `python -m data.prepare text`, and the encodings of tokens."""

import bz2
import gzip
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from data import DataError, corpus, documents, load
from data.encoding import read_encoding
from data.prepare import main
from tests.conftest import ROOT

END = "<|endoftext|>"
MEMORY = 128 * 2**20  # bytes that each process may have of its own
LETTERS = "abc é😀"
TEXT = "To be, or not to be: it's\n\n  the 1st question — だ。\n 😀 naïve\t \u3000x  \n" * 400
# Stands for tiktoken: the pieces of GPT-2's pattern, each an id of its own and then its bytes. So
# a text that is cut within a piece has other ids, and ids have a text.
TIKTOKEN = r'''
import re, zlib

PIECE = re.compile(r"<\|endoftext\|>|'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+"
                   r"|\s+(?!\S)|\s+")

class Coder:
    def encode(self, text, allowed_special=()):
        assert allowed_special == "all"
        ids = []
        for piece in PIECE.findall(text):
            data = piece.encode()
            ids += [50256] if piece == "<|endoftext|>" else [256 + zlib.crc32(data) % 50000, *data]
        return ids

    def decode_single_token_bytes(self, token):
        if token > 50256:
            raise KeyError(token)
        special = b"<|endoftext|>" if token == 50256 else b""
        return bytes([token]) if token < 256 else special

def get_encoding(name):
    assert name == "gpt2"
    return Coder()
'''


@pytest.fixture(autouse=True)
def no_tiktoken(monkeypatch):
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


@pytest.fixture
def tiktoken(tmp_path, monkeypatch):
    """Stands for the package, in processes that are started too."""
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "tiktoken.py").write_text(TIKTOKEN)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.delitem(sys.modules, "tiktoken", raising=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: folder)
    yield
    sys.modules.pop("tiktoken", None)


@pytest.fixture
def small(monkeypatch):
    """Cut texts into many shares and parts."""
    monkeypatch.setattr(corpus, "SHARE", 4000)
    for name, value in (("CHUNK", 700), ("WINDOW", 100)):
        monkeypatch.setattr(documents, name, value)


@pytest.fixture
def command(tmp_path, capsys):
    """f(source, *flags) -> (exit code, all that was printed) of the command, with one job."""

    def run(source, *flags, out=tmp_path / "out", jobs=1):
        words = ["text", "--from", source, "--data_dir", out, "--jobs", jobs, *flags]
        try:
            code = main(list(map(str, words)))
        except SystemExit as end:
            code = end.code
        return code, "".join(capsys.readouterr())

    return run


def lay(path, content):
    """Write a text or bytes to a file, packed as its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pack = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(pack.get(path.suffix, bytes)(data))
    return path


def rows(*texts):
    return "".join(json.dumps({"id": i, "text": x}) + "\n" for i, x in enumerate(texts))


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tokens(folder):
    """(train, val) of a result, as lists, its meta.json checked."""
    meta = json.loads((folder / "meta.json").read_text())
    made = [np.fromfile(folder / f"{x}.bin", "<u2").tolist() for x in ("train", "val")]
    assert [meta["train"]["tokens"], meta["val"]["tokens"]] == list(map(len, made))
    assert {x.name for x in folder.iterdir()} == {"train.bin", "val.bin", "meta.json"}
    return made


def texts(folder):
    """(train, val) of a result, as texts."""
    encoding = read_encoding(json.loads((folder / "meta.json").read_text())["encoding"])
    return [encoding.decode(x) for x in tokens(folder)]


def content(folder):
    """(train, val) of a large result by bytes, as texts."""
    parts = (np.fromfile(folder / f"{x}.bin", "<u2") for x in ("train", "val"))
    return [part.astype(np.uint8).tobytes().decode() for part in parts]


# Encodings


@pytest.mark.parametrize("description, size, dtype, text", [
    ({"kind": "characters", "letters": "".join(sorted(LETTERS))}, 6, np.uint8, "cab é😀😀"),
    ({"kind": "characters", "letters": "".join(map(chr, range(32, 332)))}, 300, np.uint16, "aĀŋ"),
    ({"kind": "bytes"}, 256, np.uint8, TEXT[:100]),
    ({"kind": "gpt2"}, 50257, np.uint16, TEXT[:100] + END + " 's")])  # fmt: skip
def test_encodings(description, size, dtype, text, tiktoken):
    encoding = read_encoding(description)
    ids = encoding.encode(text)
    assert encoding.size == size and ids.dtype == dtype and ids.max() < size
    assert encoding.decode(ids) == encoding.decode(torch.tensor(ids.astype(np.int64))) == text
    assert encoding.decode([]) == "" and len(encoding.encode("")) == 0
    stream = encoding.stream()
    pieces = [stream([i]) for i in ids]
    assert "".join(pieces) == text and "\ufffd" not in "".join(pieces)
    # of a vocabulary that is larger, as nanoGPT's 50,304; a character without its end is left out
    assert encoding.decode([size + 3, *ids[:1]])[0] == "\ufffd"
    if description["kind"] == "bytes":
        assert encoding.decode(encoding.encode("a😀")[:-1]) == "a"
        assert encoding.decode([0xFF, 65]) == "\ufffdA"
    assert encoding.end == (50256 if description["kind"] == "gpt2" else None)


@pytest.mark.parametrize("description", [
    None, {}, [], "bytes", {"kind": "words"}, {"kind": ["bytes"]}, {"kind": "characters"},
    *({"kind": "characters", "letters": x} for x in ("", "ba", "aa", 3, ["a"], "a\ud800"))])
def test_descriptions_that_are_none(description):
    with pytest.raises(DataError, match="encoding|no character"):
        read_encoding(description)


def test_what_has_no_token(tiktoken):
    with pytest.raises(DataError, match="'x' is none of the 2 letters"):
        read_encoding({"kind": "characters", "letters": "ab"}).encode("abxy")
    for kind in ("bytes", "gpt2"):
        with pytest.raises(DataError, match="udcff.* is no character"):
            read_encoding({"kind": kind}).encode("a\udcff")


def test_gpt2_without_its_package(command, tmp_path, monkeypatch):
    path = lay(tmp_path / "x.txt", TEXT)
    with pytest.raises(DataError, match="pip install tiktoken"):
        read_encoding({"kind": "gpt2"})
    code, printed = command(path, "--encoding", "gpt2")
    assert code == 2 and "pip install tiktoken; --encoding bytes does without" in printed
    code, printed = command(path)
    assert code == 0 and "GPT-2's take the package tiktoken" in printed


def test_gpt2_whose_files_cannot_be_fetched(command, tmp_path, monkeypatch, tiktoken):
    (tmp_path / "packages/tiktoken.py").write_text(
        "def get_encoding(name): raise ConnectionError('Name or service not known')")
    code, printed = command(lay(tmp_path / "x.txt", TEXT))
    assert code == 2 and re.search(
        r"\(Name or service not known\): .*TIKTOKEN_CACHE_DIR.*; --encoding bytes", printed)


# Files


def test_a_text_by_bytes_is_what_the_data_set_text_has(command, small, tmp_path):
    path = lay(tmp_path / "book.v2.txt", TEXT)
    code, printed = command(path)
    made = tmp_path / "out" / "book.v2-bytes"
    assert code == 0 and f"--arch gpt --dataset tokens:{made}" in printed, printed
    assert "".join(texts(made)) == TEXT and not list(tmp_path.glob("out/*.partial"))
    ours, theirs = (load(name, tmp_path, 4, 4, torch.device("cpu"), context=16, epoch_steps=2)
                    for name in (f"tokens:{made}", f"text:{path}"))  # fmt: skip
    assert ours.classes == theirs.classes and ours.bytes_a_token == theirs.bytes_a_token == [1, 1]
    for a, b in zip((ours.train, ours.test), (theirs.train, theirs.test)):
        a, b = (x.tokens.windows(np.array([0]), len(x.tokens)) for x in (a, b))
        assert np.array_equal(a, b)
    # packed, it is the same; and there already
    for suffix in (".gz", ".bz2", ".xz"):
        packed = lay(tmp_path / f"packed.txt{suffix}", TEXT)
        assert command(packed, out=tmp_path / suffix)[0] == 0
        assert tokens(tmp_path / suffix / "packed-bytes") == tokens(made)
    before = made.stat().st_mtime_ns, files(made)
    assert command(path)[0] == 0 and (made.stat().st_mtime_ns, files(made)) == before
    lay(path, TEXT + "more")
    code, printed = command(path)
    assert code == 2 and "was not made of these files" in printed and files(made) == before[1]


def test_a_packed_text_has_the_tokens_of_the_plain_one(command, tmp_path, tiktoken):
    """No document ends where the validation part begins, unless another file follows."""
    content = "0123456789" * 30
    for encoding in ("bytes", "gpt2"):
        made = {}
        for suffix in ("", ".gz", ".bz2", ".xz"):
            path, out = lay(tmp_path / f"x.txt{suffix}", content), tmp_path / f"to{suffix}"
            assert command(path, "--encoding", encoding, out=out)[0] == 0
            made[suffix] = texts(out / f"x-{encoding}")
        end = END if encoding == "gpt2" else "\n"
        assert all(x == [content[:270], content[270:] + end] for x in made.values()), made
    for suffix in ("", ".gz"):
        folder = tmp_path / f"in{suffix}"
        lay(folder / f"a.txt{suffix}", content[:10]), lay(folder / "b.jsonl", rows("one", "two"))
        assert command(folder)[0] == 0
        assert texts(tmp_path / f"out/in{suffix}-gpt2")[0].startswith(f"012345678{END}two")


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.jsonl", "x.jsonl.gz"])
def test_a_mark_of_the_byte_order_is_no_text(name, command, small, tmp_path):
    """Windows' editors begin a UTF-8 file with it."""
    content = rows(*(f"document {i}" for i in range(30))) if "jsonl" in name else TEXT
    for mark in ("", "\ufeff"):
        assert command(lay(tmp_path / name, mark + content), out=tmp_path / f"to{mark}")[0] == 0
    plain, marked = ("".join(texts(tmp_path / f"to{x}/x-bytes")) for x in ("", "\ufeff"))
    assert sorted(plain) == sorted(marked) and (plain == TEXT or "jsonl" in name)
    path = lay(tmp_path / name, b'\xef\xbb\xbf{"text": "\xff"}\n')
    code, printed = command(path, out=tmp_path / "bad")
    assert code == 2 and "is not UTF-8 at byte 13" in printed


@pytest.mark.parametrize("text", [TEXT, "a" * 9000, "あ" * 9000, " " * 9000, "\n x" * 3000,
                                  (END + "\nOnce upon a time. ") * 300])  # fmt: skip
def test_cuts_change_no_token(text, command, small, tmp_path, tiktoken):
    """Of pieces longer than a part alone the bytes are the same, not the ids."""
    code, printed = command(lay(tmp_path / "x.txt", text))
    made = tmp_path / "out" / "x-gpt2"
    assert code == 0 and "--arch gpt2" in printed
    train, val = tokens(made)
    raw = text.encode()
    cut = len("".join(texts(made)[:1]).encode())
    assert 0 <= cut - 9 * len(raw) // 10 < 4 and "".join(texts(made)) == text + END
    encoding, longest = read_encoding({"kind": "gpt2"}), max(map(len, re.findall(r"\S+|\s+", text)))
    if longest < 100:
        assert train == encoding.encode(raw[:cut].decode()).tolist()
        assert val == [*encoding.encode(raw[cut:].decode()).tolist(), 50256]
    meta = json.loads((made / "meta.json").read_text())
    assert meta["train"]["bytes"] + meta["val"]["bytes"] == len(raw)
    assert (meta["vocab_size"], meta["dtype"]) == (50257, "uint16")


def test_any_number_of_processes_makes_the_same_bytes(command, small, tmp_path, tiktoken):
    lay(tmp_path / "in/a.txt", TEXT)
    lay(tmp_path / "in/b.jsonl.gz", rows(*(f"document {i} {TEXT[: i % 90]}" for i in range(300))))
    made = []
    for jobs in (1, 2):
        monkey = tmp_path / str(jobs)
        assert command(tmp_path / "in", out=monkey, jobs=jobs)[0] == 0
        made.append(files(monkey / "in-gpt2"))
    assert made[0] == made[1] and json.loads(made[0]["meta.json"])["source"]["shares"] > 5


# Folders and documents


def test_a_few_texts_give_their_last_tenth(command, tmp_path, tiktoken):
    folder = tmp_path / "books"
    contents = {"a.txt": "1234567890" * 3, "b/c.TXT.gz": "abcdefghij" * 2, "b.txt": "é" * 9 + "xy"}
    for name, content in contents.items():
        lay(folder / name, content)
    for name in (".hidden.txt", ".git/x.txt", "notes.md", "empty.txt"):
        lay(folder / name, "" if name == "empty.txt" else "not this one")
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "gone.txt").symlink_to(folder / "nowhere")
    assert command(folder)[0] == 0
    train, val = texts(tmp_path / "out" / "books-gpt2")
    assert train == f"{'1234567890' * 2}1234567{END}{'é' * 9}{END}{('abcdefghij' * 2)[:18]}{END}"
    assert val == f"890{END}xy{END}ij{END}"
    # by bytes a document ends with a line
    assert command(folder, "--encoding", "bytes")[0] == 0
    assert texts(tmp_path / "out" / "books-bytes")[1] == "890\nxy\nij\n"


def test_many_texts_are_documents(command, tmp_path, tiktoken):
    names = sorted(f"{i % 7}/{i}.txt" for i in range(250))
    for name in names:
        lay(tmp_path / "in" / name, f"text {name}")
    assert command(tmp_path / "in")[0] == 0
    split = [[x for x in text.split(END) if x] for text in texts(tmp_path / "out" / "in-gpt2")]
    assert split[1] == [f"text {x}" for x in names[9::10]]
    assert sorted(split[0] + split[1]) == sorted(f"text {x}" for x in names)


@pytest.mark.parametrize("suffix", ["", ".gz", ".xz"])
def test_lines_of_json_are_documents(suffix, command, small, tmp_path, tiktoken):
    documents = [f"document {i}\n{TEXT[: 5 * i]}" for i in range(100)]
    documents[7], documents[50] = "half a pair \ud83d of surrogates", ""
    lines = f"{rows(*documents[:60])}\n \n{rows(*documents[60:])}"
    path = lay(tmp_path / f"x.jsonl{suffix}", lines)
    assert command(path)[0] == 0
    train, val = (x.split(END) for x in texts(tmp_path / "out" / "x-gpt2"))
    documents[7] = documents[7].replace("\ud83d", "\ufffd")
    share = [x for x in documents if x and (x == documents[0] or not zlib.crc32(x.encode()) % 10)]
    assert val == [*share, ""] and 5 < len(share) < 20
    assert train == [*(x for x in documents if x and x not in share), ""]


def test_the_validation_part_of_much_text_is_small():
    """About 10 MB, from one document in ten to one in 2,000."""
    def every(*sizes):
        group = {None: [corpus.File(f"{i}.jsonl", x, 0) for i, x in enumerate(sizes)]}
        return corpus.plan(Path(), group, {"kind": "bytes"}, "uint16")[0].every

    assert [every(x * 10**6) for x in (1, 99, 200, 1000, 40000)] == [10, 10, 20, 100, 2000]
    assert every(*[5 * 10**8] * 4) == 200


@pytest.mark.parametrize("train, val, more", [
    ("train.txt", "val.txt", "other.txt"), ("train.jsonl", "validation.txt", "notes.md"),
    ("train/a.txt", "valid/b/c.txt", "test/x.txt"), ("T-train-1.txt", "T-valid.txt", "T-test.txt"),
    ("en.train.00-of-02.jsonl.gz", "en.validation.00-of-01.jsonl.gz", None)])
def test_a_pair(train, val, more, command, tmp_path):
    for name, text in ((train, "to train on\n"), (val, "to validate\n"), (more, "neither\n")):
        if name:
            lay(tmp_path / "in" / name, rows(text) if ".jsonl" in name else text)
    code, printed = command(tmp_path / "in")
    assert code == 0 and f"{val.split('/')[0]} for validation" in printed
    assert texts(tmp_path / "out" / "in-bytes") == ["to train on\n", "to validate\n"]
    if more and more != "notes.md":
        assert f"left out: {more.split('/')[0]}" in printed
    # and by its first file, as --dataset text: has it
    if train == "train.txt":
        assert command(tmp_path / "in/train.txt", out=tmp_path / "one")[0] == 0
        assert files(tmp_path / "one/in-bytes") == files(tmp_path / "out/in-bytes")


def test_words_in_names_are_no_pair_where_others_are_without(command, tmp_path):
    for name in ("a train.txt", "a test.txt", "a boat.txt"):
        lay(tmp_path / "in" / name, "0123456789")
    assert command(tmp_path / "in")[0] == 0
    assert texts(tmp_path / "out" / "in-bytes") == ["012345678\n" * 3, "9\n" * 3]


@pytest.mark.parametrize("name, content, message", [
    ("x.txt", b"good \xff bad", "x.txt is not UTF-8 at byte 5"),
    ("x.txt", TEXT.encode() + b"\xe3\x81", f"at byte {len(TEXT.encode()):,}"),
    ("x.txt", TEXT.encode()[:9001] + b"\xff" + TEXT.encode(), "at byte 9,001"),
    ("x.jsonl", b'{"text": "good"}\n{"text": "\xff"}\n', "x.jsonl is not UTF-8 at byte 27"),
    ("x.jsonl", rows("good") + '{"txt": ""}\n', "a line at byte 26 that is no"),
    ("x.jsonl", "[1]\n", "at byte 0"), ("x.jsonl", '{"text": null}\n', "at byte 0"),
    ("x.jsonl", "[" * 9999, "more than 2.0 kB"), ("x.jsonl", "[" * 1500, "at byte 0"),
    ("x.txt", "a", "too little text"), ("x.jsonl", rows("one"), "too little text"),
    ("x.txt", "", "x.txt is empty"), ("x.bin", bytes(range(256)), "not UTF-8 at byte 128"),
])  # fmt: skip
def test_what_is_no_text(name, content, message, command, small, monkeypatch, tmp_path):
    monkeypatch.setattr(documents, "LINE", 2000)
    code, printed = command(lay(tmp_path / name, content))
    assert code == 2 and message in printed and "Traceback" not in printed, printed
    assert not (tmp_path / "out" / "x-bytes").exists()


@pytest.mark.parametrize("name, content", [
    ("x.txt", b"caf\xe9"), ("x.jsonl", b'{"text": null}\n'), ("x.txt.gz", b"not packed")])
def test_a_file_that_was_refused_is_taken_once_it_is_mended(name, content, command, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert command(tmp_path / name)[0] == 2
    documents = [f"document {i}\n" for i in range(90)]
    code, printed = command(lay(tmp_path / name, rows(*documents) if "l" in name else TEXT))
    assert code == 0, printed
    made = texts(tmp_path / "out/x-bytes")
    assert sorted("".join(made)) == sorted("".join(documents) if "l" in name else TEXT)


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz"])
def test_damaged_packed_files(suffix, command, tmp_path):
    path = lay(tmp_path / f"x.txt{suffix}", TEXT)
    path.write_bytes(path.read_bytes()[:-20])
    code, printed = command(path)
    assert code == 2 and f"x.txt{suffix} cannot be read: " in printed
    assert command(lay(path, TEXT))[0] == 0
    assert "".join(texts(tmp_path / "out/x-bytes")) == TEXT


def test_a_folder_without_texts(command, tmp_path):
    for name in ("a.jsonl.zst", "b.jsonl.zst", "c.parquet", "LICENSE"):
        lay(tmp_path / "in" / name, b"x")
    code, printed = command(tmp_path / "in")
    assert code == 2 and ".jsonl.zst (2), " in printed and "holds no text" in printed


# Ends in the middle


class Killed(BaseException):
    """Nothing handles it, as nothing handles SIGKILL."""


@pytest.mark.parametrize("step", ["_write", "make_share", "shutil.rmtree", "shutil.copyfileobj"])
def test_a_command_that_is_killed_at_any_step_goes_on(step, command, small, tmp_path, monkeypatch):
    """After each of them; what was done is not done again, and the bytes are an unbroken run's."""
    path = lay(tmp_path / "x.txt", TEXT)
    assert command(path, out=tmp_path / "whole")[0] == 0
    owner = shutil if "." in step else corpus
    name, real = step.split(".")[-1], getattr(owner, step.split(".")[-1])
    calls, made = [], []

    def killed(*args, **kwargs):
        calls.append(step)
        done = real(*args, **kwargs)
        if len(calls) % 3 == 0:
            raise Killed
        return done

    make = corpus.make_share
    for _ in range(99):
        with monkeypatch.context() as patch:
            patch.setattr(corpus, "make_share", lambda *a: (make(*a), made.append(a[3].name))[0])
            real = getattr(owner, name)
            patch.setattr(owner, name, killed)
            try:
                code, _ = command(path)
            except Killed:
                continue
        break
    assert code == 0 and len(calls) > 6
    assert files(tmp_path / "out/x-bytes") == files(tmp_path / "whole/x-bytes")
    assert len(made) == len(set(made)) > 5  # each share once


def test_shares_that_are_damaged_are_made_again(command, small, tmp_path, monkeypatch):
    """As a power cut may leave them."""
    path = lay(tmp_path / "x.txt", TEXT)
    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_append", lambda *args: None)
        patch.setattr(Path, "rename", lambda a, b, real=Path.rename: (
            (_ for _ in ()).throw(Killed) if ".partial" in a.name else real(a, b)))
        patch.setattr("shutil.rmtree", lambda *args, **kw: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            command(path)
    partial = tmp_path / "out/x-bytes.partial"
    shares = [x for x in partial.iterdir() if x.name.isdecimal()]
    assert len(shares) > 5
    lay(shares[0] / "train.bin", b"")
    (shares[1] / "meta.json").write_text("{")
    assert command(path)[0] == 0 and "".join(texts(tmp_path / "out/x-bytes")) == TEXT


def test_other_files_do_not_go_on_with_a_result(command, small, tmp_path, monkeypatch):
    path = lay(tmp_path / "x.txt", TEXT)
    def interrupted(*args, real=corpus._append):
        real(*args)
        if args[2]["source"]["shares"]:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_append", interrupted)
        code, printed = command(path)
    assert code == 130 and "interrupted; the same command goes on" in printed
    before = lay(path, TEXT.upper()) and files(tmp_path / "out/x-bytes.partial")
    code, printed = command(path)
    assert code == 2 and "was begun from other files, or before they changed" in printed
    assert files(tmp_path / "out/x-bytes.partial") == before
    lay(tmp_path / "out/y-bytes/train.bin", b"ab")  # somebody's own
    code, printed = command(lay(tmp_path / "y.txt", TEXT))
    assert code == 2 and "y-bytes is there and was not made of these files" in printed


def test_one_command_at_a_time(command, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    partial = tmp_path / "out/x-bytes.partial"
    partial.mkdir(parents=True)
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    code, printed = command(lay(tmp_path / "x.txt", TEXT))
    os.close(handle)
    assert code == 2 and "another process is making" in printed
    assert command(tmp_path / "x.txt")[0] == 0


DRIVER = """
import resource, sys
kind, limit, share = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
if limit:
    resource.setrlimit(getattr(resource, kind), (limit, limit))
import runpy
from data import corpus
corpus.SHARE = share
runpy.run_module("data.prepare", run_name="__main__")
"""


def start(path, out, jobs, kind="RLIMIT_FSIZE", limit=0, share=2**18):
    """The command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, kind, str(limit), str(share), "text", "--from", str(path),
         "--data_dir", str(out), "--jobs", str(jobs), "--encoding", "bytes"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip


def test_a_full_disk_is_one_sentence(command, tmp_path):
    path = lay(tmp_path / "x.txt", TEXT * 20)
    process = start(path, tmp_path / "out", 1, limit=2**20)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == 2 and "Traceback" not in printed
    assert re.search("error: .*x-bytes cannot be written: .*; the same command goes on", printed)
    assert not (tmp_path / "out/x-bytes").exists()
    process = start(path, tmp_path / "out", 1)
    assert process.wait(60) == 0 and "".join(content(tmp_path / "out/x-bytes")) == TEXT * 20


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("end", [
    "terminated", *(pytest.param(x, marks=pytest.mark.slow)
                    for x in ("Ctrl-C", "killed", "a worker killed"))])
def test_an_end_in_the_middle(end, tmp_path):
    """The result whole or not there, no process left, and the same command makes it whole."""
    text = TEXT * 250
    path, out = lay(tmp_path / "x.txt", text), tmp_path / "out"
    partial = out / "x-bytes.partial"
    process = start(path, out, 2)
    limit = time.monotonic() + 60
    while not (partial / "train.bin").exists() or (partial / "train.bin").stat().st_size < 2**20:
        assert time.monotonic() < limit and process.poll() is None
        time.sleep(0.002)
    pids = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(x) for x in pids if b"spawn_main" in Path(f"/proc/{x}/cmdline").read_bytes()]
    assert len(workers) == 2
    if end == "Ctrl-C":  # reaches all the processes of a terminal
        os.killpg(process.pid, signal.SIGINT)
    else:
        number = signal.SIGTERM if end == "terminated" else signal.SIGKILL
        os.kill(workers[0] if end == "a worker killed" else process.pid, number)
    printed = process.communicate(timeout=60)[0]
    assert process.returncode == {
        "killed": -signal.SIGKILL, "a worker killed": 2}.get(end, 130), printed
    assert "Traceback" not in printed and not (out / "x-bytes").exists()
    if end != "killed":
        words = "fewer --jobs" if end == "a worker killed" else "interrupted; the same command goes"
        assert words in printed.splitlines()[-1] and "leaked" not in printed
    for pid in workers:
        while Path(f"/proc/{pid}/stat").exists() and (
            Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"):
            assert time.monotonic() < limit
            time.sleep(0.01)
    before = json.loads((partial / "meta.json").read_text())["source"]["shares"]
    process = start(path, out, 2)
    assert process.communicate(timeout=60) and process.returncode == 0 and before > 0
    assert "".join(content(out / "x-bytes")) == text


@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
@pytest.mark.parametrize("megabytes", [30, pytest.param(300, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_text(megabytes, tmp_path):
    """In memory the text would take four bytes a character."""
    line, text = rows(TEXT[:900]).encode(), TEXT.encode()
    with open(tmp_path / "a.jsonl", "wb") as a, open(tmp_path / "b.txt", "wb") as b:
        for _ in range(megabytes):
            a.write(line * (10**6 // 3 // len(line)))
            b.write(text * (10**6 // len(text)))
    process = start(tmp_path, tmp_path / "out", 2, "RLIMIT_DATA", MEMORY, 2**23)
    printed = process.communicate(timeout=300)[0]
    assert process.returncode == 0, printed
    made = json.loads(next(tmp_path.glob("out/*/meta.json")).read_text())
    assert made["train"]["tokens"] + made["val"]["tokens"] > megabytes * 12 * 10**5
