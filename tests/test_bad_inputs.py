"""What a user may get wrong: one sentence with the noun, and exit code 2."""

import importlib
import json
import os
import pickle
import re
import shlex
import shutil
import struct
import subprocess
import sys
import zipfile
import zlib

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
REPLAY = "main --replay {tmp}/x.json"
CLASSES = ("cat", "dog")
posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such files")
no_root = pytest.mark.skipif(
    os.name != "posix" or os.geteuid() == 0, reason="nothing is forbidden to root"
)
linux = pytest.mark.skipif(sys.platform != "linux", reason="file names are UTF-8 here")


def run(command, tmp):
    """The exit code of a command, run in this process."""
    name, *words = shlex.split(command.format(tmp=tmp))
    try:
        return importlib.import_module(PROGRAMS[name]).main(words) or 0
    except SystemExit as end:
        if isinstance(end.code, str):  # as the interpreter does
            print(end.code, file=sys.stderr)
            return 1
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


def rows(cases, *marked):
    """Parameters of cases and of (mark, case, ...); ids are their last words."""
    cases = [(case, ()) for case in cases]
    cases += [(case, mark) for mark, *more in marked for case in more]
    return [pytest.param(*case, marks=mark, id=f"{i}: {case[1]}"[:60])
            for i, (case, mark) in enumerate(cases)]  # fmt: skip


FLAGS = f"""
{DIGITS} --widht 3                              | did you mean --width
{DIGITS} --epoch 3                              | did you mean --epochs
{DIGITS} --trainbs=3                            | did you mean --train_bs
main digits                                     | no place for digits
main --epochs                                   | --epochs: expected one argument
main --epochs 0                                 | '0' is not a whole number from 1
main --epochs many                              | 'many' is not a whole number
main --epochs {"9" * 5000}                      | --epochs
main --train_bs 1.5                             | '1.5' is not a whole number
main --test_bs -8                               | --test_bs: '-8' is not a whole number
main --depth 1                                  | whole number from 2
main --depth 1000000000                         | from 2 to 10000
main --workers 1000000000                       | from 0 to 1024
main --seed 10000000000000000000                | --seed
main --gain nan                                 | finite
main --gain -1                                  | from 0
main --optimizer sgd --lr 1e39                  | from 0 to 1e+30
main --optimizer sgd --lr inf                   | finite
main --arch resnet                              | did you mean resnet
main --dataset cifar                            | did you mean cifar10
main --dataset CIFAR-10                         | did you mean cifar10
main --dataset folders:/x                       | did you mean folder:
main --dataset folder:                          | folder:PATH
main --loss mes                                 | did you mean mse
main --optimizer adm                            | did you mean adam
main --optimizer nowhere.Class --dataset digits | nowhere
main --optimizer torch.optim.Adm --cpu          | mean Adam
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
main --device gpu                               | gpu
main --device cuda:99                           | cuda:99
main --device meta                              | meta
main --image_size 64                            | folder:PATH
main --cpu --cuda_graph on                      | it takes a CUDA device
main --cuda_graph yes                           | auto, on, off
main --dataset folder:/x --train_examples 9     | prepared sets
main --log_steps 0                              | --log_steps
main --save_every 0                             | neither a number of steps
main --save_every often                         | neither a number of steps
main --save_every=-5m                           | neither a number of steps
main --save_every nanm                          | neither a number of steps
main --save_every 1e400h                        | neither a number of steps
main --distribute --dataset digits              | torchrun
{DIGITS} --train_examples 99999                 | not 99999
{DIGITS} --depth 3 --width 1000000              | does not fit
main --dataset imagenet --data_dir {{tmp}}/none | no
{DIGITS} --out {{tmp}}/{"x" * 256}              | choose --out
{FOLDER}                                        | there is no folder
{NPZ}                                           | there is no
main --replay {{tmp}}/no.json                   | no.json
main --replay {{tmp}}                           | TMP
plot                                            | required: RUN
plot {{tmp}}/no.jsonl                           | no.jsonl is no log
plot x.jsonl -o {{tmp}}/x.gif                   | .png, .pdf or .svg
prepare                                         | required
prepare cifar11                                 | cifar11
prepare cifar10 --resize 64                     | --resize is for
prepare cifar10 --data_dir {{tmp}} --from {{tmp}}/no.tar.gz | there is no
prepare imagenet --data_dir {{tmp}} --from {{tmp}}/no       | there is no folder
reproduce                                       | required: FIGURE
reproduce fig9                                  | fig9
reproduce fig1 --time_limit soon                | 'soon' is no time
reproduce fig1 --runs 1,-                       | are no numbers
reproduce fig1 --runs a,b                       | no run of that name
reproduce fig1 --runs 99999 --out {{tmp}}       | the list has the numbers
benchmark step --device gpu                     | no device 'gpu'
benchmark step --repeats 0                      | whole number from 1
experiments half                                | half
"""
FLAGS = [[x.strip() for x in line.split("|")] for line in FLAGS.strip().splitlines()]
FLAGS += [(f"{name} nonsense --nonsense", "nonsense") for name in PROGRAMS]


