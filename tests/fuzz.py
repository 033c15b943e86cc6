"""Feeds hostile inputs to the readers of a user's files: `python -m scripts.fuzz`.

    --target npz          data.arrays.load_arrays
             jsonl        run.read_rows
             checkpoint   checkpoint.unpack
             folder       data.folders: the list of images, and every image; data.layout
    --engine mutate       files that were damaged or forged, a function of --seed and its index
             hypothesis   the same changes, drawn by hypothesis (pip install hypothesis)
             atheris      guided by what the inputs reach (pip install atheris; Linux)

A finding is an input that makes a reader raise anything but its documented error, or run code,
write, start a process, take more than 5 seconds or some hundred megabytes, or end the process.
Every target is read in a process of its own, which is started again where an input ended it. Exit
code: 0 without findings, 1 with some, 2 a wrong flag.
"""

import argparse
import base64
import contextlib
import importlib.util
import json
import multiprocessing
import os
import platform
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

from scripts import mutations

TARGETS = ("npz", "jsonl", "checkpoint", "folder")
ENGINES = ("mutate", "hypothesis", "atheris")
SECONDS = 5  # for an input
STUCK = 60  # without a new input, in code that no alarm of Python's reaches
ADDRESSES = 4 * 2**30  # bytes that a process may reserve beside what it has at the start
# Bytes that an input may add to the most memory used so far. PIL decodes up to 179 million pixels.
MEMORY = {"npz": 2**28, "jsonl": 2**28, "checkpoint": 2**28, "folder": 2**30}
FORBIDDEN = {
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile",
    "subprocess.Popen", "pty.spawn", "socket.connect", "socket.bind", "ctypes.dlopen", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.chown",
    "os.truncate", "os.putenv", "shutil.rmtree", "shutil.move", "pickle.find_class",
}  # fmt: skip


class Hang(BaseException):  # so that no reader takes it for an error in its file
    pass


class Forbidden(BaseException):
    pass


class Guard:
    """Runs a reader on an input and tells what it did."""

    def __init__(self, memory, seconds=SECONDS):
        self.memory, self.seconds, self.watching, self.heard = memory, seconds, False, []
        sys.addaudithook(self._hear)  # which stays for as long as the process

    def __call__(self, read, path):
        """(True, None) if the file was accepted, (False, None) if it was refused as documented,
        (False, what happened) for a finding."""
        forget_peak()
        self.heard, before, accepted, said = [], peak_memory(), False, None
        alarm = signal.signal(signal.SIGALRM, _ring)
        try:
            self.watching = True
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
            accepted = read(path)
        except Hang:
            said = f"it took more than {self.seconds} s"
        except Forbidden:
            pass  # and was heard
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            said = f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.watching = False
            signal.signal(signal.SIGALRM, alarm)
        more = peak_memory() - before
        if more > self.memory:
            said = f"it took {more // 2**20:,} MB"
        if self.heard or mutations.RAN:
            said = f"it ran: {', '.join(self.heard) or 'a pickle'}"
            mutations.RAN.clear()
        return (False, said[:500]) if said else (accepted, None)

    def _hear(self, event, args):
        if not self.watching:
            return
        if event == "open":
            _, mode, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if not writes and not (mode and set(mode) & set("wax+")):
                return
        elif event in ("compile", "exec"):  # not of a module that is imported
            code = args[1] if event == "compile" else getattr(args[0], "co_filename", None)
            if code != "<string>":
                return
        elif event not in FORBIDDEN:
            return
        self.heard.append(event)
        raise Forbidden(event)


def _ring(*_):
    raise Hang


def forget_peak():
    """Have the peak of memory be that of now, where the system can: on Linux."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_memory():
    """Bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def reader(target, scratch):
    """(lay, read): lay(data) makes a file or a folder of an input; read(path) is True where the
    reader accepts it, False where it refuses, and otherwise raises."""
    scratch = Path(scratch)
    path = scratch / f"input.{target}"

    def lay(data):
        path.write_bytes(data)
        return path

    if target == "npz":
        from data.arrays import load_arrays as function
        from data.common import DataError as documented
    elif target == "jsonl":
        from runs.log import RunError as documented
        from runs.log import read_rows as function
    elif target == "checkpoint":
        from runs.checkpoint import Damaged as documented
        from runs.checkpoint import unpack

        def function(path):
            return unpack(path.read_bytes())
    else:
        return _folder_reader(scratch)

    def read(path):
        try:
            function(path)
        except documented:
            return False
        return True

    return lay, read


