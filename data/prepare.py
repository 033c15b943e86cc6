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
Exit code: 0 all well (of a shard: its own part), 1 something corrupt, missing
or impossible, 2 a wrong flag, 130 after Ctrl-C.
"""

import argparse
import contextlib
import gzip
import os
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
    """(train, test), torchvision's data sets, from what is at hand or fetched into `scratch`."""
    if source is not None and "://" not in str(source):
        return _from_copy(name, Path(source).expanduser(), scratch)
    dataset = _dataset(name, url=source)
    if source is None:
        found = data_dir / ("MNIST/raw" if name == "mnist" else dataset.base_folder)
        archive = data_dir / _files(dataset)[0][0]
        try:
            if found.exists():
                return _read(name, data_dir)
            if name != "mnist" and archive.exists():
                return _from_copy(name, archive, scratch)
        except (DataError, RuntimeError) as error:
            print(f"Not used: {error}", file=sys.stderr)
    print(f"Fetching {name} from {' or '.join(_addresses(dataset))}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        dataset(scratch, download=True)
        return _read(name, scratch)
    except (OSError, RuntimeError, EOFError) as error:
        raise DataError(_advice(name, dataset, error, data_dir)) from error
    finally:
        socket.setdefaulttimeout(timeout)


def _from_copy(name, source, scratch):
    dataset, folder = _dataset(name), scratch
    if not source.exists():
        raise DataError(f"there is no {source}")
    if name == "mnist":
        at = source.parent if source.is_file() else source
        at = next((p for p in (at / "MNIST" / "raw", at / "raw") if p.is_dir()), at)
        raw = scratch / "MNIST" / "raw"
        raw.mkdir(parents=True)
        for file in MNIST_MD5:
            if (at / file).exists():
                shutil.copyfile(at / file, raw / file)
            elif (at / f"{file}.gz").exists():
                packed = (at / f"{file}.gz").read_bytes()
                with contextlib.suppress(OSError, EOFError, zlib.error):  # then its MD5 is wrong
                    (raw / file).write_bytes(gzip.decompress(packed))
            else:
                raise DataError(f"there is no {file} or {file}.gz in {at}")
    elif source.is_file():
        if not _verified(source, dataset.tgz_md5):
            raise DataError(
                f"{source} is not the whole {dataset.filename}: its MD5 should be "
                f"{dataset.tgz_md5}; fetch it again from {dataset.url}"
            )
        with tarfile.open(source) as archive:
            archive.extractall(scratch, filter="data")
    else:
        folder = source.parent if source.name == dataset.base_folder else source
    try:
        return _read(name, folder)
    except RuntimeError as error:
        raise DataError(f"{source} does not hold the whole of {name}: {error}") from error


def _read(name, root):
    """(train, test) from torchvision's layout under root; RuntimeError where it is not whole."""
    if name == "mnist":
        for file, md5 in MNIST_MD5.items():
            if not _verified(Path(root, "MNIST", "raw", file), md5):
                raise RuntimeError(f"{root}/MNIST/raw/{file} is missing or damaged")
    try:
        return _dataset(name)(root, train=True), _dataset(name)(root, train=False)
    except RuntimeError as error:
        raise RuntimeError(f"{root}/{_dataset(name).base_folder} is missing or damaged") from error


def _write(path, splits):
    arrays = {}
    for split, dataset in zip(("train", "test"), splits):
        images = np.asarray(dataset.data, dtype=np.uint8)
        arrays[f"{split}_images"] = images if images.ndim == 4 else images[..., None]
        arrays[f"{split}_labels"] = np.asarray(dataset.targets, dtype=np.int64)
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


def _verified(path, md5):
    from torchvision.datasets.utils import check_integrity

    return check_integrity(str(path), md5)


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
    parser = argparse.ArgumentParser(
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
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; nothing was written")
    print(f"{args.name} is ready: {path}")


if __name__ == "__main__":
    main()
