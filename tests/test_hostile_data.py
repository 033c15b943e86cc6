"""Data that was damaged, or made to do harm: it works, or it is refused in one sentence."""

import faulthandler
import gzip
import io
import os
import pickle
import resource
import shutil
import struct
import sys
import tarfile
import time
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data import DataError, load
from data.arrays import KEYS, load_arrays
from data.folders import LONG, centre_crop, list_images
from data.prepare import prepare

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_hang():
    """A pipe that is waited for would hold up the tests for ever."""
    faulthandler.dump_traceback_later(120, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()


# Prepared files


def arrays(**changed):
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), dtype=np.uint8)
    whole = {key: images if "images" in key else np.arange(12) % 3 for key in KEYS}
    return {**whole, **changed}


def npy(array, header=None, version=None):
    """The bytes of an .npy, with the text of its header if one is given."""
    made = io.BytesIO()
    np.lib.format.write_array(made, np.asarray(array), version)
    content = made.getvalue()
    if header is None:
        return content
    length = struct.unpack("<H", content[8:10])[0]
    text = header.encode("latin-1") + b"\n"
    return content[:8] + struct.pack("<H", len(text)) + text + content[10 + length :]


def header(descr="'|u1'", shape="(12, 8, 8, 3)"):
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def write(path, compression=zipfile.ZIP_STORED, **changed):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {**{key: npy(x) for key, x in arrays().items()}, **changed}.items():
            archive.writestr(f"{name}.npy", content)


class Touch:
    """Unpickled, it leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def patch(path, at, content):
    """Change bytes of train_images in the archive's list of entries, which is at its end."""
    raw = bytearray(path.read_bytes())
    start = raw.index(b"PK\1\2") + at
    raw[start : start + len(content)] = content
    path.write_bytes(raw)


def bomb(path, size=20_000_000):
    """A terabyte of zeros in few bytes, or an entry that claims to be."""
    content = npy(np.zeros(0, np.uint8), header(shape=f"({size // 192}, 8, 8, 3)")) + bytes(size)
    write(path, zipfile.ZIP_DEFLATED, train_images=content)
    patch(path, 24, struct.pack("<I", 2**32 - 2))


def cut(share):
    def make(path):
        write(path)
        os.truncate(path, int(path.stat().st_size * share))

    return make


def objects(path):
    made, array = io.BytesIO(), np.array([Touch(path.with_name("touched"))] * 12, dtype=object)
    np.lib.format.write_array(made, array)
    write(path, train_images=made.getvalue())


def forged(text):
    return lambda p: write(p, train_images=npy(arrays()["train_images"], text))


def patched(at, content):
    return lambda path: (write(path), patch(path, at, content))


def changed(**arrays_changed):
    return lambda path: np.savez(path, **arrays(**arrays_changed))


