"""What a user may get wrong: one sentence with the noun, and exit code 2. The readers of data,
records and logs have tests of their own; here a command of each meets a file or two."""

import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from runs.checkpoint import pack, unpack
from tests.conftest import ROOT

PROGRAMS = {
    "main": "main", "prepare": "data.prepare", "benchmark": "scripts.benchmark.__main__",
    **{name: f"scripts.{name}" for name in ("plot", "reproduce", "scaling", "experiments")},
}  # fmt: skip
SMALL = "--cpu --depth 2 --width 4 --epochs 1 --train_bs 2 --out {tmp}/out"
DIGITS = f"main --dataset digits {SMALL} --train_bs 64 --train_examples 128 --test_examples 64"
ON = f"{DIGITS} --epochs 3"  # goes on from `ran`
FOLDER = f"main --dataset folder:{{tmp}}/images {SMALL} --image_size 32 --workers 0"
NPZ = f"main --dataset npz:set.npz --data_dir {{tmp}} {SMALL}"
REPLAY, PLOT = "main --replay {tmp}/x.json", "plot {tmp}/x.jsonl"
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such files")


def run(command, tmp):
    """The exit code of a command, run in this process."""
    name, *words = shlex.split(command.format(tmp=tmp))
    try:
        return importlib.import_module(PROGRAMS[name]).main(words) or 0
    except SystemExit as end:
        return end.code


@pytest.fixture
def check(tmp_path, capfd, monkeypatch):
    """f(command, noun, code=2): run it; it ends with that code and one sentence with the noun."""
    monkeypatch.delenv("IMAGENET_PATH", raising=False)

    def check(command, noun, code=2):
        capfd.readouterr()
        ended = run(command, tmp_path)
        out, message = capfd.readouterr()
        assert ended == code, message
        assert "Traceback" not in out + message and not (tmp_path / "canary").exists()
        if code == 0:
            assert "error" not in message
            return
        message = re.sub(r"\n +python [\w. -]+ --help lists the flags\n$", "\n", message)
        *before, sentence = message.replace(str(tmp_path), "TMP").strip().splitlines()
        assert sentence.startswith("error: ") and len(sentence) <= 400, sentence
        assert noun in sentence
        assert all(line.startswith("Looking through") for line in before), message

    return check


def table(*cases):
    """Parameters of cases (..., noun, ...), whose nouns are their ids."""
    return [pytest.param(*case, id=f"{i}: {case[1]}"[:60]) for i, case in enumerate(cases)]


