"""Data sets as batches: order, crops, flips, normalisation; how the small sets are prepared."""

import gzip
import hashlib
import http.server
import io
import pickle
import re
import socket
import struct
import tarfile
import threading
import zlib

import numpy as np
import PIL
import pytest
import torch
from PIL import Image

from data import AUGMENTATIONS, DATASETS, DataError, load
from data.arrays import ArrayBatches, load_arrays
from data.common import reason
from data.folders import centre_crop, decode, random_crop_and_flip, random_window, resize
from data.prepare import MNIST_MD5, main, prepare
from data.resize import FORMATS, SUFFIXES, to_rgb
from tests.conftest import ROOT
from tests.program import rows, train

CPU = torch.device("cpu")
MEAN, STD = DATASETS["cifar10"].mean, DATASETS["cifar10"].std
AUGMENTED = {"shuffle": True, "pad": 4, "flip": True}


def batches(images, labels, batch_size=7, **options):
    return ArrayBatches(images, labels, MEAN, STD, batch_size, CPU, **options)


def some_images(count=40):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10


def write_npz(path, images, labels):
    np.savez(path, **{f"{split}_{key}": array for split in ("train", "test")
                      for key, array in (("images", images), ("labels", labels))})  # fmt: skip


def joined(batches):
    """(inputs, labels) of a pass."""
    return tuple(map(torch.cat, zip(*batches)))


def test_crop_and_flip_match_a_loop_over_images():
    """Order, crops and flips are these functions of (seed, epoch): published runs had them."""
    images, labels = some_images()
    ours = batches(images, labels, **AUGMENTED, seed=3)
    ours.set_epoch(5)
    rng = np.random.default_rng((3, 5))
    order, (top, left), mirror = (
        rng.permutation(40), rng.integers(0, 9, (2, 40)), rng.integers(0, 2, 40))  # fmt: skip
    expected = []
    for i in order:
        padded = np.zeros((40, 40, 3), np.uint8)
        padded[4:36, 4:36] = images[i]
        crop = padded[top[i] : top[i] + 32, left[i] : left[i] + 32]
        crop = crop[:, ::-1] if mirror[i] else crop
        expected.append(((crop / 255 - MEAN) / STD).transpose(2, 0, 1))
    passed = list(ours)
    assert [len(x) for x, _ in passed] == [7] * 5 + [5] and len(ours) == ours.position == 6
    inputs, targets = joined(passed)
    assert inputs.numpy() == pytest.approx(np.stack(expected), abs=1e-5)
    assert targets.tolist() == labels[order].tolist() and ours.order().tolist() == order.tolist()
    # from a batch on; other epochs and seeds differ
    ours.set_epoch(5, start=4)
    assert ours.position == 4 and torch.equal(joined(ours)[0], inputs[28:])
    for seed, epoch in ((3, 6), (4, 5)):
        others = batches(images, labels, **AUGMENTED, seed=seed)
        others.set_epoch(epoch)
        assert not torch.equal(joined(others)[0], inputs)


@pytest.mark.parametrize("pixels", [False, True])  # as CPUs gather images, as GPUs do
@pytest.mark.parametrize("options", [AUGMENTED, {**AUGMENTED, "flip": False}, {}])
@pytest.mark.parametrize("side", [(32, 32), (28, 20)])
def test_a_batch_at_a_position_is_that_of_the_iteration(options, side, pixels):
    """Epoch after epoch, from the same memory."""
    images, labels = some_images()
    ours = batches(np.ascontiguousarray(images[:, : side[0], : side[1]]), labels, **options)
    position, places = torch.zeros((), dtype=torch.int64), set()
    for epoch in (1, 2):
        ours.set_epoch(epoch)
        expected = list(ours)
        ours.hold()
        places.add(ours.held.data_ptr())
        if pixels:
            ours._images = ours._pixels
        position.zero_()
        for i, (inputs, targets) in enumerate(expected):
            assert ours.position == i
            ours.advance()
            there = ours.at(position, len(targets))
            assert torch.equal(there[0], inputs) and torch.equal(there[1], targets)
            position += len(targets)
        assert position == 40
    assert len(places) == 1


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_share_the_batches_out(size):
    images, labels = some_images()
    whole = list(batches(images, labels, **AUGMENTED))
    parts = [list(batches(images, labels, **AUGMENTED, rank=r, size=size)) for r in range(size)]
    for i, (inputs, _) in enumerate(whole):
        for r in range(size):
            assert torch.equal(parts[r][i][0], inputs[r::size])


def test_digits_need_no_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    digits = load("digits", "/nowhere", 128, 128, CPU)
    assert (digits.train.examples, digits.test.examples) == (1437, 360)
    assert (digits.shape, digits.classes) == ((1, 8, 8), 10)
    # What old logs and checkpoints hold, and compare.
    assert digits.source == {"file": "digits.npz", "crc32": {
        "train_images": "957032ef", "train_labels": "bbcb8173",
        "test_images": "5220ba60", "test_labels": "2743dfea"}}  # fmt: skip
    inputs, labels = joined(digits.train)
    assert inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert inputs.std().item() == pytest.approx(1, abs=1e-3)
    assert (labels.bincount() / 1437).min() > 0.08