LABELS = np.arange(12) % 3
FORGED = [  # what makes the file, words of the sentence
    *((forged(text), "mine.npz") for text in (
        header("'|O'"), header("'<f4'"), header("[('a', '|u1')]"), header("'no'"),
        header(shape="(1000000000, 1000, 1000, 3)"), header(shape=f"({'9' * 4000},)"),
        header(shape="(-12, -8, 8, 3)"), header(shape="(0, 99999999999999999999)"),
        "__import__('os').abort()", "(" * 1500 + ")" * 1500, "", "\xff\x00" * 50,
        header() + " " * 60000)),
    (objects, "train_images holds Python objects"),
    (changed(train_labels=LABELS.astype(object)), "train_labels holds Python objects"),
    (lambda p: p.write_bytes(pickle.dumps(Touch(p.with_name("touched")))), "zip"),
    (lambda p: p.write_bytes(b"<html>not here</html>"), "zip"),
    (lambda p: p.write_bytes(b""), "zip"),
    (os.mkfifo, "it is no file"),
    (Path.mkdir, "it is no file"),
    (lambda p: np.savez(p, **{key: arrays()[key] for key in KEYS[:3]}), "test_labels"),
    (bomb, "are said to hold 4,294"),
    (lambda p: write(p, zipfile.ZIP_LZMA), "compressed in a way"),
    (patched(10, b"\x63"), "compressed in a way"),
    (patched(8, b"\1"), "encrypted"),
    (patched(16, b"\0\0\0\0"), "CRC"),
    (patched(20, struct.pack("<II", 10**7, 10**7)), "train_images"),
    (lambda p: write(p, train_images=npy(arrays()["train_images"])[:500]), "has 372 bytes"),
    (lambda p: write(p, test_labels=b"text"), "magic|EOF"),
    (cut(0.98), "zip"),
    (cut(0.5), "zip"),
    (changed(train_labels=LABELS - 1), "from -1 to 1, and 3 classes have .* from 0 to 2"),
    (changed(train_labels=LABELS * 2), "from 0 to 4, and 3 classes have .* from 0 to 2"),
    (changed(test_labels=np.arange(12)), "test_labels run from 0 to 11, .* from 0 to 2"),
    (changed(test_labels=LABELS - 1), "test_labels run from -1 to 1, .* from 0 to 2"),
    (changed(train_labels=np.full(12, 2**62)), "nothing to tell apart"),
    (changed(train_labels=np.arange(12, dtype=np.uint64) << 60), "not whole|from 0 to 11"),
    *((changed(train_labels=LABELS + x), "float64 .12. with values that are not whole numbers")
      for x in (0.5, np.nan, np.inf, 1e300)),
    *((changed(train_labels=x), "not a number for each of 12 images") for x in (
        LABELS[:11], np.eye(3)[LABELS], LABELS[None], LABELS[:, None, None], np.int64(1),
        LABELS.astype(str), LABELS * 1j, LABELS.astype("M8[s]"))),
    (changed(test_images=np.zeros((0, 8, 8, 3), np.uint8)), "test_images .* there is no pixel"),
    (changed(train_images=np.zeros((12, 0, 8, 3), np.uint8)), "train_images .*no pixel"),
    *((changed(train_images=np.ones(shape, dtype)), rf"train_images is {dtype} .*, not uint8 \(N")
      for shape, dtype in (((), "uint8"), ((12, 192), "uint8"), ((12, 2, 8, 8, 3), "uint8"),
                           ((12, 8, 8, 3), "bool"), ((12, 8, 8, 3), "float32"),
                           ((12, 8, 8), "uint16"), ((12, 3, 8, 8), "float64"))),
    (changed(test_images=np.ones((12, 8, 8), np.uint8)), r"test_images .*, not uint8 \(N, 8, 8, 3"),
    (lambda p: write(p, zipfile.ZIP_DEFLATED, train_labels=npy(np.zeros(2**25, np.uint8)),
                     train_images=npy(np.zeros(2**25, np.uint8))), "are said to hold"),
]  # fmt: skip


@pytest.mark.parametrize("make, words", FORGED)
def test_a_forged_file_is_refused(make, words, tmp_path):
    """In a sentence, and no memory is taken."""
    path = tmp_path / "mine.npz"
    make(path)
    if make == bomb:  # made with more memory than it may take
        assert path.stat().st_size < 10**6
    tracemalloc.start()
    with pytest.raises(DataError, match=words) as error:
        load(f"npz:{path}", tmp_path, 4, 4, CPU)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6 and "\n" not in str(error.value) and len(str(error.value)) < 600
    assert "mine.npz is damaged or another" in str(error.value)
    assert not path.with_name("touched").exists()


