"""Data that was damaged, or made to do harm: it works, or it is refused in one sentence."""

import gzip
import hashlib
import io
import os
import pickle
import resource
import struct
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.arrays
import data.prepare
from cli import printable
from data import DataError, load
from data.arrays import KEYS, load_arrays
from data.folders import LONG, centre_crop, decode, list_images
from data.imagenet_layout import labels_of
from data.prepare import MNIST_MD5, prepare, unpickle

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_hang():
    """A pipe that is waited for would hold up the tests for ever."""
    done = threading.Event()

    def watch():
        if not done.wait(60):
            sys.stderr.write("a test of hostile data hangs\n")
            os._exit(70)

    threading.Thread(target=watch, daemon=True).start()
    yield
    done.set()


# Prepared files


def arrays(**changed):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    found = {key: images if "images" in key else np.arange(12) % 3 for key in KEYS}
    return {**found, **changed}


def npy(array, header=None):
    """The bytes of an .npy, with the text of its header if one is given."""
    made = io.BytesIO()
    np.lib.format.write_array(made, np.asarray(array), allow_pickle=True)
    content = made.getvalue()
    if header is None:
        return content
    length = struct.unpack("<H", content[8:10])[0]
    text = header.encode("latin-1") + b"\n"
    return content[:8] + struct.pack("<H", len(text)) + text + content[10 + length :]


def header(descr="'|u1'", order="False", shape="(12, 8, 8, 3)"):
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}"


