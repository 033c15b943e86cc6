"""Fetch a small data set once, verify it, and write it as one file that loads
in a second; check ImageNet and make it ready; or make tokens of texts.

    python -m data.prepare cifar10                      fetch from the set's own address
    python -m data.prepare cifar10 --from FILE_OR_URL   or from a copy

What lies under the data directory in torchvision's layout (MNIST/raw,
cifar-10-batches-py, cifar-100-python) is used before anything is fetched. The
result, <data_dir>/<name>.npz, holds train_images, test_images uint8
(N, H, W, C) and train_labels, test_labels int64 (N,), uncompressed; copy it to
a machine without a network as it is. In a file of your own, for --dataset
npz:FILE, images may also be (N, H, W) or have their channels first, and labels,
numbered from 0 without a gap, any type of number or (N, 1).

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
missing, 2 a wrong flag or data that are none, 130 after Ctrl-C or SIGTERM.

    python -m data.prepare text --from FILE      a UTF-8 text, or documents as JSONL
    python -m data.prepare text --from FOLDER    all .txt and .jsonl files below it

A text may be packed (.gz, .bz2, .xz); a line of JSONL is a document, {"text": "..."}. The result,
<data_dir>/<name>-<encoding>, is train.bin, val.bin and meta.json for
--dataset tokens:FOLDER: GPT-2's tokens by the package tiktoken, each document
followed by <|endoftext|>, or bytes. Files or folders called train and val are
taken as such. Else validation gets the last tenth of a text, of a hundred texts
or more every tenth one, of JSONL one document in ten; of more than 100 MB it is
about 10 MB of documents. The same command goes on where an earlier one ended.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import contextlib
import gzip
import hashlib
import os
import pickle
import shutil
import signal
import socket
import tarfile
import tempfile
import zlib

from cli import Parser, UserError, a_path, command, expand, number, one_of
from data import DATASETS, DataError, data_folder, default_data_dir, imagenet
from data.common import reason

# torchvision has the checksums of MNIST's packed files; these are of the unpacked ones.
MNIST_MD5 = {
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
# Data sets with flags of their own.
FLAGS = {"imagenet": imagenet.FLAGS, "text": ("jobs", "encoding")}
LARGEST = 2**28  # bytes: no file of MNIST or CIFAR is as long
TIMEOUT = 30  # seconds without an answer after which an address counts as dead


def prepare(name, data_dir, source=None, check=False):
    """The path of the prepared data set, made first if it is missing or, with `check`, damaged.

    `source` is a copy to make it from: the original archive (MNIST: a folder of its four files), a
    folder in torchvision's layout, a prepared .npz, or the URL of an archive (MNIST: of the folder
    of its files). Raises DataError, with the way out, if none of them holds a whole data set; a
    file that was there before is then unchanged.
    """
    import numpy as np  # and torch: not in the processes that prepare ImageNet

    from data.arrays import load_arrays

    data_dir, source = data_folder(data_dir), source and expand(source)
    path, local = data_dir / f"{name}.npz", source is not None and "://" not in str(source)
    if path.exists() and source is None:
        with contextlib.suppress(DataError):
            if check:
                load_arrays(path, *DATASETS[name][:2])
            return path
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        # Unfinished files lie beside the result, so that the last step is a rename.
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=data_dir) as scratch:
            made = Path(scratch, path.name)
            if local and str(source).endswith(".npz"):
                shutil.copyfile(source, made)
            else:
                np.savez(made, **_arrays(name, data_dir, source, scratch))
            load_arrays(made, *DATASETS[name][:2])
            os.replace(made, path)
    except OSError as error:
        raise DataError(f"{name} could not be prepared in {data_dir}: {reason(error)}; give "
                        "another --data_dir, or set $AGD_DATA") from error  # fmt: skip
    return path


def _arrays(name, data_dir, source, scratch):
    """The arrays to write, from a copy or fetched into `scratch`."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise DataError(f"{name} is made with torchvision: pip install torchvision") from error
    dataset = getattr(datasets, name.upper())
    if source is not None and "://" not in str(source):
        return _from_copy(dataset, Path(source))
    if source is None:
        for place in ("MNIST/raw",) if name == "mnist" else (dataset.base_folder, dataset.filename):
            if (data_dir / place).exists():
                try:
                    return _from_copy(dataset, data_dir / place)
                except DataError as error:
                    print(f"Not used: {error}", file=sys.stderr)
    else:  # torchvision derives MNIST's folder from the name of the class, so the name stays
        at = {"mirrors": [source.rstrip("/") + "/"]} if name == "mnist" else {"url": source}
        dataset = type(dataset.__name__, (dataset,), at)
    addresses = getattr(dataset, "mirrors", None) or [dataset.url]
    print(f"Fetching {name} from {' or '.join(addresses)}", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)
    try:
        dataset(scratch, download=True)
    except (OSError, RuntimeError, EOFError) as error:
        files = getattr(dataset, "resources", None) or [(dataset.filename, dataset.tgz_md5)]
        raise DataError("\n".join([
            f"{name} could not be fetched: {reason(error)}",
            *(f"  address   {address}" for address in addresses),
            *(f"  file      {file}  MD5 {md5}" for file, md5 in files),
            "Fetch it by hand on any machine, then give it as FILE (mnist: the folder) to\n  "
            + command("data.prepare", name, "--data_dir", data_dir, "--from", "FILE"),
            f"To try without a network:\n  {command('main', '--dataset', 'digits')}",
        ])) from error  # fmt: skip
    finally:
        socket.setdefaulttimeout(timeout)
    return _from_copy(dataset, Path(scratch))