@pytest.mark.parametrize(("command", "noun"), rows(FLAGS))
def test_bad_flags(command, noun, check):
    check(command, noun)


def test_batches_of_exabytes_are_no_fault(check):
    check(f"{DIGITS} --train_bs {2**62} --test_bs {2**62}", "", 0)


# Files and folders: what is laid there, f(tmp).


def text(name, content="some text\n"):
    def write(tmp):
        path = tmp / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def both(*prepares):
    return lambda tmp: [prepare(tmp) for prepare in prepares]


def images(tmp, splits=("train", "val"), classes=CLASSES):
    for split in splits:
        for name in classes:
            folder = tmp / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(2):
                Image.new("RGB", (40, 40), (90 * i, 80, 70)).save(folder / f"{i}.jpg")


def changed(change):
    """Images, after a change to the folder of a class in train/."""
    return both(images, lambda tmp: change(tmp / "images" / "train" / "cat"))


def bomb(folder):
    """A PNG of 0.2 kB that claims 30,000 x 30,000 pixels."""

    def chunk(kind, content):
        checksum = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + checksum

    head = struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    png = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(90_001))) + chunk(b"IEND", b"")
    (folder / "0.png").write_bytes(b"\x89PNG\r\n\x1a\n" + png)


def renamed(folder):
    return (folder / "0.jpg").rename(folder / os.fsdecode(b"\xff\xfe.jpg"))


def npz(without=(), **arrays):
    """set.npz as it should be, but for some arrays."""

    def write(tmp):
        of = {}
        for split, n in (("train", 8), ("test", 4)):
            of[f"{split}_images"] = np.zeros((n, 8, 8, 1), np.uint8)
            of[f"{split}_labels"] = np.arange(n) % 2
        np.savez(tmp / "set.npz", **{k: x for k, x in (of | arrays).items() if k not in without})

    return write


def cut(tmp):
    npz()(tmp)
    (tmp / "set.npz").write_bytes((tmp / "set.npz").read_bytes()[:-300])


def huge(tmp):
    """An array of a few bytes whose header claims a terabyte."""
    npz(["train_images"])(tmp)
    shape = f"{{'descr': '|u1', 'fortran_order': False, 'shape': ({10**9}, 32, 32, 1), }}"
    head = b"\x93NUMPY\1\0" + struct.pack("<H", len(shape) + 1) + shape.encode() + b"\n"
    with zipfile.ZipFile(tmp / "set.npz", "a") as archive:
        archive.writestr("train_images.npy", head + bytes(64))


def as_image(make):
    """Images, of which one more is what `make(path)` puts there."""
    return changed(lambda folder: make(folder / "x.jpg"))


