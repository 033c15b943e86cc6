"""Prepare ImageNet for training: check, sort, link or resize its images in many processes.

The work goes class folder by class folder. A finished one leaves a record,
<data_dir>/imagenet/.prepared/<split>/<class>.json, and is not done again: that is how a command
resumes, and how machines that share the folder divide the work.
"""

import argparse
import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
import zlib
from pathlib import Path

from tqdm import tqdm

from cli import number
from data.common import DataError, reason
from data.imagenet_layout import CLASSES, OFFICIAL, few, read_layout
from data.resize import read_image, shrink
from data.workers import usable_cores, work

FLAGS = ("resize", "jobs", "shard", "val_labels")
ABANDONED = 600  # seconds after which nobody works on a folder in which nothing changes


def add_flags(parser):
    add = parser.add_argument_group("imagenet").add_argument
    add("--resize", type=number(int, 1), nargs="?", const=256, metavar="PIXELS",
        help="rewrite images whose shorter side is longer than this (256 if not given) as JPEG "
        "of that size, quality 95; copy the others as they are")
    add("--jobs", type=number(int, 1), metavar="N", help="processes (default: the usable cores)")
    add("--shard", type=_shard, metavar="I/N", help="every N-th class from the I-th on; I from 1")
    add("--val_labels", metavar="FILE", help="the classes of a flat val/: LOC_val_solution.csv, "
        "lines of file name and class, a folder of XML files, or ILSVRC2012_devkit_t12")


def _shard(value):
    part, _, parts = value.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{value!r} is not I/N with I from 1 to N, such as 2/8")
    return int(part), int(parts)


def find(data_dir):
    """The folder of ImageNet to train on: the prepared one, else $IMAGENET_PATH."""
    path, given = Path(data_dir, "imagenet").expanduser(), os.environ.get("IMAGENET_PATH")
    if path.exists():
        return path
    if given and Path(given).expanduser().is_dir():
        return Path(given).expanduser()
    also = f"nor a folder {given}, which $IMAGENET_PATH names" if given else (
        "and $IMAGENET_PATH is not set")  # fmt: skip
    raise DataError(
        f"there is no {path}, {also}. `python -m data.prepare imagenet --from DIR` makes the "
        "first; if DIR is sorted into classes, IMAGENET_PATH=DIR will do."
    )


def prepare(source, data_dir, resize=None, jobs=None, shard=(1, 1), val_labels=None):
    """Make <data_dir>/imagenet of the folder `source`, report, and return the exit code.

    `resize` is the shorter side of the images in pixels; None makes links. `shard` (i, n) takes
    every n-th class from the i-th on, i from 1. The code is 0 if all of the shard is there, 1 if
    an image is corrupt. Raises DataError if the layout is not ImageNet's or if the folder there
    was made with other flags, OSError if it cannot be written.
    """
    source = Path(os.path.abspath(Path(source).expanduser()))
    target = Path(os.path.abspath(Path(data_dir).expanduser()), "imagenet")
    ends = sorted(path.resolve() for path in (source, target))
    if ends[1].is_relative_to(ends[0]):
        raise DataError(
            f"{target} and {source} lie in one another: the original stays as it is, so give "
            "another --data_dir. What is in order needs no preparation: IMAGENET_PATH=DIR will do."
        )
    print(f"Looking through {source}", file=sys.stderr)
    splits = read_layout(source, val_labels, CLASSES)
    for split, layout in splits.items():
        if layout.images != OFFICIAL[split]:
            print(f"Not the whole of ImageNet: {split}/ holds {layout.images:,} images, "
                  f"not {OFFICIAL[split]:,}", file=sys.stderr)  # fmt: skip
        if layout.left_out:
            names = [str(path.relative_to(source)) for path in layout.left_out]
            print(f"Left out, since no images of a class: {few(names)}", file=sys.stderr)
    options = {"resize": resize} if resize else {"resize": None, "from": str(source)}
    records = target / ".prepared"
    if not records.is_dir() and any(os.path.lexists(target / split) for split in splits):
        raise DataError(
            f"{target} holds images that this command has not put there; move them or give "
            "another --data_dir"
        )
    for split in splits:
        (records / split).mkdir(parents=True, exist_ok=True)
    for left in records.glob("*.partial"):  # by a command that was killed
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    done = _finished(splits, target, options)
    for split, layout in splits.items():
        _lay(target / split, None if _made(layout, options) else layout.root)
    names = sorted(splits["train"].classes)[shard[0] - 1 :: shard[1]]
    mine = [(split, name) for split in splits for name in names]
    # A class with a corrupt file is done again: somebody may have replaced the file.
    todo = [key for key in mine if key not in done or done[key]["corrupt"]]
    began, images, interval = time.monotonic(), 0, 0.1 if sys.stderr.isatty() else 30
    # Its own folder: a second command at the same time writes into another one.
    with tempfile.TemporaryDirectory(".partial", "", records, True) as scratch, tqdm(
        total=len(todo), unit=" classes", dynamic_ncols=True, disable=not todo,
        mininterval=interval, maxinterval=max(10, interval),
    ) as bar:  # fmt: skip
        tasks = {(split, name): (
            *splits[split].classes[name], resize, Path(scratch, f"{split}-{name}"),
            target / split / name if _made(splits[split], options) else None,
        ) for split, name in todo}  # fmt: skip
        with contextlib.closing(work(_prepare_class, tasks, jobs or usable_cores())) as results:
            for (split, name), result in results:
                files = splits[split].classes[name][1]
                record = {"options": options, "files": _mark(files), **result}
                _write(records / split / f"{name}.json", json.dumps(record), scratch)
                images += len(files)
                bar.update()
        bar.close()
        code = _report(splits, target, options, mine, scratch)
    if images:
        seconds = time.monotonic() - began
        print(f"{images:,} images in {seconds:,.1f} s, {images / seconds:,.0f} images/s")
    return code