@pytest.mark.parametrize("way", ["savez", "savez_compressed", "version 2", "more in it"])
def test_what_numpy_writes_is_read(way, tmp_path):
    expected, path = arrays(), tmp_path / "mine.npz"
    version = (2, 0) if way == "version 2" else None
    if way == "version 2":
        write(path, **{key: npy(x, version=version) for key, x in expected.items()})
    elif way == "more in it":
        np.savez(path, notes=np.array(["a", "b"], object), **expected)
    else:
        getattr(np, way)(path, **expected)
    ours, source = load_arrays(path)
    for key, x in expected.items():
        assert ours[key].dtype == x.dtype and np.array_equal(ours[key], x)
        assert source["crc32"][key] == f"{zlib.crc32(npy(x, version=version)):08x}"
    inputs = next(iter(load("npz:mine.npz", tmp_path, 4, 12, CPU).test))[0]
    np.savez(tmp_path / "plain.npz", **arrays())
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
    """The number of images that a pass over train/ yields, and those left out."""
    train = load(f"folder:{folder}", "", 4, 4, CPU, image_size=32, **options).train
    try:
        return sum(len(y) for _, y in train), train.bad_images
    finally:
        train.close()


BAD = {  # the bytes of an image, or what makes it; why it is refused
    "text": (b"no image", "not an image that PIL knows"),
    "cut": (lambda p: p.write_bytes((p.parent / "1.jpg").read_bytes()[:300]), "[Tt]runcated"),
    "a cut header": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "[Tt]runcated"),
    "a link to nothing": (lambda p: p.symlink_to("nowhere"), "No such file"),
    "a link to itself": (lambda p: p.symlink_to(p), "symbolic links"),
    "a pipe": (os.mkfifo, "not a file"),
    "a device": (lambda p: p.symlink_to("/dev/zero"), "not a file"),
    "a bomb": (b"P6 100000 100000 255\n", "exceeds limit"),
    "no pixels": (b"P6 0 9 255\n", "no pixels|not an image"),
    "a program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
                  "not an image that PIL knows"),  # nor is it handed to Ghostscript
    "too long": (lambda p: os.truncate(os.open(p, os.O_CREAT | os.O_WRONLY), 2**40), "too many"),
}


@pytest.mark.parametrize("fault, workers", [*((f, 0) for f in BAD), ("a pipe", 1), ("text", 1)])
def test_a_bad_image_is_named_or_left_out(fault, workers, folder):
    made, words = BAD[fault]
    path = folder / "train" / "pear" / "0.jpg"
    path.unlink()
    path.write_bytes(made) if isinstance(made, bytes) else made(path)
    with pytest.raises(DataError, match=f"pear/0.jpg cannot be decoded: .*({words})") as error:
        read_all(folder, workers=workers)
    assert "\n" not in str(error.value)
    assert read_all(folder, workers=workers, skip_bad_images=True) == (3, {str(path)})
    for path in folder.glob("train/*/*"):
        path.unlink()
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 4 images"):
        read_all(folder, workers=workers, skip_bad_images=True)


@pytest.mark.parametrize("spoil, words", [
    (lambda f: (f / "train" / "plum").mkdir(), "no images under .*: 1 of its 3 classes .*: plum"),
    (lambda f: [shutil.rmtree(p) for p in f.glob("*/apple")], "pear is its only class"),
    (lambda f: [shutil.rmtree(p) for p in f.glob("train/*")], "train.*: it has no folders"),
    (lambda f: [p.rename(p.with_suffix(".txt")) for p in f.glob("*/pear/*")], "have none: pear"),
    (lambda f: (f / "train/pear/again").symlink_to(f / "train"), "pear/again/pear is a link"),
    (lambda f: [shutil.rmtree(f / "train"), (f / "train").touch()], "there is no folder .*train"),
])  # fmt: skip
def test_a_fault_of_the_folders_is_one_sentence(spoil, words, folder):
    spoil(folder)
    began = time.process_time()
    with pytest.raises(DataError, match=words) as error:
        read_all(folder)
    assert "\n" not in str(error.value) and time.process_time() - began < 10


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
    assert read_all(folder) == read_all(folder, workers=1) == (7, set())
    for path in train.glob("*/*.jpg"):
        if b"\xe9" in os.fsencode(path):
            path.write_bytes(b"")
    with pytest.raises(DataError) as error:
        read_all(folder, workers=1)
    assert r"\udcff\udcfe" in str(error.value) and r"\udce9.jpg" in str(error.value)
    _, bad = read_all(folder, skip_bad_images=True)
    "".join([*bad, str(error.value)]).encode("ascii")


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
    classes, samples, notes = list_images(tmp_path)
    assert (classes, samples) == (theirs.classes, theirs.samples) and len(samples) == 14
    for part in ("14 images", ".jpg (4)", ".tiff (2)", "; 2 files were left out: ", ".txt (1)",
                 ".jpg beside the class folders (1)"):  # fmt: skip
        assert part in notes[0], notes