@pytest.mark.parametrize("name, pad, flip", [
    ("mnist", 0, False), ("cifar10", 4, True), ("cifar100", 4, True)])  # fmt: skip
def test_sets_are_normalised_and_augmented_as_documented(name, pad, flip, tmp_path):
    shape, classes, mean, std, *_ = DATASETS[name]
    images = np.full((200, *shape), 51, np.uint8)  # 0.2
    images[:, :, 0] = 255
    labels = np.arange(200) % classes
    write_npz(tmp_path / f"{name}.npz", images, labels)
    ours = load(name, tmp_path, 50, 50, CPU)
    assert (ours.shape, ours.classes) == ((shape[2], *shape[:2]), classes)
    inputs, targets = joined(ours.test)
    for x, level in ((inputs[..., 1], 0.2), (inputs[..., 0], 1.0)):  # nothing moved in testing
        expected = (level - np.array(mean)) / np.array(std)
        assert x.mean((0, 2)).tolist() == pytest.approx(expected, abs=1e-5)
    assert targets.tolist() == labels.tolist()
    inputs, targets = joined(ours.train)
    assert targets.tolist() != labels.tolist()
    left, right = inputs[:, 0, :, 0].amax(1), inputs[:, 0, :, -1].amax(1)
    assert bool((right > left).any()) == flip  # the white column on the other side
    black = inputs[:, 0].amin((1, 2)) < (0.1 - mean[0]) / std[0]
    assert bool(black.any()) == (pad > 0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_prepared_file_of_ones_own(channels, tmp_path):
    """Classes, side, mean and deviation come from the file; colours are augmented like CIFAR's."""
    images = np.random.default_rng(0).integers(0, 90, (60, 16, 16, channels), dtype=np.uint8)
    images[..., 0] = 7  # a blank channel is no division by zero
    write_npz(tmp_path / "mine.npz", images, np.arange(60) % 7)
    ours = load("npz:mine.npz", tmp_path, 20, 20, CPU)
    assert (ours.shape, ours.classes) == ((channels, 16, 16), 7)
    inputs = joined(ours.test)[0].double()
    assert inputs.mean((0, 2, 3)).tolist() == pytest.approx([0] * channels, abs=1e-4)
    deviations = [0, 1, 1][:channels]
    assert inputs.std((0, 2, 3)).tolist() == pytest.approx(deviations, abs=1e-3)
    moved = not torch.equal(joined(ours.train)[0].sum(), inputs.float().sum())
    assert moved == (channels == 3)
    elsewhere = load(f"npz:{tmp_path / 'mine.npz'}", "nowhere", 20, 20, CPU)
    assert elsewhere.source == ours.source and ours.source["file"] == "mine.npz"


FORMS = {  # what a file holds instead of int64 (N,) and uint8 (N, H, W, C)
    **{dtype: ("labels", lambda x, d=dtype: x.astype(d)) for dtype in (
        "uint8", "int8", "uint16", "int32", ">i4", ">i8", "uint64", "float32", "float64")},
    "a column": ("labels", lambda x: x[:, None].astype(np.uint8)),
    "no axis for grey": ("images", lambda x: x[..., 0]),
    "channels first": ("images", lambda x: x.transpose(0, 3, 1, 2)),
    "Fortran's order": ("images", np.asfortranarray),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_file_that_says_the_same_in_another_form_is_the_same_data(channels, form, tmp_path):
    """MedMNIST's has labels of uint8 (N, 1), grey images (N, H, W), and a part for validation."""
    part, change = FORMS[form]
    if form == "no axis for grey" and channels > 1:
        return
    images = np.random.default_rng(0).integers(0, 90, (30, 16, 20, channels), dtype=np.uint8)
    whole = {"train_images": images, "train_labels": np.arange(30) % 5,
             "test_images": images[:7], "test_labels": np.arange(7) % 3}  # fmt: skip
    changed = {key: change(x) if part in key else x for key, x in whole.items()}
    np.savez(tmp_path / "a.npz", **whole)
    np.savez(tmp_path / "b.npz", **changed, val_images=images[:3], val_labels=np.zeros((3, 1)))
    expected, _ = load_arrays(tmp_path / "a.npz")
    ours, _ = load_arrays(tmp_path / "b.npz")
    assert all(ours[k].dtype == x.dtype and np.array_equal(ours[k], x) for k, x in expected.items())
    a, b = (load(f"npz:{name}.npz", tmp_path, 8, 8, CPU) for name in "ab")
    assert (a.classes, a.shape) == (b.classes, b.shape) == (5, (channels, 16, 20))
    for one, other in zip(a[:2], b[:2]):
        assert all(map(torch.equal, joined(one), joined(other)))


def test_a_set_named_by_hand_may_have_other_forms_too(tmp_path):
    images, labels = some_images()
    write_npz(tmp_path / "mine.npz", images.transpose(0, 3, 1, 2), labels[:, None].astype(np.uint8))
    assert main(["cifar10", "--data_dir", str(tmp_path), "--from", f"{tmp_path}/mine.npz"]) == 0
    assert load("cifar10", tmp_path, 8, 8, CPU).shape == (3, 32, 32)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_augmentation_is_a_choice(augment, tmp_path):
    """crop draws the windows of the default; none leaves the images of the same order alone."""
    images, labels = some_images()
    write_npz(tmp_path / "cifar10.npz", images, labels)
    ours = load("cifar10", tmp_path, 8, 40, CPU, seed=3, augment=augment)
    options = {"default": AUGMENTED, "crop": {"shuffle": True, "pad": 4}, "none": {"shuffle": True}}
    expected = joined(batches(images, labels, 8, **options[augment], seed=3))
    assert all(map(torch.equal, joined(ours.train), expected))
    for other in set(AUGMENTATIONS) - {augment}:
        others = load("cifar10", tmp_path, 8, 40, CPU, seed=3, augment=other)
        assert not torch.equal(joined(others.train)[0], expected[0])
        assert torch.equal(joined(others.train)[1], expected[1])
        assert torch.equal(joined(others.test)[0], joined(ours.test)[0])


def arrows(count, seed):
    """Arrows to the left (label 0) and to the right, (N, 32, 32, 3), on noise."""
    images = np.random.default_rng(seed).integers(0, 60, (count, 32, 32, 3), dtype=np.uint8)
    y, x = np.mgrid[:32, :32]
    left = abs(y - 16) <= x // 2
    labels = np.arange(count) % 2
    images[labels == 0] += np.uint8(150) * left[..., None]
    images[labels == 1] += np.uint8(150) * left[:, ::-1, None]
    return images, labels


@pytest.mark.parametrize("kind", ["npz", "folder"])
def test_left_and_right_are_learnt_without_flips(kind, tmp_path):
    (images, labels), (others, answers) = arrows(80, 0), arrows(40, 1)
    if kind == "npz":
        np.savez(tmp_path / "arrows.npz", train_images=images, train_labels=labels,
                 test_images=others, test_labels=answers)  # fmt: skip
        flags = ["--dataset", "npz:arrows.npz", "--data_dir", tmp_path]
    else:
        flags = ["--dataset", f"folder:{tmp_path}", "--image_size", 32, "--workers", 0]
        for split, *arrays in (("train", images, labels), ("val", others, answers)):
            for i, (image, label) in enumerate(zip(*arrays)):
                folder = tmp_path / split / ("left", "right")[label]
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"{i}.png")
    accuracies = {}
    for augment in AUGMENTATIONS:
        out = tmp_path / augment
        assert train(*flags, "--cpu", "--depth", 2, "--width", 32, "--epochs", 6, "--train_bs", 8,
                     "--augment", augment, "--out", out) == 0  # fmt: skip
        first, *_, end = rows(out)
        accuracies[augment] = end["test_acc"]
        assert ("augment" in first["settings"]) == ("augment" in first["name"]) == (
            augment != "default")  # fmt: skip
    assert accuracies["default"] < 0.8 < 0.95 < min(accuracies["crop"], accuracies["none"])


def test_a_part_of_a_set_is_its_first_images(tmp_path):
    images, labels = some_images(40)
    write_npz(tmp_path / "cifar10.npz", images, labels)
    part = load("cifar10", tmp_path, 8, 8, CPU, train_examples=12, test_examples=12)
    assert (part.train.examples, part.test.examples, part.classes) == (12, 12, 10)
    assert torch.equal(joined(part.test)[0], joined(batches(images[:12], labels[:12]))[0])
    assert sorted(joined(part.train)[1].tolist()) == sorted(labels[:12].tolist())
    with pytest.raises(DataError, match="40 images for --test_examples, not 41"):
        load("cifar10", tmp_path, 8, 8, CPU, test_examples=41)


@pytest.mark.slow
def test_real_mnist_in_torchvisions_layout(samples):
    mnist = load("mnist", samples("mnist"), 128, 1000, CPU)
    assert (mnist.train.examples, mnist.test.examples, mnist.shape) == (60000, 10000, (1, 28, 28))
    assert joined(mnist.test)[0].mean().item() == pytest.approx(0, abs=0.02)


# Preparation


def md5(content):
    return hashlib.md5(content).hexdigest()


def cifar_archive(tmp_path, monkeypatch, images, labels):
    """An archive in CIFAR-10's own format, which torchvision's class is made to expect."""
    datasets = pytest.importorskip("torchvision.datasets")
    flat = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    files = {f"data_batch_{i + 1}": slice(5 * i, 5 * i + 5) for i in range(5)}
    files["test_batch"] = slice(25, 40)
    contents = {
        name: pickle.dumps({"data": flat[part], "labels": labels[part].tolist()}, 4)
        for name, part in files.items()
    }
    contents["batches.meta"] = pickle.dumps({"label_names": [str(i) for i in range(10)]})
    path = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    lists = [[[n, md5(contents[n])] for n in files if (n == "test_batch") == test]
             for test in (False, True)]  # fmt: skip
    facts = {
        "tgz_md5": md5(path.read_bytes()), "train_list": lists[0], "test_list": lists[1],
        "meta": {**datasets.CIFAR10.meta, "md5": md5(contents["batches.meta"])},
        "url": "http://127.0.0.1:9/cifar-10-python.tar.gz",  # refused
    }  # fmt: skip
    for key, value in facts.items():
        monkeypatch.setattr(datasets.CIFAR10, key, value)
    return path


@pytest.fixture
def web(tmp_path):
    """The address at which the files of tmp_path are served."""
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("way", ["file", "folder", "layout", "archive beside", "url", "npz"])
def test_prepare_from_what_there_is(way, tmp_path, monkeypatch, web):
    images, labels = some_images()
    archive = cifar_archive(tmp_path, monkeypatch, images, labels)
    folder, source = tmp_path / "data", None
    folder.mkdir()
    if way == "file":
        source = archive
    elif way == "url":
        source = f"{web}/{archive.name}"
    elif way == "archive beside":
        archive.rename(folder / archive.name)
    elif way == "npz":
        source = prepare("cifar10", tmp_path / "other", archive)
    else:
        with tarfile.open(archive) as file:
            file.extraction_filter = getattr(tarfile, "data_filter", None)  # of Python from 3.10.12
            file.extractall(folder if way == "layout" else tmp_path)
        source = None if way == "layout" else tmp_path / "cifar-10-batches-py"
    path = prepare("cifar10", folder, source)
    assert path == folder / "cifar10.npz"
    arrays, _ = load_arrays(path, (32, 32, 3), 10)
    assert np.array_equal(arrays["train_images"], images[:25])
    assert arrays["test_labels"].tolist() == labels[25:].tolist()
    left = {p.name for p in folder.iterdir()} - {archive.name, "cifar-10-batches-py"}
    assert left == {"cifar10.npz"}
    if way == "archive beside":  # the command makes a damaged file anew
        path.write_bytes(path.read_bytes()[:1000])
        assert main(["cifar10", "--data_dir", str(folder)]) == 0
        assert load_arrays(path, (32, 32, 3), 10)
    archive.unlink(missing_ok=True)  # from now on the one file is enough
    assert prepare("cifar10", folder) == path


@pytest.mark.parametrize("fault, words", [
    ("refused", ["http://127.0.0.1:9/", "cifar-10-python.tar.gz", "MD5", "--from FILE",
                 "--dataset digits"]),
    ("cut file", ["MD5", "cifar-10-python.tar.gz"]),
    ("cut url", ["127.0.0.1", "MD5", "--from FILE"]),
    ("web page", ["127.0.0.1", "MD5"]),
    ("missing", ["there is no", "missing.tar.gz"]),
    ("npz", ["cifar10.npz is damaged or another data set"]),
])  # fmt: skip
def test_what_cannot_be_had_leaves_the_good_file(fault, words, tmp_path, monkeypatch, web):
    images, labels = some_images()
    archive = cifar_archive(tmp_path, monkeypatch, images, labels)
    folder = tmp_path / "data"
    good = prepare("cifar10", folder, archive).read_bytes()
    source = {"cut file": archive, "cut url": f"{web}/{archive.name}", "web page": f"{web}/",
              "missing": tmp_path / "missing.tar.gz",
              "npz": tmp_path / "cifar100.npz"}.get(fault)  # fmt: skip
    write_npz(tmp_path / "cifar100.npz", images, np.arange(40) % 20)
    archive.write_bytes(archive.read_bytes()[:500])
    if fault == "refused":
        (folder / "cifar10.npz").rename(folder / "kept")
    with pytest.raises(DataError) as error:
        prepare("cifar10", folder, source)
    assert all(word in str(error.value) for word in words), error.value
    assert [p.read_bytes() for p in folder.iterdir()] == [good]


@pytest.mark.parametrize("way", ["packed", "unpacked", "layout"])
def test_prepare_mnist(way, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    folder = tmp_path / "data" / "MNIST" / "raw" if way == "layout" else tmp_path / "copy"
    folder.mkdir(parents=True)
    for name, part in zip(list(MNIST_MD5), [images[:20], labels[:20], images[20:], labels[20:]]):
        sides = b"".join(n.to_bytes(4, "big") for n in part.shape)
        content = bytes([0, 0, 8, part.ndim]) + sides + part.tobytes()
        monkeypatch.setitem(MNIST_MD5, name, md5(content))
        packed = gzip.compress(content) if way == "packed" else content
        (folder / (f"{name}.gz" if way == "packed" else name)).write_bytes(packed)
    path = prepare("mnist", tmp_path / "data", None if way == "layout" else folder)
    arrays, _ = load_arrays(path, (28, 28, 1), 10)
    assert np.array_equal(arrays["train_images"][..., 0], images[:20])
    assert arrays["test_labels"].tolist() == labels[20:].tolist()


# Image folders


@pytest.fixture
def folder(tmp_path):
    """A small image folder; the images of a class have its own colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for c, name in enumerate(("apple", "pear", "plum")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 30, (*rng.integers(40, 90, 2), 3), dtype=np.uint8)
                pixels[..., c] += 200
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.jpg")
    return tmp_path


@pytest.fixture
def open_folder(folder):
    """f(**options) -> the Data of the image folder, whose workers end with the test."""
    opened = []

    def load_folder(**options):
        opened.append(load(f"folder:{folder}", "", 4, 4, CPU, image_size=32, **options))
        return opened[-1]

    yield load_folder
    for part in (part for ours in opened for part in ours[:2]):
        part.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_yields_every_image_once(open_folder, workers):
    ours = open_folder(workers=workers)
    assert (ours.shape, ours.classes) == ((3, 32, 32), 3)
    assert (ours.train.examples, ours.test.examples, len(ours.train)) == (15, 9, 4)
    for part, count in ((ours.train, 5), (ours.test, 3)):
        part.set_epoch(1)
        inputs, labels = joined(part)
        assert labels.bincount().tolist() == [count] * 3 and inputs.dtype == torch.float32
        assert inputs.is_contiguous() and part.position == len(part) and part.missing == 0
        assert torch.equal(inputs.mean((2, 3)).argmax(1), labels)  # image and label belong together


def test_folder_order_and_augmentation_are_functions_of_seed_epoch_and_index(open_folder):
    """They do not depend on workers or on earlier epochs, and these are the functions."""
    def epoch(n, before=0, start=0, **options):
        train = open_folder(**options).train
        for i in range(before):
            train.set_epoch(i)
            list(train)
        train.set_epoch(n, start)
        return joined(train)[0], train.order()

    one, order = epoch(3)
    assert torch.equal(one, epoch(3, before=2, workers=2)[0])
    assert torch.equal(one[8:], epoch(3, start=2)[0])
    assert not torch.equal(one, epoch(4)[0]) and not torch.equal(one, epoch(3, seed=1)[0])
    assert order.tolist() == np.random.default_rng((0, 3)).permutation(15).tolist()
    ours, rng = open_folder(), np.random.default_rng((0, 3, order[5]))
    paths, mean, std = ours.files[1], np.array([0.485, 0.456, 0.406]), [0.229, 0.224, 0.225]
    for image, inputs in (
        (random_crop_and_flip(decode(paths[order[5]]), 32, rng), one[5]),
        (centre_crop(decode(paths[15]), 32), next(iter(ours.test))[0][0]),  # behind 15 of train/
    ):
        expected = ((image.numpy() / 255 - mean) / std).transpose(2, 0, 1)
        assert inputs.numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("augment", AUGMENTATIONS)
def test_a_folder_is_augmented_as_asked(augment, open_folder):
    ours = open_folder(augment=augment)
    inputs, seed = next(iter(ours.train))[0], (0, 0)
    for i, given in zip(ours.train.order(), inputs):
        rng, image = np.random.default_rng((*seed, i)), decode(ours.files[1][i])
        expected = centre_crop(image, 32) if augment == "none" else (
            random_crop_and_flip(image, 32, rng, flip=augment == "default"))  # fmt: skip
        mean, std = np.array([0.485, 0.456, 0.406]), [0.229, 0.224, 0.225]
        expected = ((expected.numpy() / 255 - mean) / std).transpose(2, 0, 1)
        assert given.numpy() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(joined(ours.test)[0], joined(open_folder().test)[0])


def test_a_rank_without_a_share_yields_empty_batches(open_folder):
    parts = [list(open_folder(rank=r, size=6, workers=1).test) for r in range(6)]
    whole = list(open_folder().test)
    for i, (inputs, labels) in enumerate(whole):
        assert torch.equal(torch.cat([part[i][0] for part in parts]), inputs)
        assert torch.equal(torch.cat([part[i][1] for part in parts]), labels)
    assert parts[5][0][0].shape == (0, 3, 32, 32)


def test_random_crop_draws_as_torchvisions():
    """The windows' areas and ratios have the distribution of RandomResizedCrop's."""
    transforms = pytest.importorskip("torchvision.transforms")
    torch.manual_seed(0)
    draw, tensor = transforms.RandomResizedCrop.get_params, torch.empty(3, 333, 500)
    pairs = [(random_window(333, 500, np.random.default_rng(i)),
              draw(tensor, (0.08, 1), (3 / 4, 4 / 3))) for i in range(2000)]  # fmt: skip
    top, left, h, w = np.array(pairs, float).transpose(2, 1, 0)  # each (ours and theirs, 2000)
    for ours, expected in (h * w, w / h, top, left):
        for q in (0.1, 0.5, 0.9):
            spread = expected.max() - expected.min()
            assert abs(np.quantile(ours, q) - np.quantile(expected, q)) < 0.05 * spread
    # what never fits falls back to the centre
    assert random_window(4, 400, np.random.default_rng(0)) == (0, 197, 4, 5)
    assert random_window(400, 4, np.random.default_rng(0)) == (197, 0, 5, 4)


@pytest.mark.parametrize("size", [(70, 90), (500, 333), (333, 500), (9, 30), (1, 7)])
def test_crops_are_those_of_pil_to_within_rounding(size):
    """Windows, flips and the filter, PIL's bilinear one, on noise, which shows every fault."""
    transforms = pytest.importorskip("torchvision.transforms")
    image = np.random.default_rng(0).integers(0, 2, (*size, 3), dtype=np.uint8) * 255
    picture, pixels = Image.fromarray(image), torch.from_numpy(image)

    def differ(ours, theirs):
        assert tuple(ours.shape) == np.asarray(theirs).shape
        difference = np.abs(ours.numpy().astype(int) - np.asarray(theirs))
        assert difference.max() <= 2 and (difference > 1).mean() < 1e-3
        assert difference.mean() < 0.25

    theirs = transforms.Compose([transforms.Resize(48), transforms.CenterCrop(42)])
    differ(centre_crop(pixels, 42), theirs(picture))
    for i in range(8):
        rng = np.random.default_rng(i)
        top, left, h, w = random_window(*size, rng)
        window = picture.crop((left, top, left + w, top + h))
        expected = window.resize((42, 42), Image.Resampling.BILINEAR)
        if rng.random() < 0.5:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        differ(random_crop_and_flip(pixels, 42, np.random.default_rng(i)), expected)
    differ(resize(pixels, 31, 77), picture.resize((77, 31), Image.Resampling.BILINEAR))


NOISE = np.stack([*np.mgrid[:180:3, :180:2], np.multiply(*np.mgrid[:60, :90]) % 256], 2)
QUICK = {  # a JPEG of RGB or grey pixels is decoded by torchvision
    "plain": {}, "progressive": {"progressive": True}, "thin": {"subsampling": 2, "quality": 30},
    "full": {"subsampling": 0}, "restarting": {"restart_marker_blocks": 2},
    "as RGB": {"subsampling": 0, "keep_rgb": True}, "grey": {},
}  # fmt: skip
SLOW = {  # format and mode of what PIL decodes
    "CMYK": ("JPEG", "CMYK"), "PNG": ("PNG", "RGBA"), "palette": ("PNG", "P"), "GIF": ("GIF", "P"),
    "BMP": ("BMP", "RGB"), "WEBP": ("WEBP", "RGB"),
    "TIFF": ("TIFF", "CMYK"), "PPM": ("PPM", "RGB"), "MPO": ("MPO", "RGB"),
}  # fmt: skip


def encoded(kind):
    """The bytes of a small image file."""
    name, mode = SLOW.get(kind, ("JPEG", "L" if kind == "grey" else "RGB"))
    image = Image.fromarray(NOISE.astype(np.uint8)).convert(mode)
    options, made = QUICK.get(kind, {}), io.BytesIO()
    if kind == "MPO":
        options = {"save_all": True, "append_images": [image.rotate(180)]}
    if kind == "plain":  # an orientation is not applied
        options = {"exif": Image.Exif()}
        options["exif"][0x0112] = 6
    image.save(made, name, **options)
    return made.getvalue()


@pytest.mark.parametrize("kind", [*QUICK, *SLOW])
def test_every_kind_of_image_is_decoded_as_pil_does(kind, tmp_path, monkeypatch):
    path = tmp_path / "image.jpeg"  # the name says nothing
    path.write_bytes(encoded(kind))
    with Image.open(path) as file:
        expected = np.asarray(file.convert("RGB"))
    assert expected.std() > 20
    with monkeypatch.context() as patch:
        if kind in QUICK:
            patch.setattr(Image.Image, "convert", None)
        image = decode(path)
    assert image.dtype == torch.uint8 and np.array_equal(image.numpy(), expected)
    monkeypatch.delattr("torchvision.io.decode_jpeg")  # a later torchvision
    assert np.array_equal(decode(path).numpy(), expected)


# Pixels of many bits


RAMP = np.linspace(0.1, 0.9, 32) * np.ones((32, 1))
EIGHT = ("1", "L", "P", "LA", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
SIXTEEN = ("I;16", "I;16L", "I;16B", "I;16N")


def ramp(mode):
    """PIL's image of RAMP, of any of its modes."""
    if mode.startswith("I;16"):
        kind = ">u2" if mode == "I;16B" else "<u2"  # of this little-endian machine: I;16N
        return Image.frombytes(mode, (32, 32), (RAMP * 65535).round().astype(kind).tobytes())
    if mode in ("I", "F"):
        return Image.fromarray((RAMP * 65535).astype(np.int32) if mode == "I" else
                               RAMP.astype(np.float32))  # fmt: skip
    grey = Image.fromarray((RAMP * 255).round().astype(np.uint8))
    return (grey if mode in ("1", "L", "P", "LA", "PA") else grey.convert("RGB")).convert(mode)


def off(image):
    """The largest difference of an image, uint8 (32, 32, 3), from RAMP, in 255ths."""
    return np.abs(np.asarray(image, float) - (RAMP * 255).round()[..., None]).max()


@pytest.mark.parametrize("mode", [*EIGHT, *SIXTEEN, "I", "F"])
def test_no_mode_of_any_format_saturates(mode, tmp_path):
    """8 bits are what PIL makes of them, to the bit; 12 and 16 are scaled; others are refused."""
    path, image, seen = tmp_path / "x", ramp(mode), []
    if mode in EIGHT:
        assert np.array_equal(to_rgb(image), image.convert("RGB"))
    for kind in FORMATS:
        try:
            image.save(path, kind)
        except (OSError, ValueError, KeyError, SystemError):  # not a format of this mode
            continue
        with Image.open(path) as file:
            if file.mode not in (*SIXTEEN, "I", "F"):
                try:
                    expected = np.asarray(file.convert("RGB"))
                except OSError:  # Pillow 12 cannot read its own TIFF of YCbCr
                    with pytest.raises(OSError):
                        decode(path)
                    continue
                # PIL saturates already where it saves so many bits as 8.
                assert np.array_equal(decode(path), expected)
                continue
            seen.append(f"{file.format} {file.mode}")
        if mode == "I;16B" and kind == "JPEG2000":  # PIL saves its bytes in the wrong order
            continue
        if seen[-1] in ("TIFF I", "TIFF F", "PPM F"):
            with pytest.raises(ValueError, match=f"(integers|floats) of .*mode {mode}.* 16 bits"):
                decode(path)
        else:
            assert off(decode(path)) <= 1, seen
    assert bool(seen) == (mode not in (*EIGHT, "I;16N"))
    image.format = "PNG"  # mode I in PIL before version 11
    # No file has I;16N, and Pillow before 13 converts it in the wrong order of bytes.
    if mode in (*SIXTEEN, "I") and (mode != "I;16N" or int(PIL.__version__.split(".")[0]) > 12):
        assert off(to_rgb(image)) <= 1


def tiff(values, bits, white_is_zero=False, signed=False):
    """The bytes of a grey TIFF."""
    height, width = RAMP.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8,
            277: 1, 278: height, 279: len(values)}  # fmt: skip
    tags |= {339: 2} if signed else {}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    at = 8 + len(values) + len(values) % 2
    return (struct.pack("<2sHI", b"II", 42, at) + values).ljust(at, b"\0") + (
        struct.pack("<H", len(tags)) + entries + bytes(4))  # fmt: skip


def twelve_bits():
    a, b = (RAMP * 4095).round().astype(int).reshape(-1, 2).T
    return np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], 1).astype(np.uint8).tobytes()


