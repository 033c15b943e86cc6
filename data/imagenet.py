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

from cli import UserError, a_path, command, expand, number
from data.common import DataError, data_folder, reason
from data.imagenet_layout import OFFICIAL, few, read_layout
from data.resize import read_image, shrink
from data.workers import lacking, usable_cores, work

FLAGS = ("resize", "jobs", "shard", "val_labels")
ABANDONED = 600  # seconds after which nobody works on a folder in which nothing changes


def add_flags(parser):
    add = parser.add_argument_group("imagenet").add_argument
    add("--resize", type=number(int, 1), nargs="?", const=256, metavar="PIXELS",
        help="rewrite images whose shorter side is longer than this (256 if not given) as JPEG "
        "of that size, quality 95; copy the others as they are")
    add("--shard", type=_shard, metavar="I/N", help="every N-th class from the I-th on; I from 1")
    add("--val_labels", type=a_path, metavar="FILE", help="the classes of a flat val/: "
        "LOC_val_solution.csv, lines of file name and class, a folder of XML files, or "
        "ILSVRC2012_devkit_t12")


def _shard(value):
    part, _, parts = value.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{value!r} is not I/N with I from 1 to N, such as 2/8")
    return int(part), int(parts)


def named():
    """The Path that $IMAGENET_PATH names, or None. Raises DataError where its ~ has no home."""
    try:
        given = os.environ.get("IMAGENET_PATH")
        return Path(expand(given)) if given else None
    except UserError as error:
        raise DataError(f"$IMAGENET_PATH: {error}") from None


def find(data_dir):
    """The folder of ImageNet to train on: $IMAGENET_PATH where it is set, else the prepared one."""
    given = named()
    path = given or data_folder(data_dir) / "imagenet"
    if path.is_dir():
        return path
    if given:
        raise DataError(
            f"there is no folder {path}, which $IMAGENET_PATH names: name another, or unset it for "
            f"{Path(data_dir, 'imagenet')}"
        )
    make = command("data.prepare", "imagenet", "--data_dir", data_dir, "--from", "DIR")
    raise DataError(
        f"there is no folder {path}, and $IMAGENET_PATH names no other. `{make}` makes it; if DIR "
        "is sorted into classes, IMAGENET_PATH=DIR will do."
    )


def passed_over(data_dir):
    """A sentence where $IMAGENET_PATH is taken and there is a prepared folder, else None."""
    given = os.environ.get("IMAGENET_PATH")
    prepared = Path(os.path.expanduser(data_dir), "imagenet")  # also without a home
    if not given or not prepared.exists() or prepared.resolve() == find(data_dir).resolve():
        return None
    return f"ImageNet is $IMAGENET_PATH, {given}; unset it to train on {prepared}"


def prepare(source, data_dir, resize=None, jobs=None, shard=(1, 1), val_labels=None):
    """Make <data_dir>/imagenet of the folder `source`, report, and return the exit code.

    `resize` is the shorter side of the images in pixels; None makes links. `shard` (i, n) takes
    every n-th class from the i-th on, i from 1. The code is 0 if all of the shard is there, 1 if
    an image is corrupt. Raises DataError if the layout is not ImageNet's or if the folder there
    was made with other flags, OSError if it cannot be written.
    """
    source = Path(os.path.abspath(expand(source)))
    target = Path(os.path.abspath(data_folder(data_dir)), "imagenet")
    ends = sorted(path.resolve() for path in (source, target))
    if ends[1].is_relative_to(ends[0]):
        raise DataError(
            f"{target} and {source} lie in one another: the original stays as it is, so give "
            "another --data_dir. What is in order needs no preparation: IMAGENET_PATH=DIR will do."
        )
    print(f"Looking through {source}", file=sys.stderr)
    splits = read_layout(source, val_labels)
    for split, layout in splits.items():
        names = [str(path.relative_to(source)) for path in layout.left_out]
        print(f"{split}/ holds {layout.images:,} of ImageNet's {OFFICIAL[split]:,} images"
              + (f"; {len(names):,} left out, since no images of a class: {few(names)}"
                 if names else ""),
              file=sys.stderr)  # fmt: skip
    options = {"resize": resize} if resize else {"resize": None, "from": str(source)}
    records = target / ".prepared"
    if not records.is_dir() and any(os.path.lexists(target / split) for split in splits):
        raise DataError(
            f"{target} holds images that this command has not put there; move them or give "
            "another --data_dir"
        )
    done = _finished(splits, target, options)
    for split in splits:
        (records / split).mkdir(parents=True, exist_ok=True)
        _lay(target / split, [splits[s].classes[name][0] for s, name in done if s == split])
    for left in records.glob("*.partial"):  # by a command that was killed
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    names = sorted(splits["train"].classes)[shard[0] - 1 :: shard[1]]
    mine = [(split, name) for split in splits for name in names]
    # A class with a corrupt file is done again: somebody may have replaced the file.
    todo = [key for key in mine if key not in done or done[key]["corrupt"]]
    began, images = time.monotonic(), 0
    # Its own folder: a second command at the same time writes into another one.
    with tempfile.TemporaryDirectory(".partial", "", records, True) as scratch:
        tasks = {(split, name): (
            *splits[split].classes[name], resize, splits[split].tidy(name),
            Path(scratch, f"{split}-{name}"), target / split / name,
        ) for split, name in todo}  # fmt: skip
        with contextlib.closing(work(_prepare_class, tasks, jobs or usable_cores())) as results:
            for (split, name), result in tqdm(
                results, total=len(todo), unit=" classes", dynamic_ncols=True, disable=not todo,
                mininterval=0.1 if sys.stderr.isatty() else 30, maxinterval=30,
            ):  # fmt: skip
                files = splits[split].classes[name][1]
                record = {"options": options, "files": _mark(files), **result}
                _write(records / split / f"{name}.json", json.dumps(record), scratch)
                images += len(files)
        _report(splits, target, options, scratch)
    if images:
        seconds = time.monotonic() - began
        print(f"{images:,} images in {seconds:,.1f} s, {images / seconds:,.0f} images/s")
    done = _finished(splits, target, options)
    return int(any(key not in done or done[key]["corrupt"] for key in mine))