FIRST = b'{"kind": "run", "flags": {}, "settings": {}}\n'
PLOT, PREPARE = "plot {tmp}/x.jsonl", "prepare cifar10 --data_dir {tmp} --from {tmp}/"
NO_RECORD = ["some text\n", b"\xff\0" * 9, '{"name": [1, 2]}', "[1, 2]", "[" * 100_000]
PLACES = rows(
    [
        ("main --dataset cifar10 --data_dir {tmp}/file", "cifar10", text("file")),
        (f"{DIGITS} --out {{tmp}}/file", "choose --out", text("file")),
        (f"{DIGITS} --out {{tmp}}/file/x", "choose --out", text("file")),
        (DIGITS, "choose --out", text("out/logs")),
        (f"{DIGITS} --profile", "--profile", text("out/profiles")),
        (FOLDER, "there is no folder", text("images")),
        (FOLDER, "train", lambda tmp: images(tmp, ["val"])),
        (FOLDER, "val", lambda tmp: images(tmp, ["train"])),
        (FOLDER, "ant", changed(lambda folder: (folder.parent / "ant").mkdir())),
        (FOLDER, "only class", lambda tmp: images(tmp, classes=["cat"])),
        (FOLDER, "no folders", both(lambda x: images(x, ["val"]), text("images/train/x.jpg"))),
        (FOLDER, "cat, cow", changed(lambda folder: folder.rename(folder.with_name("cow")))),
        (FOLDER, "x.jpg cannot be decoded", as_image(lambda path: path.write_text("no image"))),
        (FOLDER, "x.jpg cannot be decoded", as_image(lambda path: path.write_text(""))),
        (FOLDER, "x.jpg cannot be decoded",
         as_image(lambda x: x.write_bytes(x.with_name("1.jpg").read_bytes()[:400]))),
        (FOLDER, "0.png cannot be decoded", changed(bomb)),
        (f"{FOLDER} --skip_bad_images", "none of the 4 images",
         both(images, *(text(f"images/train/{c}/{i}.jpg") for c in CLASSES for i in range(2)))),
        (NPZ, "set.npz is damaged", text("set.npz")),
        (NPZ, "set.npz is damaged", text("set.npz", "")),
        (NPZ, "set.npz is damaged", lambda tmp: (tmp / "set.npz").mkdir()),
        (NPZ, "set.npz is damaged", cut),
        (NPZ, "train_images", huge),
        (NPZ, "train_labels", npz(["train_labels"])),
        (NPZ, "train_labels", npz(train_labels=np.array([{}] * 8, object))),
        (NPZ, "train_labels", npz(train_labels=np.arange(5) % 2)),
        (NPZ, "train_labels", npz(train_labels=np.arange(8) % 2 - 1)),
        (NPZ, "train_labels", npz(train_labels=np.zeros(8, np.int64))),
        (NPZ, "test_labels", npz(test_labels=np.arange(4))),
        (NPZ, "train_images", npz(train_images=np.zeros((8, 8, 8, 1)))),
        (NPZ, "train_images", npz(train_images=np.zeros((8, 8, 8), np.uint8))),
        (NPZ, "train_images", npz(train_images=np.zeros((0, 8, 8, 1), np.uint8),
                                  train_labels=np.zeros(0, np.int64))),
        (NPZ, "test_images", npz(test_images=np.zeros((4, 9, 9, 1), np.uint8))),
        *((REPLAY, "x.json", text("x.json", content)) for content in NO_RECORD),
        (PLOT, "no log", text("x.jsonl")),
        (PLOT, "no finished epoch", text("x.jsonl", FIRST)),
        (PLOT, "line 2 has no", text("x.jsonl", FIRST + b'{"kind": "epoch", "epoch": 1}\n')),
        (f"{PREPARE}x.tar.gz", "is not the whole", text("x.tar.gz")),
        (f"{PREPARE}set.npz", "damaged or another", npz()),
        ("prepare cifar10 --data_dir {tmp}/file --from {tmp}/set.npz", "could not be prepared",
         both(npz(), text("file"))),
        ("prepare imagenet --data_dir {tmp} --from {tmp}/images", "2 class folders", images),
        ("reproduce fig1 --out {tmp}/file", "is a file", text("file")),
        ("reproduce fig1 --runs 0 --out {tmp}/file/x", "file/x", text("file")),
    ],
    (posix, (f"{DIGITS} --out {{tmp}}/link", "choose --out",
             lambda tmp: (tmp / "link").symlink_to(tmp / "gone")),
     (FOLDER, "again is a link",
      changed(lambda folder: (folder / "again").symlink_to(folder, target_is_directory=True))),
     (FOLDER, "x.jpg cannot be decoded", as_image(lambda path: path.symlink_to("x.jpg"))),
     (FOLDER, "x.jpg cannot be decoded", as_image(lambda path: path.symlink_to("gone"))),
     (FOLDER, "x.jpg cannot be decoded", as_image(os.mkfifo)),
     (NPZ, "set.npz is damaged", lambda tmp: os.mkfifo(tmp / "set.npz")),
     (REPLAY, "x.json", lambda tmp: os.mkfifo(tmp / "x.json"))),
    (no_root, (f"{DIGITS} --out {{tmp}}/shut/out", "choose --out",
               lambda tmp: (tmp / "shut").mkdir(0o500)),
     (FOLDER, "cannot be read", changed(lambda folder: folder.chmod(0)))),
    (linux, (FOLDER, "\\udcff\\udcfe.jpg cannot be decoded",
             changed(lambda folder: renamed(folder).write_text("")))),
)  # fmt: skip


