"""Runs on a disk that breaks, and mends later: the same command has to end as if nothing had been.

    full       a small tmpfs, filled to the last bytes by a file of ballast while the run goes on
    immutable  the folders of the run take no new file and no rename (chattr +i), the open log does
    read-only  the file system is so (mount -o remount,ro) from the start of a process; later the
               kernel refuses, for the log is open
    errors     every change of a file fails for a while, with ENOSPC, EDQUOT, EROFS or EIO: an audit
               hook raises what the kernel would have said
    limit      no file may outgrow some size, EFBIG: the kernel's own refusal, without root

The first three take root, and a system that lets it mount. Meanwhile the run goes on, or ends with
one sentence; at every moment it has the last checkpoint that it had, and that can be read.
"""

import contextlib
import errno
import random
import shutil
import signal
import subprocess
import threading

from scripts.crashtest.breaking import PATIENCE, Lab, Report, seconds_into
from scripts.crashtest.child import end_all
from scripts.crashtest.remains import Remains, differences, good_checkpoint

WAYS = ("full", "immutable", "read-only", "errors", "limit")
LEAST = 20_000  # bytes of a limit: what a run prints goes to a file, too
ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
ROOTS = {"full", "immutable", "read-only"}  # those of WAYS that take a file system of their own


def system(*command):
    """Run a command; OSError, with what it said, where it fails."""
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{command[0]}: {done.stderr.strip() or done.returncode}")


class Disk:
    """A tmpfs at `place`, of `size` bytes."""

    def __init__(self, place, size):
        self.place, self.ballast = place, place / "ballast"
        place.mkdir(parents=True)
        system("mount", "-t", "tmpfs", "-o", f"size={size}", "crashtest", place)

    def fill(self, left):
        """Leave at most `left` bytes for others."""
        amount = shutil.disk_usage(self.place).free - left
        with contextlib.suppress(OSError), open(self.ballast, "wb", buffering=0) as file:
            while amount > 0:
                amount -= file.write(b"\0" * min(amount, 1 << 16))

    def freeze(self, folders):
        system("chattr", "+i", *folders)

    def read_only(self):
        system("mount", "-o", "remount,ro", self.place)

    def mend(self):
        """Make it a good disk again, whatever it was."""
        with contextlib.suppress(OSError):
            system("mount", "-o", "remount,rw", self.place)
        with contextlib.suppress(OSError):
            system("chattr", "-R", "-i", self.place)
        self.ballast.unlink(missing_ok=True)

    def unmount(self):
        self.mend()
        end_all()  # what holds files open there
        with contextlib.suppress(OSError):
            system("umount", "-l", self.place)


class Watch(threading.Thread):
    """Reads the last good checkpoint again and again; `faults` says where there was none."""

    def __init__(self, out):
        super().__init__(daemon=True)
        self.out, self.faults, self.looks, self.over = out, [], 0, threading.Event()

    def run(self):
        had = False
        while not self.over.wait(0.1):
            try:
                here = good_checkpoint(self.out) is not None
            except Exception as error:  # torch raises many kinds for a damaged file
                self.faults.append(f"no checkpoint could be read: {error}")
                return
            if had and not here:
                self.faults.append("the checkpoints were gone")
                return
            had, self.looks = had or here, self.looks + 1


def break_disks(case, folder, kills, seed, save_every, more, say, ways=WAYS):
    """The Report of every one of `ways` to break the disk under `case`, `kills` times each."""
    lab = Lab(case, folder / "disk", save_every, say=say)
    lab.out = lab.folder / "small" / "out"
    lab.flags[lab.flags.index("--out") + 1] = str(lab.out)
    unbroken = lab.run_unbroken()
    whole = sum(path.stat().st_size for path in unbroken.out.rglob("*") if path.is_file())
    say(f"{case.name}: unbroken in {lab.seconds:.1f} s, weights {unbroken.sha256()[:16]}")
    shutil.rmtree(lab.folder / "small")
    note, disk = "", None
    if ROOTS & set(ways):
        try:
            disk = Disk(lab.folder / "small", whole + 3 * lab.size)
        except OSError as error:
            note = f"no tmpfs here ({error}): errors and limits stand in for it"
            ways = [way for way in ways if way not in ROOTS]
    try:
        for way in ways:
            report = Report(case.name, way, note=note)
            rng = random.Random(f"{seed} {way}")
            while report.hits < kills and more():
                lab.fresh()
                report.rounds += 1
                if one_round(lab, disk, way, kills, rng, more, report):
                    report.equal += 1
            if report.hits < kills:
                report.note = f"{report.hits} of {kills}: the time was up"
            yield report
    finally:
        if disk is not None:
            disk.unmount()