def _prepare_class(source, names, size, tidy, partial, target):
    """Check the images `names` of the folder `source`, and make `target`: a folder of copies of
    `size` pixels, or (None) a link to `source` if it is `tidy` and no image is corrupt, else a
    folder of links. It is made at `partial`, so it appears whole or not at all.

    Returns {"images", "resized", "corrupt": [[name, reason], ...]}. Raises OSError if the target
    cannot be written, DataError for a source that the machine has too little to read.
    """
    warnings.simplefilter("ignore")  # PIL's, thousands, about EXIF data
    partial.mkdir()
    good, resized, corrupt = [], 0, []
    for name in names:
        try:
            content = read_image(source / name)
            result = shrink(content, size)
        except Exception as error:  # a decoder raises anything on a damaged file
            if lacking(error):
                raise DataError(f"{source / name} cannot be read here ({reason(error)}): fewer "
                                "--jobs; the same command goes on") from error  # fmt: skip
            corrupt.append([name, reason(error)])
            continue
        good.append(name)
        resized += result is not content
        if size:
            (partial / name).write_bytes(result)
    if not size and tidy and not corrupt:
        partial.rmdir()
        partial.symlink_to(source, target_is_directory=True)
    elif not size:
        for name in good:
            (partial / name).symlink_to(source / name)
    if target.is_symlink():
        target.unlink()
    elif target.exists():
        shutil.rmtree(target)
    partial.rename(target)
    return {"images": len(good), "resized": resized, "corrupt": corrupt}


def _lay(folder, sources):
    """Make `folder` a folder to fill. Earlier versions made it one link to the original: then it
    gets a link to each of the finished class folders `sources`, and the original stays as it is."""
    if not folder.is_symlink():
        folder.mkdir(exist_ok=True)
        return
    folder.unlink()
    folder.mkdir()
    for source in sources:
        (folder / source.name).symlink_to(source, target_is_directory=True)


def _finished(splits, target, options):
    """{(split, class): record} of the finished classes; DataError if made with other options."""
    finished = {}
    for split, layout in splits.items():
        for name, (_, names) in layout.classes.items():
            try:
                made = target / ".prepared" / split / f"{name}.json"
                record = json.loads(made.read_text(encoding="utf-8"))
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


def _report(splits, target, options, scratch):
    """Print the counts of what is there and what is missing, and list the corrupt files."""
    done, bad, missing = _finished(splits, target, options), [], []
    for split, layout in splits.items():
        records = {name: done[split, name] for name in layout.classes if (split, name) in done}
        missing += [f"{split}/{name}" for name in layout.classes if name not in records]
        bad += [(layout.classes[name][0] / file, why) for name in sorted(records)
                for file, why in records[name]["corrupt"]]  # fmt: skip
        images, resized = (sum(r[k] for r in records.values()) for k in ("images", "resized"))
        print(f"{split:<5} {len(records):,} of {len(layout.classes):,} classes, "
              f"{images:,} of ImageNet's {OFFICIAL[split]:,} images"
              + (f", {resized:,} resized" if options["resize"] else ""))  # fmt: skip
    listed = target / "corrupt.txt"
    listed.unlink(missing_ok=True)
    if bad:
        _write(listed, "".join(f"{path}\t{why}\n" for path, why in bad), scratch)
        print(f"corrupt: {len(bad):,}, listed with the reason in {listed}, such as {bad[0][0]}")
    if missing:
        print(f"missing: {len(missing):,} class folders that no command has finished yet, "
              f"{few(missing)}")  # fmt: skip
    print(f"imagenet is {'not whole yet' if missing else 'ready'}: {target}")
    given = named()
    if given and target.resolve() != given.resolve():
        print(f"Training takes $IMAGENET_PATH, {given}; unset it to train on {target}")


def _write(path, text, scratch):
    """Write a file whole or not at all."""
    partial = Path(scratch, path.name)
    partial.write_text(text, encoding="utf-8", errors="surrogateescape")
    partial.replace(path)