@pytest.mark.parametrize(("command", "noun", "prepare"), PLACES)
def test_bad_files_and_folders(command, noun, prepare, check, tmp_path):
    prepare(tmp_path)
    check(command, noun)


@pytest.mark.parametrize("change", [
    lambda folder: (folder / "x.jpg").mkdir(), pytest.param(renamed, marks=linux),
], ids=["a folder called x.jpg", "a name that is not UTF-8"])  # fmt: skip
def test_odd_names_are_no_fault(change, check, tmp_path):
    changed(change)(tmp_path)
    check(FOLDER, "", 0)


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


CHECKPOINTS = rows([
    (lambda x: x["net"], "no checkpoint"),
    (lambda x: [1, 2], "no checkpoint"),
    ({"epoch": -1}, "no checkpoint"),
    ({"epoch": True}, "no checkpoint"),
    ({"step": "3"}, "no checkpoint"),
    ({"settings": "{"}, "no checkpoint"),
    ({"settings": "[1]"}, "no checkpoint"),
    ({"epoch": 10**18}, "no checkpoint"),
    ({"epoch": 7}, "lacks epochs"),
    ({"step": 9}, "step 9 of 2"),
    ({"step": 1}, "step 1 and no totals"),
    (lambda x: x | {"settings": x["settings"].replace('"seed": 0', '"seed": 7')},
     "seed 7 then, 0 now"),
    *(({key: value}, "another network or optimiser") for key, value in (
        ("optimizer", {}), ("net", 3), ("seconds", "many"), ("seconds", float("nan")),
        ("micro_bs", "x"), ("micro_bs", [None, 0]), ("missing", 1e400), ("generators", "x"),
        ("not_finite", ["ab"]), ("totals", {}), ("bad_images", "["),
    )),
])  # fmt: skip


@pytest.mark.parametrize(("change", "noun"), CHECKPOINTS)
def test_bad_checkpoints(change, noun, check, out):
    for path in (out / "checkpoints").glob("*.pt*"):
        content = unpack(path.read_bytes())
        path.write_bytes(pack(change(content) if callable(change) else content | change))
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
    for path in (out / "checkpoints").glob("*.pt*"):
        path.write_bytes(pack(wide | {"settings": unpack(path.read_bytes())["settings"]}))
    check(ON, "another network")


