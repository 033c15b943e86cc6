import gzip
import hashlib
import http.server
import io
import pickle
import socket
import tarfile
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data.prepare
from data import DATASETS, DataError, load
from data.arrays import ArrayBatches, load_arrays
from data.folders import centre_crop, decode, random_crop_and_flip, random_window, resize
from data.prepare import MNIST_MD5, prepare
from data.resize import reason

CPU = torch.device("cpu")
MEAN, STD = DATASETS["cifar10"].mean, DATASETS["cifar10"].std


def batches(images, labels, batch_size=7, **options):
    return ArrayBatches(images, labels, MEAN, STD, batch_size, CPU, **options)


def real_images(samples, count=40):
    with np.load(samples("cifar10") / "cifar10.npz") as file:
        return file["train_images"][:count], file["train_labels"][:count]


def some_images(count=40):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return images, np.arange(count) % 10


def test_crop_and_flip_match_a_loop_over_images(samples):
    images, labels = real_images(samples)
    ours = batches(images, labels, shuffle=True, pad=4, flip=True, seed=3)
    ours.set_epoch(5)
    order, top, left, mirror = ours._draw()
    expected = []
    for i in order:
        padded = np.zeros((40, 40, 3), np.uint8)
        padded[4:36, 4:36] = images[i]
        crop = padded[top[i] : top[i] + 32, left[i] : left[i] + 32]
        crop = crop[:, ::-1] if mirror[i] else crop
        expected.append(((crop / 255 - MEAN) / STD).transpose(2, 0, 1))
    got = list(ours)
    assert [len(x) for x, _ in got] == [7] * 5 + [5]
    assert torch.cat([x for x, _ in got]).numpy() == pytest.approx(np.stack(expected), abs=1e-5)
    assert torch.cat([y for _, y in got]).tolist() == labels[order].tolist()
    assert sorted(order) == list(range(40))
    assert {*top} <= {*range(9)} and {*mirror} == {False, True}


@pytest.mark.parametrize("options", [{"shuffle": True, "pad": 4, "flip": True}, {}])
@pytest.mark.parametrize("side", [(32, 32), (28, 20)])
def test_a_batch_at_a_position_is_that_of_the_iteration(options, side):
    """Epoch after epoch, from the same memory; and pixel by pixel, as GPUs gather it."""
    images, labels = some_images()
    ours = batches(np.ascontiguousarray(images[:, : side[0], : side[1]]), labels, **options)
    position, held = torch.zeros((), dtype=torch.int64), set()
    for epoch in (1, 2):
        ours.set_epoch(epoch)
        ours.hold()
        held.add(ours.held.data_ptr())
        position.zero_()
        for inputs, targets in ours:
            for rows in (ours._rows, ours._pixels):
                ours._images = rows
                found = ours.at(position, len(targets))
                assert torch.equal(found[0], inputs) and torch.equal(found[1], targets)
            position += len(targets)
        assert position == 40
    assert len(held) == 1