def _folder_reader(scratch):
    from data.common import DataError
    from data.folders import _Images, list_images
    from data.imagenet_layout import read_layout

    image, root = mutations.seeds("folder")[0][1:], scratch / "folder"

    def lay(data):
        if data[:1] != b"T":
            path = scratch / "input.jpg"
            path.write_bytes(data[1:])
            return path
        if root.exists():
            shutil.rmtree(root)
        mutations.lay_out(data[1:], root, image)
        return root

    def read(path):
        if path != root:
            return _Images([(str(path), 0)], 16, True, 0)[0, 0][2] is None
        try:
            _, samples = list_images(root / "train")
            images = _Images(samples, 16, False, 0)
            bad = [images[0, i][2] for i in range(len(samples))]
            "".join(text for found in bad if found for text in found).encode()  # can be printed
            read_layout(root)
        except DataError as error:
            str(error).encode()
            return False
        return not any(bad)

    return lay, read


def rng_of(seed, target, index):
    return random.Random(f"{seed} {target} {index}")


def work(target, engine, seed, first, inputs, seconds, scratch, counts):
    """Feeds inputs `first` to `inputs`; runs in a process of its own. `counts`, shared, is inputs
    begun, refused, accepted; findings are lines of scratch/findings."""
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, 2)  # libtiff and libjpeg print what they think of a file
    os.dup2(sink, 1)
    warnings.simplefilter("ignore")
    try:
        if engine == "atheris":
            import atheris
            import torch._weights_only_unpickler as unpickler
            import torchvision  # noqa: F401, all of torch would take minutes to instrument

            atheris.instrument_func(unpickler.Unpickler.load)
            with atheris.instrument_imports(include=["data", "run", "checkpoint"]):
                lay, read = reader(target, scratch)
        else:
            lay, read = reader(target, scratch)
        known = mutations.seeds(target)
        for data in known:  # what is imported at first use is no finding
            read(lay(data))
        mutations.RAN.clear()
        limit_addresses()
        guard, until = Guard(MEMORY[target]), time.monotonic() + seconds

        def feed(data, index):
            path = lay(data)
            counts[0] = index + 1
            accepted, said = guard(read, path)
            if said is None:
                counts[2 if accepted else 1] += 1
            else:
                note(scratch, index, said, data)
            return time.monotonic() < until

        ENGINE[engine](feed, target, known, seed, first, inputs)
    except Exception:
        note(scratch, counts[0], traceback.format_exc(), b"")


def note(scratch, index, said, data):
    line = {"index": index, "said": said, "input": base64.b64encode(data[:20000]).decode()}
    with open(Path(scratch, "findings"), "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def limit_addresses():
    import resource

    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + ADDRESSES
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.getrlimit(resource.RLIMIT_AS)[1]))


def by_mutation(feed, target, known, seed, first, inputs):
    for index in range(first, inputs):
        if not feed(mutations.mutated(rng_of(seed, target, index), target, known), index):
            return


def by_hypothesis(feed, target, known, seed, first, inputs):
    import hypothesis
    from hypothesis import strategies

    count, going = first, True

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=inputs - first, deadline=None, database=None,
                         suppress_health_check=list(hypothesis.HealthCheck))  # fmt: skip
    @hypothesis.given(strategies.randoms(use_true_random=False))
    def search(rng):
        nonlocal count, going
        if going and count < inputs:
            going = feed(mutations.mutated(rng, target, known), count)
            count += 1

    search()


def by_atheris(feed, target, known, seed, first, inputs):
    import atheris

    count = first

    def one(data):
        nonlocal count
        going = feed(bytes(data), count)
        count += 1
        if count >= inputs or not going:
            os._exit(0)

    def change(data, size, number):
        rng = random.Random(number)
        if rng.random() < 0.5:
            return atheris.Mutate(data, len(data))
        return mutations.mutated(rng, target, [bytes(data) or b"\0", *known])[:size]

    corpus = Path(tempfile.mkdtemp(prefix="corpus"))
    for i, data in enumerate(known):
        (corpus / str(i)).write_bytes(data)
    flags = [f"-seed={seed + 1}", "-timeout=0", "-rss_limit_mb=0", "-max_len=20000"]
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=change)
    atheris.Fuzz()