@pytest.mark.parametrize("pattern, code", [("*.pt", 0), ("*.jsonl", 2)])
@pytest.mark.parametrize("put", [pytest.param(os.mkfifo, marks=posix), os.mkdir])
def test_a_pipe_or_a_folder_for_a_file(put, pattern, code, check, out):
    """A checkpoint that cannot be read is set aside for the one before."""
    path = first(out, pattern)
    path.unlink()
    put(path)
    check(ON, "no log of a run", code)


def row(**changes):
    """The lines of a log, in which the row of the first epoch is changed."""
    return lambda x: [x[0], json.dumps(json.loads(x[1]) | changes).encode() + b"\n", *x[2:]]


LOGS = rows([
    (lambda x: [bytes(range(256)) * 9], "--fresh"),
    (lambda x: [b'{"level": "info"}\n'], "no log of a run"),
    (lambda x: [b"1\n", b"2\n"], "no log of a run"),
    (lambda x: [b"[" * 100_000 + b"\n"], "no log of a run"),
    (lambda x: x[1:], "no log of a run"),
    (lambda x: [x[0].replace(b'"settings"', b'"x"'), *x[1:]], "line 1 has no settings"),
    (lambda x: [x[0], x[1][:20] + b"\n", *x[2:]], "line 2"),
    (lambda x: [x[0], x[1].replace(b'"seconds"', b'"x"'), *x[2:]], "line 2 has no seconds"),
    (lambda x: [x[0], *x[2:]], "lacks epochs"),
    (lambda x: [x[0].replace(b'"seed": 0', b'"seed": 7'), *x[1:]], "seed 7 then, 0 now"),
    (lambda x: [*x[:-1], x[-1].replace(b'"stopped": null', b'"stopped": []')], "for stopped"),
    (row(epoch=None), "for epoch"),
    (row(epoch=0), "for epoch"),
    (row(train_loss="small"), "for train_loss"),
    (row(test_acc=None), "for test_acc"),
    (row(eta_min={}), "for eta_min"),
    (row(kind=3), "line 2 is no row"),
])  # fmt: skip


@pytest.mark.parametrize(("change", "noun"), LOGS)
def test_bad_logs(change, noun, check, out):
    path = first(out, "*.jsonl")
    path.write_bytes(b"".join(change(path.read_bytes().splitlines(keepends=True))))
    check(ON, noun)


def test_a_log_whose_last_line_is_torn_is_no_fault(check, out):
    path = first(out, "*.jsonl")
    path.write_bytes(path.read_bytes()[:-20])
    check(ON, "", 0)


def test_a_run_that_is_going_on(check, out):
    fcntl = pytest.importorskip("fcntl")
    with open(first(out, "*.lock")) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        check(ON, "another process")


def test_a_log_or_a_record_in_another_place(check, ran, tmp_path):
    rows, record = first(ran, "*.jsonl").read_bytes(), first(ran, "*.run.json").read_text()
    (tmp_path / "x.json").write_bytes(rows)
    check(REPLAY, "x.json")
    (tmp_path / "x.json").write_text(record)
    check(f"{REPLAY} --epochs 3", "--epochs")
    (tmp_path / "x.json").write_text(record.replace('"depth": 2', '"depth": "two"'))
    check(REPLAY, "argument --depth: 'two'")
    (tmp_path / "x.jsonl").write_bytes(FIRST + rows.split(b"\n", 1)[1])
    check(PLOT, "does not say its --arch")
    (tmp_path / "x.jsonl").write_bytes(rows)
    check(f"{PLOT} -o {{tmp}}/no/x.png", "x.png")


@pytest.mark.parametrize("words", [("main.py", "digits"), ("-m", "scripts.experiments", "half")])
def test_a_process_ends_with_that_code(words):
    done = subprocess.run([sys.executable, *words], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
