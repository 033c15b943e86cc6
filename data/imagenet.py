"""ImageNet made ready for training: checked, sorted, linked or resized, by many processes.

The work goes class folder by class folder. One that is finished leaves a record,
<data_dir>/imagenet/.prepared/<split>/<class>.json, and is not done again; that is how a command
goes on after any end, and how machines that share the folder divide the work.
"""

import argparse
import contextlib
import json
import os
import platform
import sys
import zlib
from pathlib import Path

from data.common import DataError
from data.imagenet_layout import CLASSES, OFFICIAL, few, read_layout
from data.workers import GO_ON, Progress, usable_cores, work

FLAGS = ("resize", "jobs", "shard", "val_labels")


def add_flags(parser):
    add = parser.add_argument_group("imagenet").add_argument
    add("--resize", type=_least_one, nargs="?", const=256, metavar="PIXELS",
        help="rewrite images whose shorter side is longer than this (256 if not given) as JPEG "
        "of that size, quality 95; copy the others as they are")
    add("--jobs", type=_least_one, metavar="N", help="processes (default: the usable cores)")
    add("--shard", type=_shard, metavar="I/N", help="every N-th class from the I-th on; I from 1")
    add("--val_labels", metavar="FILE", help="the classes of a flat val/: LOC_val_solution.csv, "
        "lines of file name and class, a folder of XML files, or ILSVRC2012_devkit_t12")


def _least_one(value):
    if not value.isdecimal() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{value!r} is not a whole number from 1")
    return int(value)


def _shard(value):
    part, _, parts = value.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"{value!r} is not I/N with I from 1 to N, such as 2/8")
    return int(part), int(parts)


def run(parser, args):
    """The command for imagenet, which exits with its own codes."""
    source = args.source or os.environ.get("IMAGENET_PATH")
    if not source:
        parser.error("imagenet is made from a copy: --from DIR, or $IMAGENET_PATH")
    try:
        sys.exit(prepare(
            source, args.data_dir, args.resize, args.jobs, args.shard or (1, 1), args.val_labels
        ))  # fmt: skip
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


def find(data_dir):
    """The folder of ImageNet to train on: the prepared one, else $IMAGENET_PATH."""
    path, given = Path(data_dir, "imagenet").expanduser(), os.environ.get("IMAGENET_PATH")
    if not path.exists() and not given:
        raise DataError(
            f"there is no {path}, and $IMAGENET_PATH is not set. `python -m data.prepare imagenet "
            "--from DIR` makes the one; if DIR is sorted into classes, IMAGENET_PATH=DIR will do."
        )
    if not path.exists() and not Path(given).expanduser().is_dir():
        raise DataError(
            f"there is no {path}, nor a folder {given}, which $IMAGENET_PATH names; "
            "`python -m data.prepare imagenet --from DIR` makes the first."
        )
    return path if path.exists() else Path(given).expanduser()


def prepare(source, data_dir, size=None, jobs=None, shard=(1, 1), val_labels=None):
    """Make <data_dir>/imagenet of the folder `source`, report, and return the exit code.

    `size` is the shorter side of the images in pixels; None makes links. `shard` (i, n) takes
    every n-th class from the i-th on, i from 1. The code is 0 where all of the shard is there, 1
    where an image is corrupt. Raises DataError where the layout is not ImageNet's, where the
    folder there was made otherwise, or where it cannot be written.
    """
    source = Path(os.path.abspath(Path(source).expanduser()))
    target = Path(os.path.abspath(Path(data_dir).expanduser())) / "imagenet"
    if _within(source, target) or _within(target, source):
        raise DataError(
            f"{target} and {source} lie in one another: the original stays as it is, so give "
            "another --data_dir. What is in order needs no preparation: IMAGENET_PATH=DIR will do."
        )
    print(f"Looking through {source}", file=sys.stderr)
    splits = read_layout(source, val_labels, CLASSES)
    for split, found in splits.items():
        count = found.images
        if count != OFFICIAL[split]:
            print(f"Not the whole of ImageNet: {split}/ holds {count:,} images, "
                  f"not {OFFICIAL[split]:,}", file=sys.stderr)  # fmt: skip
        if found.left_out:
            names = [str(path.relative_to(source)) for path in found.left_out]
            print(f"Left out, since no images of a class: {few(names)}", file=sys.stderr)
    options = {"resize": size} if size else {"resize": None, "from": str(source)}
    try:
        return _prepare(splits, target, options, jobs or usable_cores(), shard)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error}; {GO_ON}") from error