def _from_copy(dataset, source):
    """The arrays of the original files in or below a folder, or in CIFAR's archive."""
    from torchvision.datasets.utils import check_integrity

    if not source.exists():
        raise DataError(f"there is no {source}")
    if dataset.__name__ == "MNIST" and source.is_file():
        source = source.parent
    if source.is_dir():
        inside = "MNIST/raw", "raw", getattr(dataset, "base_folder", "raw")
        folder = next((source / x for x in inside if (source / x).is_dir()), source)
        return _original(dataset, lambda name: _content(folder, name), folder)
    if not check_integrity(source, dataset.tgz_md5):
        raise DataError(
            f"{source} is not the whole {dataset.filename}: its MD5 should be "
            f"{dataset.tgz_md5}; fetch it again from {dataset.url}"
        )
    with tarfile.open(source) as archive:  # nothing is unpacked
        folder = dataset.base_folder
        return _original(dataset, lambda name: archive.extractfile(f"{folder}/{name}").read())


def _content(folder, name):
    """The first LARGEST bytes of a file, or of what name.gz holds; none if there are none."""
    for path, open_file in ((folder / name, open), (folder / f"{name}.gz", gzip.open)):
        if path.is_file():  # and no pipe
            with contextlib.suppress(OSError, EOFError, zlib.error), open_file(path, "rb") as file:
                return file.read(LARGEST)
    return b""


def _original(dataset, read, where="the archive"):
    """The arrays of the original files, `read(name)` being the bytes of one.

    Nothing is made of a file before its MD5 is the authors'. Then pickle may load it, and MNIST's
    idx files need no parser: their headers have 16 bytes (images) and 8 (labels).
    """
    import numpy as np

    from data.arrays import KEYS

    def verified(name, md5):
        content = read(name)
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            raise DataError(f"{where}/{name} is missing or damaged")
        return content

    arrays = {}
    if dataset.__name__ == "MNIST":
        for key, file in zip(KEYS, MNIST_MD5.items()):
            content = np.frombuffer(verified(*file), np.uint8)
            arrays[key] = (content[8:].astype(np.int64) if "labels" in key else
                           content[16:].reshape(-1, 28, 28, 1))  # fmt: skip
        return arrays
    for split, files in (("train", dataset.train_list), ("test", dataset.test_list)):
        batches = [pickle.loads(verified(*file), encoding="latin1") for file in files]
        images = np.concatenate([batch["data"] for batch in batches])
        labels = [x for batch in batches for x in batch.get("labels") or batch["fine_labels"]]
        arrays[f"{split}_images"] = images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        arrays[f"{split}_labels"] = np.array(labels, np.int64)
    return arrays


def main(argv=None):
    """The exit code of the command."""
    parser = Parser(
        prog=command("data.prepare"),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ["mnist", "cifar10", "cifar100", "imagenet", "text"]
    parser.add_argument("name", type=one_of(names), metavar="NAME",
                        help="mnist, cifar10, cifar100, imagenet or text")  # fmt: skip
    parser.add_argument("--data_dir", default=default_data_dir(), help="(default: %(default)s)")
    parser.add_argument("--from", dest="source", type=a_path, metavar="FILE_OR_URL",
                        help="a copy to use; imagenet: a folder (default: $IMAGENET_PATH); text: a "
                        "file or a folder")  # fmt: skip
    parser.add_argument("--jobs", type=number(int, 1), metavar="N",
                        help="processes, for imagenet and text (default: the usable cores)")
    parser.add_argument("--encoding", type=one_of(["gpt2", "bytes"]), metavar="gpt2|bytes",
                        help="of a text (default: gpt2 where the package tiktoken is installed, "
                        "else bytes)")  # fmt: skip
    imagenet.add_flags(parser)
    args = parser.parse_args(argv)
    given = {}
    for flag in dict.fromkeys(flag for flags in FLAGS.values() for flag in flags):
        if getattr(args, flag) is not None:
            given[flag] = getattr(args, flag)
            takers = [name for name, flags in FLAGS.items() if flag in flags]
            if args.name not in takers:
                parser.error(f"--{flag} is for {' and '.join(takers)}, not {args.name}")
    source = args.source
    try:
        if args.name == "imagenet":
            source = source or imagenet.named() or parser.error(
                "imagenet is made from a copy: --from DIR, or $IMAGENET_PATH")  # fmt: skip
            return imagenet.prepare(source, args.data_dir, **given)
        if args.name == "text":
            from data import corpus  # numpy

            source = source or parser.error("text is made from files: --from FILE_OR_FOLDER")
            return corpus.prepare(source, args.data_dir, **given)
        print(f"{args.name} is ready: {prepare(args.name, args.data_dir, source, check=True)}")
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        begun = os.path.isdir(data_folder(args.data_dir) / args.name)
        then = "the same command goes on from what is there" if begun else "give another --data_dir"
        print(f"error: {args.data_dir}/{args.name} cannot be written: {reason(error)}; {then}",
              file=sys.stderr)  # fmt: skip
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    for stop in ("SIGTERM", "SIGHUP"):  # as Ctrl-C, unless nohup has it ignored
        if hasattr(signal, stop) and signal.getsignal(getattr(signal, stop)) == signal.SIG_DFL:
            signal.signal(getattr(signal, stop), signal.default_int_handler)
    sys.exit(main())