def write(path, contents, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(f"{name}.npy", content)


class Touch:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def forged(**headers):
    return {key: npy(x, headers.get(key)) for key, x in arrays().items()}


DEEP = "(" * 1500 + ")" * 1500
HUGE = "(1000000000, 1000, 1000, 3)"
FORGED = {  # of train_images
    "an object": (header("'|O'"), "train_images is not uint8"),
    "floats": (header("'<f4'"), "train_images is not uint8"),
    "records": (header("[('a', '|u1')]"), "no header"),
    "a huge shape": (header(shape=HUGE), "train_images has 2,304 bytes, not those of its shape"),
    "a shape beyond numbers": (header(shape=f"({'9' * 4000},)"), "train_images has"),
    "a negative shape": (header(shape="(-12, 8, 8, 3)"), "no header"),
    "more dimensions": (header(shape="(12, 8, 8, 3, 1, 1)"), "train_images is not uint8"),
    "nothing and beyond": (header(shape="(0, 99999999999999999999)"), "train_images has"),
    "code": ("__import__('os').abort()", "no header"),
    "depth": (DEEP, "no header"),
    "nothing": ("", "no header"),
    "other bytes": ("\xff\x00" * 50, "no header"),
    "endless": (header() + " " * 60000, "no header"),
}


@pytest.mark.parametrize("fault", FORGED)
def test_a_forged_header_is_refused(fault, tmp_path):
    text, said = FORGED[fault]
    write(tmp_path / "mine.npz", forged(train_images=text))
    tracemalloc.start()
    with pytest.raises(DataError, match=said) as error:
        load("npz:mine.npz", tmp_path, 4, 4, CPU)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6 and "\n" not in str(error.value)


def hostile_archive(fault, path):
    """Write one, and return what is to be said of it."""
    contents = forged()
    big = 20_000_000
    if fault == "a pickle":
        objects = np.array([Touch(path.with_name("touched"))] * 12, dtype=object)
        write(path, {**contents, "train_images": npy(objects)})
        return "train_images is not uint8"
    if fault == "a missing name":
        del contents["test_labels"]
        write(path, contents)
        return "it holds no test_labels"
    if fault == "a name twice":
        write(path, contents)
        with pytest.warns(UserWarning), zipfile.ZipFile(path, "a") as archive:
            archive.writestr("train_images.npy", contents["train_images"])
        return "it holds 2 train_images"
    if fault == "a bomb":
        shape = (big // 192, 8, 8, 3)
        content = npy(np.zeros(0, np.uint8), header(shape=str(shape))) + bytes(big)
        write(path, {**contents, "train_images": content}, zipfile.ZIP_DEFLATED)
        return "are said to hold 20,"
    if fault == "another compression":
        write(path, contents, zipfile.ZIP_LZMA)
        return "compressed in a way"
    if fault == "cut inside":
        write(path, {**contents, "train_images": contents["train_images"][:500]})
        return "train_images has 372 bytes"
    if fault == "no array inside":
        write(path, {**contents, "test_labels": b"text"})
        return "test_labels is no .npy array"
    if fault == "a pipe":
        os.mkfifo(path)
        return "it is no file"
    if fault == "a folder":
        path.mkdir()
        return "it is no file"
    write(path, contents)
    raw = bytearray(path.read_bytes())
    entry = raw.index(b"PK\1\2")  # of train_images, in the list at the end
    if fault == "a longer entry":
        raw[entry + 20 : entry + 28] = struct.pack("<II", big, big)
        said = "longer than the file"
    elif fault == "encrypted":
        raw[entry + 8] |= 1
        said = "encrypted"
    elif fault == "a wrong CRC":
        raw[entry + 16] ^= 1
        said = "CRC"
    elif fault == "another way of compression":
        raw[entry + 10] = 99
        said = "compressed in a way"
    else:
        raw = raw[:-30]
        said = "not a zip file"
    path.write_bytes(raw)
    return said


@pytest.mark.parametrize("fault", [
    "a pickle", "a missing name", "a name twice", "a bomb", "another compression", "cut inside",
    "no array inside", "a pipe", "a folder", "a longer entry", "encrypted", "a wrong CRC",
    "another way of compression", "cut",
])  # fmt: skip
def test_a_forged_archive_is_refused(fault, tmp_path, monkeypatch):
    monkeypatch.setattr(data.arrays, "MODEST", 2**20)
    said = hostile_archive(fault, tmp_path / "mine.npz")
    tracemalloc.start()
    with pytest.raises(DataError, match=f"mine.npz is damaged or another.*{said}"):
        load("npz:mine.npz", tmp_path, 4, 4, CPU)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6 and not (tmp_path / "touched").exists()


@pytest.mark.parametrize("changed, said", [
    ({"train_labels": np.arange(12) % 3 - 1}, "train_labels do not run from 0 to 2"),
    ({"test_labels": np.arange(12)}, "test_labels do not run from 0 to 2"),
    ({"train_labels": np.full(12, 2**62)}, "nothing to tell apart"),
    ({"train_labels": np.zeros(12, int)}, "nothing to tell apart"),
    ({"train_labels": (np.arange(12) % 3).astype(np.int32)}, "train_labels is not int64"),
    ({"train_labels": (np.arange(12) % 3).astype(">i8")}, "train_labels is not int64"),
    ({"train_labels": (np.arange(12) % 3)[:, None]}, "train_labels is not int64"),
    ({"test_images": np.zeros((0, 8, 8, 3), np.uint8)}, "test_labels is not int64 .* an image"),
    ({"train_images": np.zeros((12, 0, 8, 3), np.uint8)}, "train_images is not uint8"),
    ({"train_images": np.uint8(3)}, "train_images is not uint8"),
    ({"train_images": np.zeros((12, 8, 8, 3), bool)}, "train_images is not uint8"),
])  # fmt: skip
def test_arrays_of_another_kind_are_refused(changed, said, tmp_path):
    np.savez(tmp_path / "mine.npz", **arrays(**changed))
    with pytest.raises(DataError, match=said):
        load("npz:mine.npz", tmp_path, 4, 4, CPU)


@pytest.mark.parametrize("way", ["savez", "savez_compressed", "fortran", "version 2", "by hand",
                                 "more in it", "bytes before"])  # fmt: skip
def test_what_others_write_is_read(way, tmp_path):
    expected, path = arrays(), tmp_path / "mine.npz"
    if way == "fortran":
        np.savez(path, **{k: np.asfortranarray(x) for k, x in expected.items()})
    elif way == "version 2":
        contents = {}
        for key, x in expected.items():
            made = io.BytesIO()
            np.lib.format.write_array(made, x, version=(2, 0))
            contents[key] = made.getvalue()
        write(path, contents)
    elif way == "by hand":  # other spaces, another order of the keys
        text = "{'shape': (12,8,8,3), 'fortran_order':False,'descr':'|u1'}"
        write(path, forged(train_images=text, test_images=text))
    elif way == "more in it":
        np.savez(path, notes=np.array(["a", "b"], object), **expected)
    else:
        getattr(np, way if "save" in way else "savez")(path, **expected)
    if way == "bytes before":  # zip allows them
        path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    found, source = load_arrays(path)
    for key, x in expected.items():
        assert found[key].dtype == x.dtype and np.array_equal(found[key], x)
        content = npy(np.asfortranarray(x) if way == "fortran" else x)
        if way.startswith("save"):
            assert source["crc32"][key] == f"{zlib.crc32(content):08x}"
    inputs = next(iter(load("npz:mine.npz", tmp_path, 4, 12, CPU).test))[0]
    np.savez(tmp_path / "plain.npz", **expected)
    assert torch.equal(inputs, next(iter(load("npz:plain.npz", tmp_path, 4, 12, CPU).test))[0])


# Folders of images


@pytest.fixture
def folder(tmp_path):
    """Two classes, two images each, in train/ and val/."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("apple", "pear"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.jpg")
    return tmp_path


def read_all(folder, **options):
    """The images that a pass over train/ yields."""
    train = load(f"folder:{folder}", "", 4, 4, CPU, image_size=32, **options).train
    return sum(len(y) for _, y in train), train.bad_images


def png(width, height):
    """A PNG that claims to be of that size."""
    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
BAD = {  # an image: what makes it, what is said of it
    "text": (lambda p: p.write_text("no image"), "not an image that PIL knows"),
    "zero bytes": (lambda p: p.write_bytes(b""), "not an image that PIL knows"),
    "cut": (lambda p: p.write_bytes((p.parent / "1.jpg").read_bytes()[:300]), "[Tt]runcated"),
    "a cut header": (lambda p: p.write_bytes(png(9, 9)[:20]), "[Tt]runcated"),
    "a link to nothing": (lambda p: p.symlink_to("nowhere"), "No such file"),
    "a link to itself": (lambda p: p.symlink_to(p), "symbolic links"),
    "a pipe": (os.mkfifo, "not a file"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "not a file"),
    "a bomb": (lambda p: p.write_bytes(png(100_000, 100_000)), "exceeds limit"),
    "no pixels": (lambda p: p.write_bytes(b"P6 0 9 255\n"), "no pixels|not an image"),
    "no columns": (lambda p: p.write_bytes(png(0, 9)), "no pixels|not an image"),
    "a program": (lambda p: p.write_bytes(POSTSCRIPT), "not an image that PIL knows"),
    "too long": (lambda p: os.truncate(os.open(p, os.O_CREAT | os.O_WRONLY), 2**40), "too many"),
}


@pytest.mark.parametrize("fault, workers", [*((f, 0) for f in BAD), ("a pipe", 1), ("text", 1)])
def test_a_bad_image_is_named_or_left_out(fault, workers, folder):
    make, said = BAD[fault]
    path = folder / "train" / "pear" / "0.jpg"
    path.unlink()
    make(path)
    with pytest.raises(DataError, match=f"pear/0.jpg cannot be decoded: .*({said})") as error:
        read_all(folder, workers=workers)
    assert "\n" not in str(error.value)
    assert read_all(folder, workers=workers, skip_bad_images=True) == (3, {str(path)})


def test_postscript_is_never_handed_to_ghostscript(tmp_path, monkeypatch):
    """PIL knows it, and would run what it finds under that name."""
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **kw: pytest.fail("it ran"))
    (tmp_path / "a.jpg").write_bytes(POSTSCRIPT)
    with pytest.raises(Exception, match="cannot identify"):
        decode(tmp_path / "a.jpg")


def spoil(fault, folder):
    train, pear = folder / "train", folder / "train" / "pear"
    if fault == "empty class":
        (train / "plum").mkdir()
    elif fault == "one class":
        for split in ("train", "val"):
            for path in (folder / split / "apple").iterdir():
                path.unlink()
            (folder / split / "apple").rmdir()
    elif fault == "no class":
        for path in (*train.glob("*/*"), *train.glob("*")):
            path.unlink() if path.is_file() else path.rmdir()
    elif fault == "no images":
        for path in pear.iterdir():
            path.rename(path.with_suffix(".txt"))
    elif fault == "a circle":
        (pear / "again").symlink_to(train)
    elif fault == "a link to itself above":
        (pear / "again").symlink_to("..")
    elif fault == "twice as many at each level":
        for i in range(40):
            (folder / f"level{i}").mkdir()
            for name in "ab":
                (folder / f"level{i}" / name).symlink_to(folder / f"level{i + 1}")
        (folder / "level40").mkdir()
        (pear / "deep").symlink_to(folder / "level0")
    elif fault == "unreadable":
        os.chmod(pear, 0)
    elif fault == "train is a file":
        train.rename(folder / "old")
        train.write_text("")


@pytest.mark.parametrize("fault, said", [
    ("empty class", "no images under .*train, .*: 1 of its 3 classes have none: plum"),
    ("one class", "no images under .*train.*: pear is its only class"),
    ("no class", "no images under .*train.*: it has no folders"),
    ("no images", "no images under .*train.*: 1 of its 2 classes have none: pear"),
    ("a circle", "pear/again/pear is a link to a folder that class pear has already"),
    ("a link to itself above", "pear is a link to a folder that class pear has already"),
    ("twice as many at each level", "link to a folder that class pear has already"),
    ("unreadable", "pear cannot be read: Permission denied"),
    ("train is a file", "there is no folder .*train"),
])  # fmt: skip
def test_a_fault_of_the_folders_is_one_sentence(fault, said, folder, monkeypatch):
    spoil(fault, folder)
    if fault == "unreadable" and os.geteuid() == 0:  # root reads all
        scandir = os.scandir

        def refuse(path):
            if Path(path) == folder / "train" / "pear":
                raise PermissionError(13, "Permission denied", path)
            return scandir(path)

        monkeypatch.setattr(os, "scandir", refuse)
    began = time.monotonic()
    with pytest.raises(DataError, match=said) as error:
        read_all(folder)
    assert "\n" not in str(error.value) and time.monotonic() - began < 30


def test_what_is_odd_but_whole_works(folder):
    """Names that are not UTF-8 or break lines, links to images, folders called as images are."""
    train, image = folder / "train", folder / "train" / "pear" / "1.jpg"
    for split in ("train", "val"):
        odd = os.fsencode(folder / split) + b"/\xff\xfe\n"
        os.mkdir(odd)
        Path(os.fsdecode(odd + b"/\xe9.jpg")).write_bytes(image.read_bytes())
    (train / "pear" / "2.jpg").symlink_to(image)
    (train / "pear" / "3.jpg").mkdir()
    (train / "pear" / "3.jpg" / "0.JPEG").write_bytes(image.read_bytes())
    (train / "apple" / "notes").symlink_to("notes")
    assert read_all(folder) == (7, set())
    assert read_all(folder, workers=1) == (7, set())
    for path in train.glob("*/*.jpg"):
        if b"\xe9" in os.fsencode(path):
            path.write_bytes(b"")
    with pytest.raises(DataError) as error:
        read_all(folder, workers=1)
    assert r"\udcff\udcfe" in str(error.value) and r"\udce9.jpg" in str(error.value)
    str(error.value).encode("ascii")
    _, bad = read_all(folder, skip_bad_images=True)
    "".join(bad).encode("ascii")


def test_the_images_are_those_of_torchvision_in_its_order(tmp_path):
    """The place in this list is what augmentation is drawn from."""
    datasets = pytest.importorskip("torchvision.datasets")
    for name in ("b/z.jpg", "b/a/x.png", "b/a.jpg", "b/a-/y.WEBP", "b/a/c/d.tiff", "b/readme.txt",
                 "a/1.jpeg", ".hidden/a.bmp", "B/10.ppm", "B/9.pgm", "b/a/c.jpg", "loose.jpg",
                 "a/x/y/z/0.tif"):  # fmt: skip
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "a" / "linked").symlink_to(tmp_path / "b" / "a")
    theirs = datasets.ImageFolder(tmp_path)
    assert list_images(tmp_path) == (theirs.classes, theirs.samples)
    assert len(theirs.samples) == 14


@pytest.mark.parametrize("shape", [(3, 4000), (4000, 3), (1, 60_000), (60_000, 1)])
def test_a_thin_image_takes_no_more_than_others(shape):
    """It used to be enlarged whole: a row of 60,000 pixels to 12 GB."""
    image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = centre_crop(image, 32)
    assert found.shape == (32, 32, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000
    if 3 in shape:  # but for the ends, the same picture
        short = min(shape)
        dim = shape.index(4000)
        middle = image.narrow(dim, 2000 - 8 * short, 16 * short)
        assert LONG == 16 and torch.equal(found, centre_crop(middle, 32))


# What is prepared


def md5(content):
    return hashlib.md5(content).hexdigest()


OFFICIAL = (  # as Python 2 wrote CIFAR's own files: 2 images in it
    b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
    b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01"
    b"\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb%sT\x00\x18\x00\x00%stb"
    b"U\x06labelsq\x08]q\x09(K\x05K\x07eU\x0bbatch_labelq\x0aU\x05batchu."
)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_original_pickles_are_read_without_unpickling(order):
    images = np.random.default_rng(0).integers(0, 256, (2, 3072), dtype=np.uint8)
    content = OFFICIAL % (b"\x88" if order == "F" else b"\x89", images.tobytes(order))
    expected = pickle.loads(content, encoding="latin-1")
    found = unpickle(content, "data_batch_1")
    assert np.array_equal(found["data"], images) and np.array_equal(expected["data"], images)
    assert found["labels"] == [5, 7] and found["batch_label"] == "batch"


@pytest.mark.parametrize("content", [
    lambda path: pickle.dumps({"data": Touch(path), "labels": [0]}),
    lambda path: b"cposix\nsystem\n(U" + bytes([6 + len(str(path))]) + b"touch " + bytes(path)
    + b"tR.",
    lambda path: b"cnumpy\nload\n(U\x01atR.",
    lambda path: b"cbuiltins\neval\n.",
    lambda path: pickle.dumps({"data": np.array([1.5]), "labels": [0]}, 4),
    lambda path: pickle.dumps({"data": np.array([Touch(path)]), "labels": [0]}, 4),
    lambda path: pickle.dumps([1, 2]),
    lambda path: (OFFICIAL % (b"\x89", bytes(6144)))[:500],
    lambda path: b"",
])  # fmt: skip
def test_a_hostile_pickle_runs_nothing(content, tmp_path, monkeypatch):
    """Also where its MD5 is made to be the official one."""
    datasets = pytest.importorskip("torchvision.datasets")
    path = tmp_path / "touched"
    content = content(path)
    with pytest.raises(DataError, match="data_batch_1 is no batch of CIFAR's"):
        unpickle(content, "data_batch_1")
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(content)
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5(content)]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["data_batch_1", md5(content)]])
    with pytest.raises(DataError, match="data_batch_1"):
        prepare("cifar10", tmp_path / "out", folder)
    assert not path.exists()


@pytest.mark.parametrize("member", ["../outside", "/tmp/agd-outside", "link", "device", "whole"])
def test_an_archive_is_never_unpacked(member, tmp_path, monkeypatch):
    datasets = pytest.importorskip("torchvision.datasets")
    images = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    batch = pickle.dumps({"data": images, "labels": [i % 10 for i in range(20)]}, 4)
    archive, data_dir = tmp_path / "cifar-10-python.tar.gz", tmp_path / "a" / "out"
    with tarfile.open(archive, "w:gz") as file:
        info = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        if member == "link":
            info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        elif member == "device":
            info.type, info.devmajor, info.devminor = tarfile.CHRTYPE, 1, 5
        else:
            info.size = len(batch)
        file.addfile(info, io.BytesIO(batch))
        if member.endswith("outside"):
            info.name = member
            file.addfile(info, io.BytesIO(batch))
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive.read_bytes()))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", md5(batch)]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["data_batch_1", md5(batch)]])
    before = set(tmp_path.rglob("*"))
    if member in ("link", "device"):
        with pytest.raises(DataError, match="data_batch_1 is missing or damaged"):
            prepare("cifar10", data_dir, archive)
    else:
        prepare("cifar10", data_dir, archive)
    assert {p.name for p in set(tmp_path.rglob("*")) - before} <= {"a", "out", "cifar10.npz"}
    assert not Path("/tmp/agd-outside").exists()


@pytest.mark.parametrize("fault", ["huge", "short", "floats", "no header", "bomb", "pipe"])
def test_a_forged_mnist_is_refused(fault, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    image = bytes([0, 0, 8, 3]) + struct.pack(">III", 20, 28, 28) + bytes(20 * 784)
    label = bytes([0, 0, 8, 1]) + struct.pack(">I", 20) + bytes(i % 10 for i in range(20))
    bad = {
        "huge": image[:4] + b"\xff" * 12 + image[16:], "short": image[:-1],
        "floats": b"\0\0\x0d" + image[3:], "no header": b"\0",
    }.get(fault, image)  # fmt: skip
    monkeypatch.setattr(data.prepare, "LARGEST", 2**20)
    for name in MNIST_MD5:
        content = label if "labels" in name else bad if name.startswith("train") else image
        monkeypatch.setitem(MNIST_MD5, name, md5(content))
        (tmp_path / name).write_bytes(content)
    first = tmp_path / "train-images-idx3-ubyte"
    if fault in ("bomb", "pipe"):
        first.unlink()
    if fault == "bomb":
        with gzip.open(f"{first}.gz", "wb") as file:
            file.write(bytes(2**26))
    elif fault == "pipe":
        os.mkfifo(first)
    tracemalloc.start()
    with pytest.raises(DataError, match="train-images-idx3-ubyte.* is "):
        prepare("mnist", tmp_path / "out", tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 2e7
    tracemalloc.stop()
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("content", [b"a,b\0\n\"" + b"x" * 200_000, b"\xff\xfe,", None])
def test_hostile_labels_of_a_flat_val_are_refused(content, tmp_path):
    path = tmp_path / "labels.csv"
    os.mkfifo(path) if content is None else path.write_bytes(content)
    with pytest.raises(DataError, match="labels.csv"):
        labels_of(tmp_path, path)


def test_what_cannot_be_printed_has_a_backslash():
    assert printable("äß 漢字 a\nb") == "äß 漢字 a\nb"
    assert str(DataError("\udcff\x1b")) == r"\udcff\x1b"
    assert printable("\x1b[2J\r\t\udcff\0") == r"\x1b[2J\r\t\udcff\x00"