def _prepare(splits, target, options, jobs, shard):
    records = target / ".prepared"
    if not records.is_dir() and any(os.path.lexists(target / split) for split in splits):
        raise DataError(
            f"{target} holds images that this command has not put there; move them or give "
            "another --data_dir"
        )
    for split in splits:
        (records / split).mkdir(parents=True, exist_ok=True)
    classes = sorted(splits["train"].classes)
    done = _finished(splits, target, options)
    mine = [(s, name) for s in splits for name in classes[shard[0] - 1 :: shard[1]]]
    # A class with a corrupt file is looked at again: somebody may have replaced the file.
    todo = [key for key in mine if key not in done or done[key]["corrupt"]]
    tasks = {}
    for split, name in todo:
        folder, names = splits[split].classes[name]
        made = _made(splits[split], options) and target / split / name
        tasks[split, name] = {
            "source": str(folder), "names": names, "target": made and str(made),
            "size": options["resize"], "scratch": str(records / split),
        }  # fmt: skip
    for split, found in splits.items():
        _lay(target / split, None if _made(found, options) else found.root)
    progress = Progress(sum(len(task["names"]) for task in tasks.values()))
    try:
        with contextlib.closing(work(tasks, jobs)) as answers:
            for (split, name), answer in answers:
                progress.add(answer.get("progress", 0))
                if "error" in answer:
                    raise DataError(f"{target} cannot be written: {answer['error']}; {GO_ON}")
                if "done" in answer:
                    files = _mark(tasks[split, name]["names"])
                    record = {"options": options, "files": files, **answer["done"]}
                    _write(records / split / f"{name}.json", json.dumps(record))
    finally:
        progress.close()
    return _report(splits, target, options, mine, progress)


def _lay(path, origin):
    """A folder at `path` to fill, or a link to `origin`; what an unfinished command left gives way.

    A link is never filled: that would write into the original.
    """
    with contextlib.suppress(FileNotFoundError, FileExistsError):  # another shard was quicker
        if path.is_symlink() and (origin is None or Path(os.readlink(path)) != origin):
            path.unlink()
        elif origin is not None and path.is_dir() and not path.is_symlink():
            path.rmdir()
    with contextlib.suppress(FileExistsError):
        if origin is None:
            path.mkdir()
        else:
            path.symlink_to(origin, target_is_directory=True)
    if path.is_symlink() != (origin is not None) or not path.is_dir():
        raise DataError(f"{path} is in the way")


def _made(split, options):
    """Whether the class folders of a split are made, not reached through one link."""
    return bool(options["resize"] or split.flat or not split.tidy)


def _finished(splits, target, options):
    """{(split, class): record} of what is done; DataError where it was done otherwise."""
    found = {}
    for split in splits:
        for name, (_, names) in splits[split].classes.items():
            try:
                record = json.loads((target / ".prepared" / split / f"{name}.json").read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                continue
            if record["options"] != options:
                raise DataError(
                    f"{target} was begun {_words(record['options'])}, not {_words(options)}: "
                    "give the same flags, another --data_dir, or remove that folder"
                )
            if record["files"] == _mark(names) and (target / split / name).is_dir():
                found[split, name] = record
    return found


def _mark(names):
    """What tells whether a class still has the same files: another label moves one of val/'s."""
    text = "\n".join(names).encode(errors="surrogateescape")
    return f"{len(names)} {zlib.crc32(text):08x}"


def _words(options):
    if options["resize"]:
        return f"with --resize {options['resize']}"
    return f"with links into {options['from']}"


def _report(splits, target, options, mine, progress):
    """Print what there is, list the corrupt files, and return the exit code."""
    done, bad = _finished(splits, target, options), {}
    for (split, name), record in sorted(done.items()):
        folder = splits[split].classes[name][0]
        bad.update({str(folder / file): (split, name, why) for file, why in record["corrupt"]})
    listed = target / "corrupt.txt"
    if bad:
        _write(listed, "".join(f"{path}\t{why}\n" for path, (*_, why) in bad.items()))
    else:
        listed.unlink(missing_ok=True)
    for split in splits:
        records = [record for (s, _), record in done.items() if s == split]
        images, resized = (sum(r[k] for r in records) for k in ("images", "resized"))
        parts = [f"{split:<5} {len(records):,} of {CLASSES:,} classes",
                 f"{images:,} of ImageNet's {OFFICIAL[split]:,} images"]  # fmt: skip
        if options["resize"]:
            parts += [f"{resized:,} resized"]
        print(", ".join(parts))
    if bad:
        print(f"corrupt: {len(bad):,}, listed with the reason in {listed}")
        for path, (*_, why) in list(bad.items())[:5]:
            print(f"  {path}: {why}", file=sys.stderr)
        if any(not _made(splits[split], options) for split, *_ in bad.values()):
            print("  they are still behind the links: main.py --skip_bad_images leaves them out")
    if progress.count:
        print(f"{progress.count:,} images in {progress.seconds:,.1f} s, "
              f"{progress.count / max(progress.seconds, 1e-3):,.0f} images/s")  # fmt: skip
    missing = [(s, name) for s in splits for name in splits[s].classes if (s, name) not in done]
    if missing:
        print(f"missing: {len(missing):,} class folders that no command has finished yet, "
              f"{few(['/'.join(key) for key in missing])}")  # fmt: skip
    print(f"imagenet is {'not whole yet' if missing else 'ready'}: {target}")
    if set(missing).isdisjoint(mine):
        return int(any(done[key]["corrupt"] for key in mine) if missing else bool(bad))
    return 1


def _write(path, text):
    """The whole text or nothing; each process writes under its own name."""
    partial = path.with_name(f".{path.name}.{platform.node()}-{os.getpid()}.partial")
    partial.write_text(text, errors="surrogateescape")
    os.replace(partial, path)


def _within(path, folder):
    return path.resolve().is_relative_to(folder.resolve())