def test_what_is_left_out_is_counted_and_named(folder):
    """Nothing is said of one kind of images alone, of hidden files and of the system's."""
    pear = folder / "train" / "pear"
    for name in (".hidden", "._0.jpg", "Thumbs.db", "desktop.ini"):
        (pear / name).touch()
    assert not list_images(folder / "train")[2]
    (pear / "1.jpg").rename(pear / "1.JFIF")
    for name in ("a.svg", "b.svg", "README", "x.y\n.heic", f"z.{'z' * 200}"):
        (pear / name).touch()
    (note,) = list_images(folder / "train")[2]
    assert note.startswith(f"{folder}/train has 4 images: .jpg (3), .jfif (1); 5 files were left "
                           "out: .svg (2)")  # fmt: skip
    assert "without a suffix (1)" in note and ".heic (1)" in note and len(note) < 400
    for path in pear.glob("*.j*"):
        path.unlink()
    (pear / "1.JFIF").unlink()
    with pytest.raises(DataError, match=r"have none: pear; the files there are \.svg \(2\), "):
        list_images(folder / "train")


@pytest.mark.parametrize("shape", [(3, 4000), (4000, 3), (1, 60_000)])
def test_a_thin_image_takes_no_more_than_others(shape):
    """Enlarged whole, a row of 60,000 pixels would take 12 GB."""
    image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cropped = centre_crop(image, 32)
    assert cropped.shape == (32, 32, 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000
    if 3 in shape:  # without the ends, the same picture
        dim = shape.index(4000)
        middle = image.narrow(dim, 2000 - 24, 48)
        assert LONG == 16 and torch.equal(cropped, centre_crop(middle, 32))


# Preparation


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
@pytest.mark.parametrize("fault", [
    "a pickle", "a pipe", "a device", "an archive", pytest.param("a bomb", marks=pytest.mark.slow)])
def test_original_files_that_are_not_the_authors_are_never_read(fault, name, tmp_path):
    """A file without the known MD5 is refused before anything is made of its bytes."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder, out = tmp_path / "copy", tmp_path / "out"
    folder.mkdir()
    first = "train-images-idx3-ubyte" if name == "mnist" else datasets.CIFAR10.train_list[0][0]
    path, words = folder / first, f"{first} is missing or damaged"
    content = pickle.dumps({"data": Touch(tmp_path / "touched"), "labels": [0]})
    if fault == "a pickle":
        path.write_bytes(content)
    elif fault == "a pipe":
        os.mkfifo(path)
    elif fault == "a device":
        path.symlink_to("/dev/zero")
    elif fault == "a bomb":
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(bytes(2**29 + 1))
    else:
        path.write_bytes(content)
        with tarfile.open(folder / "cifar-10-python.tar.gz", "w:gz") as file:
            file.add(path, "cifar-10-batches-py/data_batch_1")
            file.add(path, "../outside")
        if name == "cifar10":
            folder, words = folder / "cifar-10-python.tar.gz", "is not the whole .*: its MD5"
    tracemalloc.start()
    with pytest.raises(DataError, match=words):
        prepare(name, out, folder)
    assert tracemalloc.get_traced_memory()[1] < 2**30
    tracemalloc.stop()
    assert {p.name for p in tmp_path.iterdir()} == {"copy", "out"} and not list(out.iterdir())
