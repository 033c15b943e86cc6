"""Fetch a small data set once, verify it, and write it as one file that loads
in a second; or check ImageNet and make it ready for training.

    python -m data.prepare cifar10                      fetch from the set's own address
    python -m data.prepare cifar10 --from FILE_OR_URL   or from a copy

What lies under the data directory in torchvision's layout (MNIST/raw,
cifar-10-batches-py, cifar-100-python) is used before anything is fetched. The
result, <data_dir>/<name>.npz, holds train_images, test_images uint8
(N, H, W, C) and train_labels, test_labels int64 (N,), uncompressed; copy it to
a machine without a network as it is.

    python -m data.prepare imagenet --from DIR            checked and linked
    python -m data.prepare imagenet --from DIR --resize   a smaller copy

DIR holds ILSVRC 2012, unpacked: train/CLASS/ and val/CLASS/, or val/ with its
images side by side, which are sorted by --val_labels or by the labels that lie
in or beside DIR. The result, <data_dir>/imagenet, is links or, with --resize, a
copy; DIR itself is never changed. Every image is decoded once; those that
cannot be are listed in <data_dir>/imagenet/corrupt.txt. The same command goes
on where an earlier one ended. Many machines share the work with --shard 1/8 to
--shard 8/8, after which the command without it says what is still missing.
Exit code: 0 all well (of a shard: its own part), 1 some images are corrupt or
missing, 2 a wrong flag or data that are none, 130 after Ctrl-C.
"""

import argparse
import contextlib
import functools
import gzip
import hashlib
import io
import math
import os
import pickle
import shutil
import socket
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

import numpy as np

from data import imagenet
from data.arrays import load_arrays
from data.common import DataError, default_data_dir

# name -> torchvision's class, the shape of an image, the number of classes
SETS = {
    "mnist": ("MNIST", (28, 28, 1), 10),
    "cifar10": ("CIFAR10", (32, 32, 3), 10),
    "cifar100": ("CIFAR100", (32, 32, 3), 100),
}

# torchvision knows the checksums of MNIST's packed files; these are of the unpacked ones.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
LARGEST = 2**28  # bytes: no file of MNIST or CIFAR is as long, unpacked
TIMEOUT = 30  # seconds without an answer after which an address counts as dead


def prepare(name, data_dir, source=None):
    """The path of the prepared data set, made first where it is missing.

    `source` is a copy to make it from: the original archive (MNIST: a folder of its four files), a
    folder in torchvision's layout, a prepared .npz, or the URL of an archive (MNIST: of the folder
    of its files). Raises DataError, with the way out, where none of that yields a whole data set;
    a file that was there before is then still as it was.
    """
    data_dir = Path(data_dir).expanduser()
    path = data_dir / f"{name}.npz"
    if path.exists() and source is None:
        return path
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # Everything unfinished stays in a folder of its own, beside the result so that the last
        # step is a rename.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir) as scratch:
            made = Path(scratch, path.name)
            if str(source).endswith(".npz") and "://" not in str(source):
                shutil.copyfile(Path(source).expanduser(), made)
            else:
                _write(made, _find(name, data_dir, source, Path(scratch)))
            load_arrays(made, *SETS[name][1:])
            os.replace(made, path)
    except OSError as error:
        raise DataError(f"{name} could not be prepared in {data_dir}: {error}") from error
    return path


