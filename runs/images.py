"""The files of a run's images: what is cheap to know of them, what has changed in them, and which
run they belong to, wherever they lie."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np

from runs.log import RunError, RunLog, differences, read_first_row
from runs.name import PARTS, name_and_settings, wherever
from runs.provenance import data_sha256, names_below
from runs.record import RecordError, read

THREADS = 16  # that ask for sizes and times: on a network's disk an answer takes a millisecond
CHUNK = 1000  # files that a thread asks for


class Images:
    """The files of a Data: the file `path`, or `files` below a folder `path`."""

    def __init__(self, path, files=None):
        self.path, self.files = path, files

    @cached_property
    def summary(self):
        """{"count", "bytes", "names", "sizes", "times", "seconds"} of files below a folder; the
        last four are SHA-256s, cut short, in the order of the files: of the names below the folder,
        of the sizes, of the times when contents and inodes last changed, and of the former in whole
        seconds, all that a copy by tar keeps.

        None of a single file, whose checksums are settings, and where a file cannot be asked.
        """
        if self.files is None:
            return None
        chunks = [self.files[i : i + CHUNK] for i in range(0, len(self.files), CHUNK)]
        try:
            with ThreadPoolExecutor(THREADS) as pool:
                sizes, *times = np.concatenate(list(pool.map(_sizes_and_times, chunks)), 1)
        except OSError:
            return None
        names = os.fsencode("\0".join(names_below(self.path, self.files)))
        parts = {"names": names, "sizes": sizes.tobytes(), "times": np.stack(times).tobytes(),
                 "seconds": (times[0] // 10**9).tobytes()}  # fmt: skip
        hashes = {key: hashlib.sha256(x).hexdigest()[:16] for key, x in parts.items()}
        return {"count": len(self.files), "bytes": int(sizes.sum()), **hashes}

    @cached_property
    def data_sha256(self):
        """See provenance.data_sha256. Raises OSError."""
        return data_sha256(self.path, self.files)

    def difference(self, then, record_path, last=False):
        """What differs from the files whose summary a log has as `then`, those that its run began
        with or the `last` ones: "names", "sizes", "contents", "times" where no more is known, or
        None, also where there is no summary.

        Where the times alone differ, and the record at `record_path` has a hash of the contents,
        these are read: a copy is no other data. Without that hash whole seconds decide.
        """
        now = self.summary
        if not now:
            return None
        if not then:  # of an earlier version: its record alone knows
            return "contents" if self._same_contents(record_path, last) is False else None
        for key in ("names", "sizes"):
            if then.get(key) != now[key]:
                return key
        if then.get("times") == now["times"]:
            return None
        same = self._same_contents(record_path, last)
        if same is None:
            return None if then.get("seconds") == now["seconds"] else "times"
        return None if same else "contents"

    def _same_contents(self, record_path, last):
        """Whether the files have the contents that a record knows, of the `last` part of its run or
        of all; None where that cannot be told."""
        try:
            record = read(record_path)
            parts = [] if last else [x["changed"] for x in record["resumed"]]
            if all(parts) and record["data"]["contents"] and self.data_sha256["contents"]:
                changes = (changed["data"][0] for changed in parts if "data" in changed)
                return self.data_sha256["sha256"] == next(changes, record["data"]["sha256"])
        except (RecordError, OSError):
            pass
        return None


def _sizes_and_times(files):
    return np.array([(x.st_size, x.st_mtime_ns, x.st_ctime_ns) for x in map(os.stat, files)],
                    "<i8").T  # fmt: skip


def find_run(out, flags, data):
    """The RunLog of the run that `flags`, a dict of main.py's, make of a Data.

    The place of a folder is part of the name, so that folders of one name stay apart. Where there
    is no run of that name yet, but one of a copy elsewhere, then this is that run.
    """
    name, settings = name_and_settings(flags)
    settings["data"] = data.source
    if data.class_names is not None:
        settings["classes"] = list(data.class_names)
    run = RunLog(out, name, settings, Images(*data.files))
    new = not (os.path.exists(run.log_path) or os.path.exists(run.checkpoint_path))
    if new and wherever(flags["dataset"]) in ("folder:", "tokens:"):
        for path in sorted(run.log_path.parent.glob("*.jsonl")):
            if _is_of_a_copy(path, flags, run):
                return RunLog(out, path.stem, settings, run.images)
    return run


def _is_of_a_copy(path, flags, run):
    """Whether the log at `path` is of the run `run` of these flags, of a copy of its images."""
    try:
        first = read_first_row(path)
    except RunError:
        return False
    then, record = first["flags"], path.with_name(f"{path.stem}.run.json")
    parts = [first, *(x for x in first.get("resumed", []) if isinstance(x, dict))]
    last = [x["image_files"] for x in parts if isinstance(x.get("image_files"), dict)][-1:]
    named = {key: off for key, (_, off) in PARTS.items() if key not in ("dataset", "weights")}
    return (
        wherever(str(then.get("dataset"))) == wherever(flags["dataset"])
        and all(then.get(key, off) == flags[key] for key, off in named.items())
        and not any(differences(first["settings"], run.settings))
        and any(run.images.difference(x, record, last=True) in (None, "times") for x in last)
    )