def pnm(kind, most):
    values = np.repeat((RAMP * most).round()[..., None], 3 if kind in "P3 P6" else 1, 2)
    content = values.astype(">u2").tobytes() if kind in "P5 P6" else (
        " ".join(map(str, values.astype(int).ravel())).encode())  # fmt: skip
    return f"{kind} 32 32 {most}\n".encode() + content


SIXTEEN_BITS = (RAMP * 65535).round().astype("<u2")


@pytest.mark.parametrize("content", [
    tiff(SIXTEEN_BITS.tobytes(), 16), tiff((65535 - SIXTEEN_BITS).tobytes(), 16, True),
    tiff(twelve_bits(), 12),
    *(pnm(kind, most) for kind in ("P2", "P3", "P5", "P6") for most in (1023, 4095, 65535)),
])  # fmt: skip
def test_a_file_is_scaled_by_the_range_that_it_declares(content, tmp_path):
    path = tmp_path / "x"
    path.write_bytes(content)
    assert off(decode(path)) <= 1


def test_bytes_with_a_sign_are_refused(tmp_path):
    (tmp_path / "x").write_bytes(tiff(bytes(32 * 32), 8, signed=True))
    with pytest.raises(ValueError, match="with a sign"):
        decode(tmp_path / "x")


def deep_file(path, values, kind):
    """Save grey values (40, 40) of 16 bits."""
    colours = np.repeat(values[..., None], 3, 2).astype(">u2")
    if kind == "8 bits":
        Image.fromarray((values >> 8).astype(np.uint8)).save(path, "PNG")
    elif kind in ("PNG", "TIFF"):
        Image.fromarray(values).save(path, kind)
    elif kind == "colours, PNG":
        rows = b"".join(b"\0" + row.tobytes() for row in colours)
        chunks = ((b"IHDR", struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)),
                  (b"IDAT", zlib.compress(rows)), (b"IEND", b""))  # fmt: skip
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(x)) + key + x + struct.pack(">I", zlib.crc32(key + x))
            for key, x in chunks))  # fmt: skip
    else:
        path.write_bytes(b"P6 40 40 65535\n" + colours.tobytes())