ENGINE = {"mutate": by_mutation, "hypothesis": by_hypothesis, "atheris": by_atheris}


def fuzz(target, engine, seed, first, inputs, seconds, task=work):
    """A row of the table: counts, findings, seconds. `task` is what each process runs."""
    context, began = multiprocessing.get_context("spawn"), time.monotonic()
    counts, findings = context.Array("q", [first, 0, 0], lock=False), []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        while counts[0] < inputs and (left := seconds - (time.monotonic() - began)) > 0:
            start = counts[0]
            process = context.Process(
                target=task, args=(target, engine, seed, start, inputs, left, scratch, counts)
            )
            process.start()
            ended = _wait(process, counts)
            file = Path(scratch, "findings")
            if file.exists():
                findings += [json.loads(line) for line in file.read_text("utf-8").splitlines()]
                file.unlink()
            if ended is None:
                break
            # The last input begun; none at all is a fault of this script's.
            begun = counts[0] - 1 if counts[0] > start else None
            findings.append({"index": begun, "said": ended})
            if begun is None:
                break
    return {
        "target": target, "engine": engine, "inputs": counts[0] - first, "refused": counts[1],
        "accepted": counts[2], "findings": findings, "seconds": time.monotonic() - began,
    }  # fmt: skip


def _wait(process, counts):
    """How a process was ended by an input, None where it came to its own end."""
    seen, since = counts[0], time.monotonic()
    while process.is_alive():
        process.join(0.2)
        if counts[0] != seen:
            seen, since = counts[0], time.monotonic()
        elif time.monotonic() - since > STUCK + 60 * (seen == 0):  # torch is slow to import
            process.kill()
            process.join()
            return f"it hung for {STUCK} s"
    code = process.exitcode
    if not code:
        return None
    return f"it ended the process, {f'signal {-code}' if code < 0 else f'exit code {code}'}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.fuzz", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--inputs", type=int, default=100_000, help="of all the targets together")
    add("--first", type=int, default=0, metavar="INDEX", help="of mutate: the index to begin at")
    add("--seconds", type=float, default=float("inf"), help="for each target, at most")
    add("--target", choices=[*TARGETS, "all"], default="all")
    add("--engine", choices=ENGINES, default="mutate")
    add("--seed", type=int, default=0)
    add("--out", type=Path, metavar="FILE", help="write the table as JSON, too")
    args = parser.parse_args(argv)
    if args.engine != "mutate" and importlib.util.find_spec(args.engine) is None:
        parser.error(f"--engine {args.engine}: pip install {args.engine}")
    targets = TARGETS if args.target == "all" else (args.target,)
    print("target      engine        inputs   refused  accepted  findings  seconds")
    rows = []
    for target in targets:
        end = args.first + args.inputs // len(targets)
        row = fuzz(target, args.engine, args.seed, args.first, end, args.seconds)
        rows.append(row)
        print(f"{target:<10}  {args.engine:<10} {row['inputs']:>9,} {row['refused']:>9,} "
              f"{row['accepted']:>9,} {len(row['findings']):>9,} {row['seconds']:>8,.0f}",
              flush=True)  # fmt: skip
        for finding in row["findings"][:5]:
            print(f"  {finding['index']}: {finding['said']}")
    if args.out:
        given = sys.argv[1:] if argv is None else argv
        write(args.out, rows, shlex.join(["python", "-m", "scripts.fuzz", *given]))
    return int(any(row["findings"] for row in rows))


def write(path, rows, command):
    from importlib.metadata import version

    packages = ["torch", "torchvision", "numpy", "pillow"]
    packages += [row["engine"] for row in rows[:1] if row["engine"] != "mutate"]
    versions = {"python": platform.python_version(), **{x: version(x) for x in packages}}
    content = {"command": command, "versions": versions, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