def one_round(lab, disk, way, kills, rng, more, report):
    """A run to its end on a disk that breaks, and is mended before the run is started again."""
    before, known = (0, 0), len(report.faults)
    while True:
        broken = report.hits < kills and more()
        watch = Watch(lab.out)
        watch.start()
        try:
            what, ending = broken_process(lab, disk, way, before, rng) if broken else (
                "whole again", lab.child().end(PATIENCE))  # fmt: skip
            faults = []
        except TimeoutError as error:
            what, ending, faults = way, None, [str(error)]
        finally:
            watch.over.set()
            watch.join()
            if disk is not None:
                disk.mend()
        faults += watch.faults
        if ending is not None:
            faults += faults_of(ending, broken)
        try:
            after = Remains(lab.out).place()
            if after < before:
                faults.append(f"the checkpoint went back from {before} to {after}")
            before = after
        except Exception as error:  # torch raises many kinds for a damaged file
            faults.append(f"the checkpoints are damaged: {error}")
        report.faults += [f"{way}, {what}: {fault}" for fault in faults]
        if broken:
            report.hit(way)
            lab.say(f"{lab.case.name}: {way} {report.hits}/{kills}, {what}: exit code "
                    f"{ending and ending.code}; checkpoint of epoch {before[0]} + {before[1]} "
                    f"steps, read {watch.looks} times meanwhile")  # fmt: skip
        if ending is None or (not broken and ending.code):
            return False
        if not broken or (ending.code == 0 and rng.random() < 0.5):
            break
    if broken:  # what the run could not write to the very end, it writes now
        ending = lab.child().end(PATIENCE)
        report.faults += [f"{way}, whole again: {fault}" for fault in faults_of(ending, False)]
    found = differences(lab.unbroken, Remains(lab.out))
    report.faults += [f"round {report.rounds}: {odd}" for odd in found]
    equal = len(report.faults) == known
    lab.say(f"{lab.case.name}: round {report.rounds} ended {'equal' if equal else 'DIFFERENT'}")
    return equal


def broken_process(lab, disk, way, before, rng):
    """(What was done, the Ending) of one process on a disk that breaks; the run is at `before`."""
    if way == "errors":
        number, k = rng.choice(ERRORS), rng.randint(1, 40)
        until = k + rng.choice((1, 2, 5, 1000))
        plan = {"errno": number, "k": k, "until": until}
        what = f"{errno.errorcode[number]} from change {k} to {until - 1}"
        return what, lab.child(plan).end(PATIENCE)
    if way == "limit":
        limit = rng.randint(LEAST, max(lab.size, LEAST))
        return f"{limit:,} bytes a file", lab.child({"limit": limit}).end(PATIENCE)
    at = seconds_into(lab, rng, 1 - lab.steps(before) / (lab.case.epochs * lab.case.steps))
    child = lab.child()
    if way == "read-only":
        if not child.wait(at):
            child.strike(signal.SIGKILL, True)
        child.end(PATIENCE)
        disk.read_only()
        return f"from the start, killed after {at:.2f} s before", lab.child().end(PATIENCE)
    lasts = rng.choice((0.1, 0.5, 2.0, PATIENCE))
    child.wait(at)
    if way == "full":
        left = rng.choice((0, rng.randint(0, 4096), rng.randint(0, lab.size)))
        disk.fill(left)
        what = f"{left:,} bytes left after {at:.2f} s for {lasts} s"
    else:
        folders = [path for path in (lab.out / "checkpoints", lab.out / "logs") if path.exists()]
        folders = rng.sample(folders, rng.randint(1, len(folders))) if folders else [disk.place]
        disk.freeze(folders)
        what = f"{' and '.join(p.name for p in folders)} after {at:.2f} s for {lasts} s"
    killed = not child.wait(lasts) and rng.random() < 0.3
    if killed:
        child.strike(signal.SIGKILL, rng.random() < 0.5)
        child.wait(PATIENCE)
        what += ", then killed"
    if child.running():
        disk.mend()
    return what, child.end(PATIENCE)


def faults_of(ending, broken):
    """What is wrong with how a process ended."""
    if "Traceback" in ending.stderr:
        yield f"a traceback: {ending.stderr[-600:]!r}"
    elif ending.code and ending.struck is None and not broken:
        yield f"exit code {ending.code} on a good disk: {ending.said()[-3:]}"
    elif ending.code > 0 and "error: " not in ending.stderr and "Stopped: " not in ending.stdout:
        yield f"exit code {ending.code} without a sentence"
    elif ending.code < 0 and ending.code != -signal.SIGKILL:
        yield f"it died of signal {-ending.code}"