FLAGS = f"""
{DIGITS} --widht 3                              | did you mean --width
{DIGITS} --epoch 3                              | did you mean --epochs
{DIGITS} --trainbs=3                            | did you mean --train_bs
main digits                                     | no place for digits
main --epochs                                   | --epochs: expected one argument
main --epochs 0                                 | '0' is not a whole number from 1
main --epochs {"9" * 5000}                      | --epochs
main --train_bs 1.5                             | '1.5' is not a whole number
main --depth 1000000000                         | from 2 to 10000
main --seed 10000000000000000000                | --seed
main --gain nan                                 | finite
main --optimizer sgd --lr 1e39                  | from 0 to 1e+30
main --arch resnet                              | did you mean resnet
main --dataset CIFAR-10                         | did you mean cifar10
main --dataset folder:                          | folder:PATH
main --optimizer nowhere.Class --dataset digits | nowhere
main --optimizer os.system --cpu                | no optimiser
main --optimizer torch.optim.LBFGS --cpu        | several passes a step
{DIGITS} --optimizer torch.optim.Optimizer      | does not take these weights
main --optimizer .SGD --cpu                     | no optimiser
main --optimizer agd.AGD --cpu                  | --optimizer agd
main --optimizer agd.SpectralAGD                | --optimizer spectral
main --precision fp16                           | fp32, tf32, bf16
main --cpu --precision tf32                     | Ampere
main --lr 0.1                                   | AGD has no learning rate
main --optimizer spectral --lr 0.1              | SpectralAGD has no learning rate
main --optimizer adam --gain 2                  | --lr
main --cpu --device cuda                        | --cpu contradicts
main --device cuda:99                           | cuda:99
main --device meta                              | meta
main --image_size 64                            | folder:PATH
main --cpu --cuda_graph on                      | it takes a CUDA device
main --cuda_graph yes                           | auto, on, off
main --dataset folder:/x --train_examples 9     | prepared sets
main --save_every 0                             | neither a number of steps
main --save_every 1e400h                        | neither a number of steps
main --distribute --dataset digits              | torchrun
{DIGITS} --depth 3 --width 1000000              | its weights are 4.0 TB
main --dataset imagenet --data_dir {{tmp}}/none | no
{DIGITS} --out {{tmp}}/{"x" * 256}              | choose --out
{FOLDER}                                        | there is no folder
{NPZ}                                           | there is no
main --replay {{tmp}}/no.json                   | no.json
plot                                            | required: RUN
prepare                                         | required
prepare cifar11                                 | cifar11
prepare imagenet --data_dir {{tmp}} --from {{tmp}}/no       | there is no folder
reproduce fig1 --runs 99999 --out {{tmp}}       | the list has the numbers
benchmark step --device gpu                     | no device 'gpu'
experiments half                                | half
"""
FLAGS = [[x.strip() for x in line.split("|")] for line in FLAGS.strip().splitlines()]
FLAGS += [(f"{name} nonsense --nonsense", "nonsense") for name in PROGRAMS]


@pytest.mark.parametrize(("command", "noun"), table(*FLAGS))
def test_bad_flags(command, noun, check):
    check(command, noun)


def test_batches_of_exabytes_are_no_fault(check):
    check(f"{DIGITS} --train_bs {2**62} --test_bs {2**62}", "", 0)


# Files and folders: what is laid there, f(tmp).


def text(name, content=b"some text\n"):
    def write(tmp):
        path = tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return write


def images(*names, content=b"no image"):
    """Images of two classes, then files of `content` with these names in train/."""
    def write(tmp):
        for split in ("train", "val"):
            for name in ("cat", "dog"):
                folder = tmp / "images" / split / name
                folder.mkdir(parents=True)
                Image.new("RGB", (40, 40), (90, 80, 70)).save(folder / "0.jpg")
        for name in names:
            text(f"images/train/{name}", content)(tmp)

    return write


def npz(tmp, **arrays):
    """set.npz as it should be, with these arrays in it."""
    for split in ("train", "test"):
        arrays.setdefault(f"{split}_images", np.zeros((8, 8, 8, 1), np.uint8))
        arrays.setdefault(f"{split}_labels", np.arange(8) % 2)
    np.savez(tmp / "set.npz", **arrays)


FIRST = b'{"kind": "run", "flags": {}, "settings": {}}\n'
PREPARE = "prepare cifar10 --data_dir {tmp}"
PLACES = table(
    ("main --dataset cifar10 --data_dir {tmp}/file", "cifar10", text("file")),
    (f"{DIGITS} --out {{tmp}}/file", "choose --out", text("file")),
    (f"{DIGITS} --out {{tmp}}/file/x", "choose --out", text("file")),
    (DIGITS, "choose --out", text("out/logs")),
    (f"{DIGITS} --profile", "--profile", text("out/profiles")),
    (FOLDER, "there is no folder", text("images")),
    (FOLDER, "ant", images("ant/notes.txt")),
    (FOLDER, "cow", lambda tmp: [images()(tmp), text("images/val/cow/0.jpg")(tmp)]),
    (FOLDER, "x.jpg cannot be decoded", images("cat/x.jpg")),
    (f"{FOLDER} --skip_bad_images", "none of the 2 images", images("cat/0.jpg", "dog/0.jpg")),
    (NPZ, "set.npz is damaged", text("set.npz")),
    (NPZ, "train_labels", lambda tmp: npz(tmp, train_labels=np.array([{}] * 8, object))),
    (REPLAY, "x.json", text("x.json")),
    (PLOT, "no finished epoch", text("x.jsonl", FIRST)),
    (PLOT, "line 2 has no", text("x.jsonl", FIRST + b'{"kind": "epoch", "epoch": 1}\n')),
    (f"{PREPARE} --from {{tmp}}/x.tar.gz", "is not the whole", text("x.tar.gz")),
    (f"{PREPARE} --from {{tmp}}/set.npz", "damaged or another", npz),
    (f"{PREPARE}/file --from {{tmp}}/set.npz", "could not be prepared",
     lambda tmp: [npz(tmp), text("file")(tmp)]),
    ("prepare imagenet --data_dir {tmp} --from {tmp}/images", "2 class folders", images()),
    ("reproduce fig1 --out {tmp}/file", "is a file", text("file")),
    ("reproduce fig1 --runs 0 --out {tmp}/file/x", "file/x", text("file")),
)  # fmt: skip