def _prepare_class(source, names, size, partial, target):
    """Check the images `names` of the folder `source`, and make the folder `target` (None: only
    check) of links, or of copies of `size` pixels: at `partial`, so it appears whole or not at all.

    Returns {"images", "resized", "corrupt": [[name, reason], ...]}. Raises OSError if the target
    cannot be written, never for a source.
    """
    warnings.simplefilter("ignore")  # PIL's, thousands, about EXIF data
    if target:
        partial.mkdir()
        if target.parent.is_symlink():  # to the original
            raise OSError(f"{target.parent} is a link")
    resized, corrupt = 0, []
    for name in names:
        try:
            content = read_image(source / name)
            result = shrink(content, size)
        except Exception as error:  # a decoder raises anything on a damaged file
            corrupt.append([name, reason(error)])
            continue
        resized += result is not content
        if target and size:
            (partial / name).write_bytes(result)
        elif target:
            (partial / name).symlink_to(source / name)
    if target:
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    return {"images": len(names) - len(corrupt), "resized": resized, "corrupt": corrupt}


def _lay(path, origin):
    """Make `path` a folder to fill, or a link to `origin`, in the place of what an unfinished
    command left. A link is never filled: that would write into the original."""
    with contextlib.suppress(OSError):  # another shard was quicker, or the folder is not empty
        if path.is_symlink() and (origin is None or Path(os.readlink(path)) != origin):
            path.unlink()
        elif origin is not None and not path.is_symlink():
            path.rmdir()
    with contextlib.suppress(FileExistsError):
        path.mkdir() if origin is None else path.symlink_to(origin, target_is_directory=True)
    if path.is_symlink() != (origin is not None) or not path.is_dir():
        raise DataError(f"{path} is in the way: move it, or give another --data_dir")


def _made(layout, options):
    """Whether the class folders of a split are made, not reached through one link."""
    return bool(options["resize"] or layout.flat or not layout.tidy)


def _finished(splits, target, options):
    """{(split, class): record} of the finished classes; DataError if made with other options."""
    finished = {}
    for split, layout in splits.items():
        for name, (_, names) in layout.classes.items():
            try:
                record = json.loads((target / ".prepared" / split / f"{name}.json").read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                continue
            if record["options"] != options:
                then, now = (f"with --resize {o['resize']}" if o["resize"] else
                             f"with links into {o['from']}" for o in (record["options"], options))
                raise DataError(f"{target} was begun {then}, not {now}: give the same flags, "
                                "another --data_dir, or remove that folder")  # fmt: skip
            if record["files"] == _mark(names) and (target / split / name).is_dir():
                finished[split, name] = record
    return finished


def _mark(names):
    """Identifies the files of a class: another label moves one of val/'s."""
    text = "\n".join(names).encode(errors="surrogateescape")
    return f"{len(names)} {zlib.crc32(text):08x}"


def _report(splits, target, options, mine, scratch):
    """Print the counts of what is there, list the corrupt files, and return the exit code."""
    done, bad = _finished(splits, target, options), {}
    for (split, name), record in sorted(done.items()):
        folder = splits[split].classes[name][0]
        bad.update({str(folder / file): (split, why) for file, why in record["corrupt"]})
    for split, layout in splits.items():
        records = [done[split, name] for name in layout.classes if (split, name) in done]
        images, resized = (sum(r[k] for r in records) for k in ("images", "resized"))
        print(f"{split:<5} {len(records):,} of {CLASSES:,} classes, "
              f"{images:,} of ImageNet's {OFFICIAL[split]:,} images"
              + (f", {resized:,} resized" if options["resize"] else ""))  # fmt: skip
    listed = target / "corrupt.txt"
    if bad:
        _write(listed, "".join(f"{path}\t{why}\n" for path, (_, why) in bad.items()), scratch)
        print(f"corrupt: {len(bad):,}, listed with the reason in {listed}")
        for path, (_, why) in list(bad.items())[:5]:
            print(f"  {path}: {why}", file=sys.stderr)
        if any(not _made(splits[split], options) for split, _ in bad.values()):
            print("  they are still behind the links: main.py --skip_bad_images leaves them out")
    else:
        listed.unlink(missing_ok=True)
    missing = [(s, name) for s in splits for name in splits[s].classes if (s, name) not in done]
    if missing:
        print(f"missing: {len(missing):,} class folders that no command has finished yet, "
              f"{few(['/'.join(key) for key in missing])}")  # fmt: skip
    print(f"imagenet is {'not whole yet' if missing else 'ready'}: {target}")
    if not set(missing).isdisjoint(mine):
        return 1
    return int(any(done[key]["corrupt"] for key in mine) if missing else bool(bad))


def _write(path, text, scratch):
    """Write a file whole or not at all."""
    partial = Path(scratch, path.name)
    partial.write_text(text, errors="surrogateescape")
    partial.replace(path)