def test_normalisation_matches_torchvision(samples):
    transforms = pytest.importorskip("torchvision.transforms")
    images, labels = real_images(samples)
    theirs = transforms.Compose([transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    expected = torch.stack([theirs(Image.fromarray(image)) for image in images])
    got = torch.cat([x for x, _ in batches(images, labels)])
    assert torch.allclose(got, expected, atol=1e-6)


def test_augmentation_is_a_function_of_seed_epoch_and_index():
    images, labels = some_images()

    def epoch(n, **options):
        b = batches(images, labels, **{"shuffle": True, "pad": 4, "flip": True, **options})
        b.set_epoch(n)
        return torch.cat([x for x, _ in b])

    assert torch.equal(epoch(1), epoch(1))
    assert not torch.equal(epoch(1), epoch(2))
    assert not torch.equal(epoch(1), epoch(1, seed=1))
    # The draws lie at about the frequencies they should.
    b = batches(*some_images(9000), shuffle=True, pad=4, flip=True)
    _, top, left, mirror = b._draw()
    for offsets in (top, left):
        assert (np.abs(np.bincount(offsets, minlength=9) - 1000) < 200).all()
    assert mirror.mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_share_the_batches_out(size):
    images, labels = some_images()
    options = {"shuffle": True, "pad": 4, "flip": True}
    whole = list(batches(images, labels, **options))
    parts = [list(batches(images, labels, rank=r, size=size, **options)) for r in range(size)]
    for i, (inputs, _) in enumerate(whole):
        for r in range(size):
            assert torch.equal(parts[r][i][0], inputs[r::size])


def test_test_images_come_once_and_in_order():
    images, labels = some_images()
    assert torch.cat([y for _, y in batches(images, labels)]).tolist() == labels.tolist()


def test_digits_need_no_network(monkeypatch):
    monkeypatch.setattr(socket, "socket", None)
    digits = load("digits", "/nowhere", 128, 128, CPU)
    assert (digits.train.examples, digits.test.examples) == (1437, 360)
    assert (digits.shape, digits.classes) == ((1, 8, 8), 10)
    inputs = torch.cat([x for x, _ in digits.train])
    assert inputs.mean().item() == pytest.approx(0, abs=1e-5)
    assert inputs.std().item() == pytest.approx(1, abs=1e-3)
    counts = torch.cat([y for _, y in digits.train]).bincount() / 1437
    assert counts.min() > 0.08


@pytest.mark.parametrize(
    "fault", ["cut", "flipped byte", "labels", "dtype", "shape", "empty", "no zip"]
)
def test_damaged_arrays_are_named(fault, tmp_path):
    path = tmp_path / "cifar10.npz"
    images, labels = some_images()
    if fault == "labels":
        labels = labels + 5
    if fault == "dtype":
        images = images.astype(np.float32)
    if fault == "shape":
        images = images[:, :28]
    if fault == "empty":
        images, labels = images[:0], labels[:0]
    np.savez(path, train_images=images, train_labels=labels, test_images=images, test_labels=labels)
    content = bytearray(path.read_bytes())
    if fault == "cut":
        content = content[: len(content) // 2]
    if fault == "flipped byte":
        content[len(content) // 3] ^= 1
    if fault == "no zip":
        content = b"<html>not found</html>"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"cifar10\.npz is damaged.*data\.prepare cifar10"):
        load_arrays(path, (32, 32, 3), 10)


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

    def md5(content):
        return hashlib.md5(content).hexdigest()

    cifar = datasets.CIFAR10
    lists = [[[n, md5(contents[n])] for n in files if (n == "test_batch") == test]
             for test in (False, True)]  # fmt: skip
    monkeypatch.setattr(cifar, "tgz_md5", md5(path.read_bytes()))
    monkeypatch.setattr(cifar, "train_list", lists[0])
    monkeypatch.setattr(cifar, "test_list", lists[1])
    monkeypatch.setattr(cifar, "meta", {**cifar.meta, "md5": md5(contents["batches.meta"])})
    monkeypatch.setattr(cifar, "url", "http://127.0.0.1:9/cifar-10-python.tar.gz")  # refused
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
        threading.Thread(target=server.serve_forever, daemon=True).start()
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
            file.extractall(folder if way == "layout" else tmp_path, filter="data")
        source = None if way == "layout" else tmp_path / "cifar-10-batches-py"
    path = prepare("cifar10", folder, source)
    assert path == folder / "cifar10.npz"
    arrays, _ = load_arrays(path, (32, 32, 3), 10)
    assert np.array_equal(arrays["train_images"], images[:25])
    assert arrays["test_labels"].tolist() == labels[25:].tolist()
    left = {p.name for p in folder.iterdir()} - {archive.name, "cifar-10-batches-py"}
    assert left == {"cifar10.npz"}
    # from now on nothing but the one file is touched
    monkeypatch.setattr(data.prepare, "_find", None)
    assert prepare("cifar10", folder) == path


@pytest.mark.parametrize("fault", ["refused", "cut file", "cut url", "missing", "web page", "npz"])
def test_what_cannot_be_had_is_told_and_leaves_the_good_file(fault, tmp_path, monkeypatch, web):
    images, labels = some_images()
    archive = cifar_archive(tmp_path, monkeypatch, images, labels)
    folder = tmp_path / "data"
    good = prepare("cifar10", folder, archive).read_bytes()
    source = {"cut file": archive, "cut url": f"{web}/{archive.name}",
              "web page": f"{web}/", "missing": tmp_path / "missing.tar.gz",
              "npz": tmp_path / "cifar100.npz"}.get(fault)  # fmt: skip
    rest = {f"{s}_{k}": v for s in ("train", "test") for k, v in
            (("images", images), ("labels", np.arange(40) % 20))}  # fmt: skip
    np.savez(tmp_path / "cifar100.npz", **rest)
    archive.write_bytes(archive.read_bytes()[:500])
    if fault == "refused":
        (folder / "cifar10.npz").rename(folder / "kept")
    with pytest.raises(DataError) as error:
        prepare("cifar10", folder, source)
    words = {
        "refused": ["http://127.0.0.1:9/", "cifar-10-python.tar.gz", "MD5", "--from FILE",
                    "--dataset digits"],
        "cut file": ["MD5", str(archive)],
        "cut url": [web, "MD5", "--from FILE"],
        "web page": [web, "MD5"],
        "missing": ["there is no", "missing.tar.gz"],
        "npz": ["cifar10.npz is damaged or another data set"],
    }  # fmt: skip
    assert all(word in str(error.value) for word in words[fault]), error.value
    left = [p for p in folder.iterdir() if p.is_file()]
    assert [p.read_bytes() for p in left] == [good]
    assert not [p for p in folder.iterdir() if p.name.startswith(".")]


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape)
    return header + array.tobytes()


@pytest.mark.parametrize("way", ["packed", "unpacked", "layout"])
def test_prepare_mnist(way, tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    labels = np.arange(30, dtype=np.uint8) % 10
    parts = [images[:20], labels[:20], images[20:], labels[20:]]
    folder = tmp_path / "data" / "MNIST" / "raw" if way == "layout" else tmp_path / "copy"
    folder.mkdir(parents=True)
    for name, part in zip(list(MNIST_MD5), parts):
        content = idx(part)
        monkeypatch.setitem(MNIST_MD5, name, hashlib.md5(content).hexdigest())
        if way == "packed":
            (folder / f"{name}.gz").write_bytes(gzip.compress(content))
        else:
            (folder / name).write_bytes(content)
    path = prepare("mnist", tmp_path / "data", None if way == "layout" else folder)
    arrays, _ = load_arrays(path, (28, 28, 1), 10)
    assert np.array_equal(arrays["train_images"][..., 0], images[:20])
    assert arrays["test_labels"].tolist() == labels[20:].tolist()
    if way == "packed":
        damaged = folder / "t10k-labels-idx1-ubyte.gz"
        damaged.write_bytes(damaged.read_bytes()[:10])
        with pytest.raises(DataError, match="t10k-labels"):
            prepare("mnist", tmp_path / "data", folder)
        assert load_arrays(path, (28, 28, 1), 10)


def test_prepare_makes_a_damaged_file_anew(tmp_path, monkeypatch, capsys):
    archive = cifar_archive(tmp_path, monkeypatch, *some_images())
    (tmp_path / "data").mkdir()
    archive.rename(tmp_path / "data" / archive.name)
    flags = ["cifar10", "--data_dir", str(tmp_path / "data")]
    data.prepare.main(flags)
    good = (tmp_path / "data" / "cifar10.npz").read_bytes()
    (tmp_path / "data" / "cifar10.npz").write_bytes(good[:1000])
    data.prepare.main(flags)
    assert "Set aside" in capsys.readouterr().err
    assert load_arrays(tmp_path / "data" / "cifar10.npz", (32, 32, 3), 10)


@pytest.mark.parametrize(
    "name, shape, classes, mean, std, pad, flip",
    [
        ("mnist", (1, 28, 28), 10, [0.1307], [0.3081], 0, False),
        ("cifar10", (3, 32, 32), 10, [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010], 4, True),
        ("cifar100", (3, 32, 32), 100, [0.5071, 0.4867, 0.4408], [0.2675, 0.2565, 0.2761], 4,
         True),
    ],
)  # fmt: skip
def test_sets_are_normalised_and_augmented_as_documented(
    name, shape, classes, mean, std, pad, flip, tmp_path
):
    images = np.full((200, *shape[1:], shape[0]), 51, np.uint8)  # 0.2
    images[:, :, 0] = 255
    arrays = {"images": images, "labels": np.arange(200) % classes}
    np.savez(tmp_path / f"{name}.npz",
             **{f"{s}_{k}": v for s in ("train", "test") for k, v in arrays.items()})  # fmt: skip
    found = load(name, tmp_path, 50, 50, CPU)
    assert (found.shape, found.classes) == (shape, classes)
    inputs = torch.cat([x for x, _ in found.test])
    for x, level in ((inputs[..., 1], 0.2), (inputs[..., 0], 1.0)):  # nothing moved in testing
        expected = (level - np.array(mean)) / np.array(std)
        assert x.mean((0, 2)).tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.cat([y for _, y in found.test]).tolist() == arrays["labels"].tolist()
    train = found.train
    assert (train.pad, train.flip, train.shuffle) == (pad, flip, True)
    assert torch.cat([y for _, y in train]).tolist() != arrays["labels"].tolist()
    inputs = torch.cat([x for x, _ in train])
    left, right = inputs[:, 0, :, 0].amax(1), inputs[:, 0, :, -1].amax(1)
    assert bool((right > left).any()) == flip  # the white column on the other side
    black = inputs[:, 0].amin((1, 2)) < (0.1 - mean[0]) / std[0]
    assert bool(black.any()) == (pad > 0)


def test_folders_are_normalised_and_augmented_as_documented(folder):
    found = open_folder(folder)
    train, test = found.train.loader.dataset, found.test.loader.dataset
    assert train.train and not test.train
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    first = next(iter(found.test))[0][0]
    expected = (centre_crop(decode(test.samples[0][0]), 32).numpy() / 255 - mean) / std
    assert first.numpy() == pytest.approx(expected.transpose(2, 0, 1), abs=1e-5)
    # half of the training images are mirrored: brighter on the left or on the right
    ramp = torch.arange(0, 256, 4, dtype=torch.uint8)[None, :, None].expand(64, 64, 3)
    sides = [
        random_crop_and_flip(ramp, 32, np.random.default_rng(i)).double() for i in range(200)
    ]
    mirrored = np.mean([(x[:, 0].mean() > x[:, -1].mean()).item() for x in sides])
    assert 0.35 < mirrored < 0.65


def test_real_mnist_in_torchvisions_layout(samples):
    root = samples("mnist")
    mnist = load("mnist", root, 128, 1000, CPU)
    assert (mnist.train.examples, mnist.test.examples, mnist.shape) == (60000, 10000, (1, 28, 28))
    inputs = torch.cat([x for x, _ in mnist.test])
    assert inputs.mean().item() == pytest.approx(0, abs=0.02)


# Image folders


@pytest.fixture
def folder(tmp_path):
    """A small image folder; the images of a class have its own colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for c, name in enumerate(("apple", "pear", "plum")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                size = rng.integers(40, 90, 2)
                pixels = rng.integers(0, 30, (*size, 3), dtype=np.uint8)
                pixels[..., c] += 200
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.jpg")
    return tmp_path


def open_folder(path, **options):
    return load(f"folder:{path}", "", 4, 4, CPU, image_size=32, **options)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_folder_yields_every_image_once(folder, workers):
    found = open_folder(folder, workers=workers)
    assert (found.shape, found.classes) == ((3, 32, 32), 3)
    assert (found.train.examples, found.test.examples, len(found.train)) == (15, 9, 4)
    for part, count in ((found.train, 5), (found.test, 3)):
        part.set_epoch(1)
        got = list(part)
        labels = torch.cat([y for _, y in got])
        assert labels.bincount().tolist() == [count] * 3
        inputs = torch.cat([x for x, _ in got])
        assert inputs.dtype == torch.float32 and all(x.is_contiguous() for x, _ in got)
        assert torch.equal(inputs.mean((2, 3)).argmax(1), labels)  # image and label belong together


def test_folder_order_and_augmentation_do_not_depend_on_workers_or_history(folder):
    def epoch(n, before=0, **options):
        train = open_folder(folder, **options).train
        for i in range(before):
            train.set_epoch(i)
            list(train)
        train.set_epoch(n)
        return torch.cat([x for x, _ in train])

    one = epoch(3)
    assert torch.equal(one, epoch(3, before=2, workers=2))
    assert not torch.equal(one, epoch(4))
    assert not torch.equal(one, epoch(3, seed=1))


def test_random_crop_draws_as_torchvisions(samples):
    """The windows' areas and ratios have the distribution of RandomResizedCrop's."""
    transforms = pytest.importorskip("torchvision.transforms")
    root = samples("imagenet1k-sample") / "imagenet1k-sample" / "train"
    image = Image.open(next(root.glob("*/*"))).convert("RGB")
    windows = []
    for i in range(4000):
        top, left, h, w = random_window(image.height, image.width, np.random.default_rng(i))
        windows.append((h * w, w / h, top, left))
    torch.manual_seed(0)
    theirs = []
    tensor = torch.empty(3, image.height, image.width)
    for _ in range(4000):
        top, left, h, w = transforms.RandomResizedCrop.get_params(tensor, (0.08, 1), (3 / 4, 4 / 3))
        theirs.append((h * w, w / h, top, left))
    for ours, expected in zip(np.array(windows).T, np.array(theirs).T):
        for q in (0.1, 0.5, 0.9):
            spread = expected.max() - expected.min()
            assert abs(np.quantile(ours, q) - np.quantile(expected, q)) < 0.05 * spread


def test_a_window_that_never_fits_falls_back_to_the_centre():
    assert random_window(4, 400, np.random.default_rng(0)) == (0, 197, 4, 5)
    assert random_window(400, 4, np.random.default_rng(0)) == (197, 0, 5, 4)
    out = random_crop_and_flip(torch.zeros(4, 400, 3).byte(), 32, np.random.default_rng(0))
    assert out.shape == (32, 32, 3)


def noise(height, width):
    """A picture that shows every fault of a filter: black and white at random."""
    return np.random.default_rng(0).integers(0, 2, (height, width, 3), dtype=np.uint8) * 255


@pytest.mark.parametrize("size", [(70, 90), (500, 333), (333, 500), (48, 48), (9, 30), (1, 7)])
def test_crops_are_those_of_pil_to_within_rounding(size):
    """Windows, flips and the filter: PIL's bilinear one, which antialiases."""
    transforms = pytest.importorskip("torchvision.transforms")
    image = noise(*size)
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


def test_images_of_the_sample_are_those_of_pil(samples):
    transforms = pytest.importorskip("torchvision.transforms")
    root = samples("imagenet1k-sample") / "imagenet1k-sample" / "train"
    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    for path in sorted(root.glob("*/*"))[:20]:
        image = Image.open(path).convert("RGB")
        ours = decode(path)
        assert np.array_equal(ours.numpy(), np.asarray(image))
        difference = centre_crop(ours, 224).numpy().astype(int) - np.asarray(theirs(image))
        assert np.abs(difference).max() <= 1


def encoded(kind):
    """The bytes of a small image file."""
    y, x = np.mgrid[:60, :90]
    pixels = np.stack([2 * x, 3 * y, x * y % 256], 2).astype(np.uint8)
    image = Image.fromarray(pixels)
    kind, _, variant = kind.partition(" ")
    options = {
        "progressive": {"progressive": True}, "thin": {"subsampling": 2, "quality": 30},
        "full": {"subsampling": 0}, "restarting": {"restart_marker_blocks": 2},
        "as RGB": {"subsampling": 0, "keep_rgb": True}, "transparent": {"transparency": 3},
    }.get(variant, {})  # fmt: skip
    if variant in ("L", "1", "LA", "P"):
        image = image.convert(variant)
    if variant == "CMYK":
        image = Image.merge("CMYK", [*image.split(), image.convert("L")])
    if variant == "transparent":
        image = image.quantize(16)
    if variant == "16 bits":
        image = Image.fromarray(pixels[..., 2].astype(np.uint16) * 257)
    if variant == "turned":
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = 6
    if variant == "alpha":
        image.putalpha(Image.fromarray(pixels[..., 0]))
    made = io.BytesIO()
    if kind == "MPO":
        options = {"save_all": True, "append_images": [image.rotate(180)]}
    image.save(made, kind, **options)
    return made.getvalue()


JPEGS = ["", "progressive", "thin", "full", "restarting", "as RGB", "L", "turned"]
OTHERS = ["JPEG CMYK", "PNG", "PNG P", "PNG transparent", "PNG alpha", "PNG 16 bits", "PNG 1",
          "PNG LA", "GIF", "GIF transparent", "BMP", "WEBP", "WEBP alpha", "TIFF", "TIFF CMYK",
          "PPM", "MPO"]  # fmt: skip


@pytest.mark.parametrize("kind", [f"JPEG {k}".strip() for k in JPEGS] + OTHERS)
def test_every_kind_of_image_is_decoded_as_pil_does(kind, tmp_path, monkeypatch):
    path = tmp_path / "image.jpeg"  # the name says nothing
    path.write_bytes(encoded(kind))
    with Image.open(path) as file:
        expected = np.asarray(file.convert("RGB"))
    assert expected.std() > 20
    with monkeypatch.context() as patch:
        if kind not in OTHERS:  # these take the quicker way
            patch.setattr(Image.Image, "convert", None)
        found = decode(path)
    assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), expected)
    monkeypatch.delattr("torchvision.io.decode_jpeg")  # a later torchvision
    assert np.array_equal(decode(path).numpy(), expected)


def outcome(read, path):
    try:
        return np.asarray(read(path))
    except Exception as error:
        return f"{type(error).__name__}: {reason(error)}"


def by_pil(path):
    with Image.open(path) as file:
        return file.convert("RGB")


@pytest.mark.parametrize("kind", ["JPEG", "JPEG progressive", "JPEG L", "JPEG restarting"])
def test_a_cut_jpeg_is_bad_wherever_it_is_cut(kind, tmp_path):
    path, whole = tmp_path / "image.jpg", encoded(kind)
    for n in {*range(0, len(whole), 7), *range(len(whole) - 20, len(whole))}:
        path.write_bytes(whole[:n])
        found = outcome(decode, path)
        assert np.array_equal(found, outcome(by_pil, path)), n
        # Of grey images PIL forgives that the end is not marked.
        assert isinstance(found, str) or (kind == "JPEG L" and n >= len(whole) - 2), n


@pytest.mark.filterwarnings("ignore::UserWarning")  # of PIL, on EXIF data
@pytest.mark.parametrize("kind", ["JPEG", "JPEG progressive", "JPEG L", "JPEG turned"])
def test_a_damaged_jpeg_is_what_pil_makes_of_it(kind, tmp_path):
    """Bytes changed, left out or at the end: the same pixels, or the same error."""
    path, whole = tmp_path / "image.jpg", encoded(kind)
    rng = np.random.default_rng(0)
    cases = [whole + b"and more", whole[:-400] + whole[-2:]]
    for i in range(150):
        content = bytearray(whole)
        for at in rng.integers(0, 700 if i % 2 else len(whole), 3):
            content[at] = rng.integers(0, 256)
        cases.append(bytes(content))
    seen = {str: 0, np.ndarray: 0}
    for content in cases:
        path.write_bytes(content)
        found, expected = outcome(decode, path), outcome(by_pil, path)
        assert np.array_equal(found, expected)
        seen[type(found)] += 1
    assert min(seen.values()) > 10


def test_a_jpeg_that_claims_a_monstrous_size_is_refused(tmp_path, monkeypatch):
    (tmp_path / "image.jpg").write_bytes(encoded("JPEG"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 90 // 2 - 1)  # PIL allows twice that
    with pytest.raises(Image.DecompressionBombError):
        decode(tmp_path / "image.jpg")


def test_a_worker_fills_a_batch_in_shared_memory(folder, monkeypatch):
    images = open_folder(folder).train.loader.dataset
    items = [(0, 3), (0, 14), (0, 7)]
    here, labels, bad = images.__getitems__(items)
    monkeypatch.setattr(data.folders, "get_worker_info", lambda: "a worker")
    there, _, _ = images.__getitems__(items)
    assert there.is_shared() and not here.is_shared()
    assert torch.equal(here, there) and here.shape == (3, 32, 32, 3)
    assert (labels.tolist(), bad) == ([0, 2, 1], [])
    assert torch.equal(here[1], images[0, 14][0])
    assert images.__getitems__([])[0].shape == (0, 32, 32, 3)  # a rank without a share


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_stop_the_run_or_are_left_out(folder, workers):
    cut, text = folder / "train" / "pear" / "1.jpg", folder / "train" / "plum" / "2.jpg"
    cut.write_bytes(cut.read_bytes()[:300])
    text.write_text("no image")
    with pytest.raises(DataError, match=r"(pear.1|plum.2)\.jpg.*--skip_bad_images"):
        list(open_folder(folder, workers=workers).train)
    train = open_folder(folder, workers=workers, skip_bad_images=True).train
    for n in range(2):
        train.set_epoch(n)
        images, labels = (torch.cat(parts) for parts in zip(*train))
        assert len(labels) == 13 and torch.equal(images.mean((2, 3)).argmax(1), labels)
    assert {Path(p).name for p in train.bad_images} == {"1.jpg", "2.jpg"}


def test_a_folder_of_nothing_but_bad_images(folder):
    for path in folder.glob("train/*/*"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the 15 images"):
        list(open_folder(folder, skip_bad_images=True).train)


def test_folder_faults_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="no folder .*train"):
        open_folder(tmp_path / "nowhere")
    (folder / "val" / "plum").rename(folder / "val" / "grape")
    with pytest.raises(DataError, match="grape, plum"):
        open_folder(folder)
    (folder / "val" / "grape").rename(folder / "val" / "plum")
    (folder / "imagenet").mkdir()
    for split in ("train", "val"):
        (folder / split).rename(folder / "imagenet" / split)
    with pytest.raises(DataError, match="3 class folders, not 1000"):
        load("imagenet", folder, 4, 4, CPU)
    for path in (folder / "imagenet" / "train" / "pear").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no images under"):
        open_folder(folder / "imagenet")


def test_the_imagenet_sample(samples, tmp_path):
    root = samples("imagenet1k-sample") / "imagenet1k-sample" / "train"
    (tmp_path / "imagenet").mkdir()
    for split in ("train", "val"):
        (tmp_path / "imagenet" / split).symlink_to(root)
    found = load("imagenet", tmp_path, 100, 100, CPU, workers=2)
    assert (found.classes, found.shape, found.train.examples) == (1000, (3, 224, 224), 1000)
    inputs, labels = next(iter(found.test))
    assert inputs.shape == (100, 3, 224, 224)
    assert labels.tolist() == list(range(100))
    assert inputs.mean().abs() < 0.5


def write_npz(path, images, labels):
    np.savez(path, **{f"{s}_{k}": v for s in ("train", "test")
                      for k, v in (("images", images), ("labels", labels))})  # fmt: skip


@pytest.mark.parametrize("channels", [1, 3])
def test_a_prepared_file_of_ones_own(channels, tmp_path):
    """Classes, side, mean and deviation come from the file; colours are augmented like CIFAR's."""
    images = np.random.default_rng(0).integers(0, 90, (60, 16, 16, channels), dtype=np.uint8)
    write_npz(tmp_path / "mine.npz", images, np.arange(60) % 7)
    found = load("npz:mine.npz", tmp_path, 20, 20, CPU)
    assert (found.shape, found.classes) == ((channels, 16, 16), 7)
    assert (found.train.pad, found.train.flip) == ((2, True) if channels == 3 else (0, False))
    inputs = torch.cat([x for x, _ in found.test]).double()
    assert inputs.mean((0, 2, 3)).tolist() == pytest.approx([0] * channels, abs=1e-4)
    assert inputs.std((0, 2, 3)).tolist() == pytest.approx([1] * channels, abs=1e-3)
    elsewhere = load(f"npz:{tmp_path / 'mine.npz'}", "nowhere", 20, 20, CPU)
    assert elsewhere.source == found.source and found.source["file"] == "mine.npz"


@pytest.mark.parametrize("fault", ["missing", "no archive", "shape", "labels", "gap"])
def test_a_file_of_ones_own_with_a_fault_is_named(fault, tmp_path):
    images, labels = np.zeros((6, 8, 8, 3), np.uint8), np.arange(6) % 3
    if fault == "shape":
        images = images[..., 0]
    if fault == "labels":
        labels = labels + 1
    if fault == "gap":
        labels = labels * 2
    if fault == "no archive":
        (tmp_path / "mine.npz").write_bytes(b"mine")
    elif fault != "missing":
        write_npz(tmp_path / "mine.npz", images, labels)
    said = "mine.npz is damaged or another.*data.prepare --help"
    with pytest.raises(DataError, match="no .*mine.npz" if fault == "missing" else said):
        load("npz:mine.npz", tmp_path, 2, 2, CPU)


def test_a_blank_channel_is_no_division_by_zero(tmp_path):
    images = np.zeros((6, 8, 8, 3), np.uint8)
    write_npz(tmp_path / "mine.npz", images, np.arange(6) % 3)
    for x, _ in load("npz:mine.npz", tmp_path, 2, 2, CPU).test:
        assert bool((x == 0).all())


def test_a_part_of_a_set_is_its_first_images(tmp_path):
    images, labels = some_images(40)
    write_npz(tmp_path / "cifar10.npz", images, labels)
    whole = load("cifar10", tmp_path, 8, 8, CPU)
    part = load("cifar10", tmp_path, 8, 8, CPU, train_examples=12, test_examples=40)
    assert (part.train.examples, part.test.examples, part.classes) == (12, 40, 10)
    assert torch.equal(part.train.images, whole.train.images[:12])
    assert part.train.labels.tolist() == whole.train.labels[:12].tolist()
    with pytest.raises(DataError, match="40 images for --test_examples, not 41"):
        load("cifar10", tmp_path, 8, 8, CPU, test_examples=41)


def test_channel_statistics_are_numpys():
    images = some_images(30)[0]
    mean, std = data.channel_statistics(images)
    assert mean == pytest.approx((images / 255).mean((0, 1, 2)), rel=1e-12)
    assert std == pytest.approx((images / 255).std((0, 1, 2)), rel=1e-12)