def _find(name, data_dir, source, scratch):
    """((images, labels) for training, and for testing), from what is at hand or fetched into
    `scratch`."""
    if source is not None and "://" not in str(source):
        return _from_copy(name, Path(source).expanduser())
    dataset = _dataset(name, url=source)
    if source is None:
        found = data_dir / ("MNIST/raw" if name == "mnist" else dataset.base_folder)
        archive = data_dir / _files(dataset)[0][0]
        try:
            if found.exists():
                return _read(name, found)
            if name != "mnist" and archive.exists():
                return _from_copy(name, archive)
        except DataError as error:
            print(f"Not used: {error}", file=sys.stderr)
    print(f"Fetching {name} from {' or '.join(_addresses(dataset))}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        if name == "mnist":
            dataset(scratch, download=True)
            return _read(name, scratch / "MNIST" / "raw")
        from torchvision.datasets.utils import download_url

        download_url(dataset.url, scratch, dataset.filename, dataset.tgz_md5)
        return _from_copy(name, scratch / dataset.filename)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(_advice(name, dataset, error, data_dir)) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _from_copy(name, source):
    dataset = _dataset(name)
    if not source.exists():
        raise DataError(f"there is no {source}")
    if name == "mnist":
        at = source.parent if source.is_file() else source
        return _read(name, next((p for p in (at / "MNIST" / "raw", at / "raw") if p.is_dir()), at))
    if source.is_dir():
        inside = source / dataset.base_folder
        return _read(name, inside if inside.is_dir() else source)
    if not source.is_file() or _md5(source) != dataset.tgz_md5:
        raise DataError(
            f"{source} is not the whole {dataset.filename}: its MD5 should be "
            f"{dataset.tgz_md5}; fetch it again from {dataset.url}"
        )
    # Nothing is unpacked: the members are read where they are.
    try:
        with tarfile.open(source) as archive:
            return _cifar(dataset, lambda name: _member(archive, f"{dataset.base_folder}/{name}"))
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise DataError(f"{source} is damaged: {error}") from error


def _member(archive, name):
    try:
        file = archive.extractfile(name)
    except KeyError:
        return b""
    return file.read(LARGEST) if file else b""  # none for a folder or a device


def _read(name, folder):
    """((images, labels) for training, and for testing) from the original files in a folder."""
    read = functools.partial(_content, folder)
    return _mnist(folder, read) if name == "mnist" else _cifar(_dataset(name), read, folder)


def _content(folder, name):
    """The bytes of a file, or of what name.gz holds; none where there is no such file, or where it
    is longer than any of these sets'."""
    path, packed = Path(folder, name), Path(folder, f"{name}.gz")
    if path.is_file():
        with open(path, "rb") as file:
            return file.read(LARGEST)
    if packed.is_file():
        with contextlib.suppress(OSError, EOFError, zlib.error), gzip.open(packed) as file:
            return file.read(LARGEST)
    return b""


def _verified(content, md5, what):
    """`content`, if it is what has always been there; it may be read as the format says then."""
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise DataError(f"{what} is missing or damaged")
    return content


def _mnist(folder, read):
    parts = [_idx(_verified(read(name), md5, f"{folder}/{name} (or {name}.gz)"), name)
             for name, md5 in MNIST_MD5.items()]  # fmt: skip
    return parts[:2], parts[2:]


def _idx(content, name):
    """The uint8 array of an idx file."""
    dimensions = content[3] if content[:3] == b"\0\0\x08" and len(content) > 3 else 0
    shape = [int.from_bytes(content[4 * i : 4 * i + 4], "big") for i in range(1, dimensions + 1)]
    if dimensions not in (1, 3) or math.prod(shape) != len(content) - 4 * (dimensions + 1):
        raise DataError(f"{name} is no idx file of bytes")
    return np.frombuffer(content, np.uint8, offset=4 * (dimensions + 1)).reshape(shape)


def _cifar(dataset, read, where="the archive"):
    splits = []
    for files in (dataset.train_list, dataset.test_list):
        contents = {name: _verified(read(name), md5, f"{where}/{name}") for name, md5 in files}
        batches = [unpickle(content, f"{where}/{name}") for name, content in contents.items()]
        try:
            labels = [label for x in batches for label in x.get("labels") or x["fine_labels"]]
            images = np.concatenate([x["data"] for x in batches])
            images = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            splits.append((images, np.asarray(labels, dtype=np.int64)))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(f"{where} holds something else than {dataset.__name__}") from error
    return splits


def unpickle(content, what):
    """The dict of a file of CIFAR's, which is a pickle.

    Nothing that the pickle names is called, not even numpy's own: arrays are made here, of the
    bytes that stand in it. Raises DataError where it names anything else, or is no dict.
    """
    try:
        found = _Plain(io.BytesIO(content), encoding="latin-1").load()
        return {key: x.array() if isinstance(x, _Array) else x for key, x in found.items()}
    except Exception as error:  # a damaged pickle raises whatever it comes upon
        raise DataError(f"{what} is no batch of CIFAR's: {error}") from error


class _Plain(pickle.Unpickler):
    """Numbers, texts, lists, dicts, and arrays of bytes; everything else is refused."""

    def find_class(self, module, name):
        stand_ins = {"_reconstruct": _Array, "ndarray": _Array, "dtype": _Array}
        if name not in stand_ins or module.split(".")[0] != "numpy":
            raise ValueError(f"it asks for {module}.{name}")
        return stand_ins[name]


class _Array:
    """What an array, or its type, is unpickled to: what it would be made of."""

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state

    def array(self):
        """uint8, of the shape and order that numpy has written down."""
        _, shape, dtype, fortran, content = self.state
        if dtype.args[0] not in ("u1", "|u1"):
            raise ValueError("an array that is not uint8")
        content = content.encode("latin-1") if isinstance(content, str) else content
        return np.frombuffer(content, np.uint8).reshape(shape, order="F" if fortran else "C")


def _write(path, splits):
    arrays = {}
    for split, (images, labels) in zip(("train", "test"), splits):
        arrays[f"{split}_images"] = images if images.ndim == 4 else images[..., None]
        arrays[f"{split}_labels"] = labels.astype(np.int64)
    np.savez(path, **arrays)


def _dataset(name, url=None):
    """torchvision's class, fetching from `url` if one is given."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{name} is made with torchvision: pip install torchvision") from error
    dataset = getattr(datasets, SETS[name][0])
    if url is None:
        return dataset
    # torchvision derives MNIST's folder from the name of the class, so the name stays.
    place = {"mirrors": [url.rstrip("/") + "/"]} if name == "mnist" else {"url": url}
    return type(dataset.__name__, (dataset,), place)


def _md5(path):
    digest = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _addresses(dataset):
    return getattr(dataset, "mirrors", None) or [dataset.url]


def _files(dataset):
    return getattr(dataset, "resources", None) or [(dataset.filename, dataset.tgz_md5)]


def _advice(name, dataset, error, data_dir):
    files = "".join(f"\n  file      {file}  MD5 {md5}" for file, md5 in _files(dataset))
    addresses = "".join(f"\n  address   {address}" for address in _addresses(dataset))
    copy = "FOLDER" if name == "mnist" else "FILE"
    return (
        f"{name} could not be fetched: {' '.join(str(error).split())}{addresses}{files}\n"
        f"Fetch it by hand on any machine, then:\n"
        f"  python -m data.prepare {name} --data_dir {data_dir} --from {copy}\n"
        "To try without a network:\n"
        "  python main.py --dataset digits"
    )


def main(argv=None):
    from cli import Parser  # what the data themselves do without

    parser = Parser(
        prog="python -m data.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=[*SETS, "imagenet"])
    parser.add_argument("--data_dir", default=default_data_dir(), help="(default: %(default)s)")
    parser.add_argument("--from", dest="source", metavar="FILE_OR_URL",
                        help="a copy to use; imagenet: a folder (default: $IMAGENET_PATH)")
    imagenet.add_flags(parser)
    args = parser.parse_args(argv)
    if args.name == "imagenet":
        imagenet.run(parser, args)
    for flag in imagenet.FLAGS:
        if getattr(args, flag) is not None:
            parser.error(f"--{flag} is for imagenet, not {args.name}")
    try:
        path = Path(args.data_dir).expanduser() / f"{args.name}.npz"
        if path.exists() and args.source is None:
            try:
                load_arrays(path, *SETS[args.name][1:])
            except DataError as error:
                print(f"Set aside: {error}", file=sys.stderr)
                path.rename(path.with_suffix(".damaged"))
        path = prepare(args.name, args.data_dir, args.source)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
    print(f"{args.name} is ready: {path}")


if __name__ == "__main__":
    main()