@pytest.mark.parametrize("kind", ["8 bits", "PNG", "TIFF", "colours, PNG", "colours, PPM"])
def test_a_folder_of_deep_images_is_normalised_by_its_own_statistics(kind, tmp_path):
    """Sensors fill 12 of 16 bits, and a network without biases cannot tell black from black."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for k, name in enumerate(("dim", "bright")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(10):
                values = rng.integers(1000 + 2000 * k, 2000 + 2000 * k, (40, 40))
                values = values.astype(np.uint16) << (4 if kind == "8 bits" else 0)
                deep_file(tmp_path / split / name / f"{i}.png", values, kind)
    ours = load(f"folder:{tmp_path}", "", 4, 4, CPU, image_size=32)
    assert ("normalised" in ours.source) == (kind != "8 bits")
    if kind == "8 bits":
        assert (ours.train.mean, ours.test.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    else:
        inputs = joined(ours.test)[0]
        assert abs(inputs.mean()) < 0.1 and inputs.std() == pytest.approx(1, abs=0.1)
    assert train("--dataset", f"folder:{tmp_path}", "--cpu", "--depth", 2, "--width", 8, "--epochs",
                 6, "--train_bs", 4, "--image_size", 32, "--workers", 0,
                 "--out", tmp_path / "out") == 0  # fmt: skip
    assert rows(tmp_path / "out")[-1]["test_acc"] > 0.95


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "TIFF", "PNG", "MPO"])
def test_of_several_pictures_in_a_file_the_first_is_taken(kind, tmp_path):
    one = ramp("RGB")
    one.save(tmp_path / "x", kind, save_all=True, append_images=[one.transpose(0)] * 2)
    assert off(decode(tmp_path / "x")) < 12 < off(np.asarray(one.transpose(0)))


def test_every_suffix_of_the_formats_is_taken():
    Image.init()
    theirs = {x for x, kind in Image.registered_extensions().items() if kind in FORMATS}
    assert theirs <= SUFFIXES and {".jpg", ".jfif", ".gif", ".jp2", ".avif"} <= SUFFIXES
    assert not {".eps", ".ps", ".pdf", ".mpg", ".wmf", ".txt", ""} & SUFFIXES
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    listed = page.split("A file is an image by its suffix")[1].split("What it holds")[0]
    assert set(re.findall(r"\.[a-z0-9]+", listed)) == SUFFIXES


def outcome(read, path):
    """The pixels, or the error in a line."""
    try:
        return np.asarray(read(path))
    except Exception as error:
        return "not an image" if "identify" in str(error) else reason(error)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PIL, on EXIF data
@pytest.mark.parametrize("kind", ["plain", "progressive", "grey", "restarting"])
def test_a_damaged_jpeg_is_what_pil_makes_of_it(kind, tmp_path):
    """Cut anywhere, or with bytes changed: the same pixels, or the same error."""
    path, whole = tmp_path / "image.jpg", encoded(kind)
    rng, cases = np.random.default_rng(0), [whole + b"and more", whole[:-400] + whole[-2:]]
    cases += [whole[:n] for n in {*range(0, len(whole), 41), *range(len(whole) - 20, len(whole))}]
    for i in range(60):
        content = bytearray(whole)
        for at in rng.integers(0, 700 if i % 2 else len(whole), 3):
            content[at] = rng.integers(0, 256)
        cases.append(bytes(content))
    seen = {str: 0, np.ndarray: 0}
    for content in cases:
        path.write_bytes(content)
        ours, theirs = outcome(decode, path), outcome(lambda p: Image.open(p).convert("RGB"), path)
        assert np.array_equal(ours, theirs) or "not an image" in ours and "not an" in theirs
        seen[type(ours)] += 1
        if whole.startswith(content) and content != whole:
            # Of grey images PIL forgives that the end is not marked.
            assert isinstance(ours, str) or kind == "grey" and len(content) >= len(whole) - 2
    assert min(seen.values()) > 10


def test_folders_that_differ_are_named(folder, open_folder):
    (folder / "imagenet").symlink_to(".")
    with pytest.raises(DataError, match="3 class folders, not 1000"):
        load("imagenet", folder, 4, 4, CPU)
    (folder / "val" / "plum").rename(folder / "val" / "grape")
    with pytest.raises(DataError, match="grape, plum"):
        open_folder()