@pytest.mark.parametrize(("command", "noun", "prepare"), PLACES)
def test_bad_files_and_folders(command, noun, prepare, check, tmp_path):
    prepare(tmp_path)
    check(command, noun)


@posix
def test_links_forbidden_folders_and_odd_names(check, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    check(f"{DIGITS} --out {{tmp}}/link", "choose --out")
    if os.geteuid():  # nothing is forbidden to root
        (tmp_path / "shut").mkdir(0o500)
        check(f"{DIGITS} --out {{tmp}}/shut/out", "choose --out")
    if sys.platform == "linux":  # file names are UTF-8 elsewhere
        images(os.fsdecode(b"cat/\xff\xfe.jpg"))(tmp_path)
        check(FOLDER, "\\udcff\\udcfe.jpg cannot be decoded")


# Files of an earlier run: `change` gets the content, or the path of the file.


@pytest.fixture(scope="session")
def ran(tmp_path_factory):
    """The folder of a run of two epochs."""
    tmp = tmp_path_factory.mktemp("ran")
    assert run(f"{DIGITS} --epochs 2", tmp) == 0
    return tmp / "out"


@pytest.fixture
def out(ran, tmp_path):
    return shutil.copytree(ran, tmp_path / "out")


def first(out, pattern):
    return next(out.rglob(pattern))


def checkpoints(out, change):
    """Replace the content of both checkpoints by change(content)."""
    for path in (out / "checkpoints").glob("*.pt*"):
        path.write_bytes(pack(change(unpack(path.read_bytes()))))


CHECKPOINTS = table(
    (lambda x: x["net"], "no checkpoint"),
    (lambda x: [1, 2], "no checkpoint"),
    *(({key: value}, "no checkpoint") for key, value in (
        ("epoch", -1), ("epoch", True), ("epoch", 10**18), ("step", "3"), ("settings", "{"),
        ("settings", "[1]"))),
    ({"epoch": 7}, "lacks epochs"),
    ({"step": 9}, "step 9 of 2"),
    ({"step": 1}, "step 1 and no totals"),
    *(({key: value}, "another network or optimiser") for key, value in (
        ("optimizer", {}), ("net", 3), ("seconds", "many"), ("seconds", float("nan")),
        ("micro_bs", "x"), ("micro_bs", [None, 0]), ("missing", 1e400), ("generators", "x"),
        ("not_finite", ["ab"]), ("totals", {}), ("bad_images", "["))),
)  # fmt: skip


@pytest.mark.parametrize(("change", "noun"), CHECKPOINTS)
def test_bad_checkpoints(change, noun, check, out):
    checkpoints(out, change if callable(change) else lambda content: content | change)
    check(ON, noun)


class Canary:
    """Its pickle writes a file where it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_checkpoints_that_are_cut_or_programs(check, out, tmp_path):
    paths, canary = list((out / "checkpoints").glob("*.pt*")), Canary(f"{tmp_path}/canary")
    for path in paths:
        path.write_bytes(path.read_bytes()[:-100])
    check(ON, "--fresh")
    for path, data in zip(paths, (pack({"epoch": 1, "net": canary}), pickle.dumps(canary))):
        path.write_bytes(data)
    check(ON, "--fresh")


def test_a_checkpoint_of_another_network(check, out, tmp_path):
    """The settings are made to agree: what is left to differ is the network itself."""
    assert run(f"{DIGITS} --width 5 --out {{tmp}}/wide", tmp_path) == 0
    wide = unpack(first(tmp_path / "wide", "*.pt").read_bytes())
    checkpoints(out, lambda content: wide | {"settings": content["settings"]})
    check(ON, "another network")


@pytest.mark.parametrize("pattern, code", [("*.pt", 0), ("*.jsonl", 2)])
@pytest.mark.parametrize("put", [pytest.param(os.mkfifo, marks=posix), os.mkdir])
def test_a_pipe_or_a_folder_for_a_file(put, pattern, code, check, out):
    """A checkpoint that cannot be read is set aside for the one before."""
    path = first(out, pattern)
    path.unlink()
    put(path)
    check(ON, "no log of a run", code)


def at(i, old, new):
    """The lines of a log, with a word of line `i` replaced."""
    return lambda x: [*x[:i], x[i].replace(old.encode(), new.encode()), *x[i + 1 :]]


def row(**changes):
    """The lines of a log, in which the row of the first epoch is changed."""
    return lambda x: [x[0], json.dumps(json.loads(x[1]) | changes).encode() + b"\n", *x[2:]]


LOGS = table(
    (lambda x: [bytes(range(256)) * 9], "--fresh"),
    *((lambda x, line=line: [line, *x[1:]], "no log of a run") for line in (
        b'{"level": "info"}\n', b"1\n2\n", b"[" * 100_000 + b"\n", b"")),
    (at(0, '"settings"', '"x"'), "line 1 has no settings"),
    (lambda x: [x[0], x[1][:20] + b"\n", *x[2:]], "line 2"),
    (at(1, '"seconds"', '"x"'), "line 2 has no seconds"),
    (lambda x: [x[0], *x[2:]], "lacks epochs"),
    (at(0, '"seed": 0', '"seed": 7'), "seed 7 then, 0 now"),
    (at(3, '"stopped": null', '"stopped": []'), "for stopped"),
    *((row(**{key: value}), f"for {key}") for key, value in (
        ("epoch", None), ("epoch", 0), ("train_loss", "small"), ("test_acc", None),
        ("eta_min", {}))),
    (row(kind=3), "line 2 is no row"),
)  # fmt: skip


@pytest.mark.parametrize(("change", "noun"), LOGS)
def test_bad_logs(change, noun, check, out):
    path = first(out, "*.jsonl")
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    check(ON, noun)


def test_a_log_whose_last_line_is_torn_is_no_fault(check, out):
    path = first(out, "*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    check(ON, "", 0)


def test_a_log_or_a_record_in_another_place(check, ran, tmp_path):
    rows, record = first(ran, "*.jsonl").read_bytes(), first(ran, "*.run.json").read_text()
    for content, flags, noun in (
        (rows.decode(), "", "x.json"), (record, "--epochs 3", "--epochs"),
        (record.replace('"depth": 2', '"depth": "two"'), "", "argument --depth: 'two'"),
    ):  # fmt: skip
        (tmp_path / "x.json").write_text(content)
        check(f"{REPLAY} {flags}", noun)
    (tmp_path / "x.jsonl").write_bytes(rows)
    check(f"{PLOT} -o {{tmp}}/no/x.png", "x.png")


@pytest.mark.parametrize("words", [("main.py", "digits"), ("-m", "scripts.experiments", "half")])
def test_a_process_ends_with_that_code(words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
