"""What to run on a GPU that is there for minutes, the most valuable first (on Linux).

    python -m scripts.gpu_checks --plan first    8 minutes: agreement, training, figures 5, 7, 1
    python -m scripts.gpu_checks --plan times    4 minutes: speed, and runs that are killed

Each check is a process with its part of the plan's time; what one leaves over is the others', and
one that hangs or crashes costs them no more. If the kernels do not agree with the plain step, the
rest goes on with that. --out gets gpu_checks.json, the results, and gpu_checks.tgz, all files but
checkpoints, both whole after every check. The same command goes on: what has passed is left out,
what failed comes last. `--device cpu` is a rehearsal.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tarfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from torch.cuda import device_count

from data import default_data_dir
from flags import Parser, number
from run import read_rows

LEAST, GRACE, ARCHIVE = 20, 10, 15e6  # seconds of any check; to stop in; bytes at most
FINE = ("passed", "stopped")  # what is stopped can go on, and has kept what it came to


class Check(NamedTuple):
    name: str
    seconds: float  # its part of the plan's time
    words: str  # of its command, with names in braces to fill in
    target: str = ""  # what is aimed at


TEST = "-m pytest -qo faulthandler_timeout={limit} --junitxml {folder}/t.xml tests/test_gpu.py -k "
WHERE = "--device {device} --out {folder} "  # and the data in $AGD_DATA
MAIN = f"main.py {WHERE} --dataset cifar10 --test_bs 1000 "
FIGURE = f"-m scripts.reproduce {WHERE} --scale full --time_limit {{limit}}s --together {{how}} "
TIMES = f"-m scripts.benchmark {WHERE} {{nets}} "
MANY = "many --depth 8 --repeats 1 --counts {many} --together "
WAIT = """-c 'import os, time
while not os.path.exists(os.environ["AGD_DATA"] + "/cifar10.npz"): time.sleep(0.2)'"""
DRAW = """-c 'import os, numpy as n; x, y = n.arange(49152) % 251, n.arange(16) % 10
x = x.astype("u1").reshape(16, 32, 32, 3); n.savez(os.environ["AGD_DATA"] + "/cifar10.npz",
train_images=x, test_images=x, train_labels=y, test_labels=y)'"""
DATA = Check("data", 1, "{images}")  # which may still be unpacked meanwhile
PLANS = {  # name -> seconds in all, checks
    "first": (465, [
        Check("machine", 3, TEST + "machine"),
        Check("kernels", 12, TEST + "kernels"),
        Check("step", 20, TEST + "step"),
        DATA,
        Check("graphs", 30, TEST + "graphs"),
        Check("resnet18", 100, MAIN + "--arch resnet18 {fast} {long}"),
        Check("adam", 80, MAIN + "--arch resnet18 {fast} {long} --optimizer adam --lr 1e-4"),
        Check("vgg", 55, MAIN + "--arch vgg {fast} {long}"),
        Check("threads", 20, FIGURE + "fig5 --runs agd-seed --jobs 3 {short}"),
        Check("fig5", 55, FIGURE + "fig5 --runs fcn --jobs 13 {long}"),
        Check("fig7", 45, FIGURE + "fig7 --runs fcn --jobs 12 {long}"),
        Check("fig1", 40, FIGURE + "fig1 --runs fcn --jobs 3 {long}"),
    ]),
    "times": (228, [
        DATA,
        Check("step-times", 45, TIMES + "step --repeats 7", "1.5 times fused SGD, graphs"),
        Check("fcn-epoch", 20, MAIN + "--arch fcn --depth 8 {short}", "0.15 s with its test"),
        Check("resnet18-epoch", 45, MAIN + "--arch resnet18 {fast} {compile} {short}", "1.0 s"),
        Check("vgg-epoch", 35, MAIN + "--arch vgg {fast} {compile} {short}", "0.6 s"),
        Check("many-threads", 25, TIMES + MANY + "on", "5 times one run"),
        Check("many-processes", 20, TIMES + MANY + "off"),
        Check("crashes", 46, "-m scripts.crashtest --device {device} --cases digits --workers 1 "
              "--kills 2 --seconds 30 --out {folder}/crashtest.json"),
        Check("rest", 2, TEST + "'rank or read or memory or rate'"),  # where a minute is left
    ]),
}  # fmt: skip
ALL = {check.name: check for _, checks in PLANS.values() for check in checks}
WORDS = {
    "cuda": {"fast": "--precision bf16 --channels_last on", "compile": "--compile", "many": "16",
             "nets": "--nets 3", "long": "--epochs 2000", "short": "--epochs 6", "images": WAIT},
    "cpu": {"fast": "", "compile": "", "many": "2", "nets": "--nets 1 --quick",
            "long": "--epochs 2", "short": "--epochs 2", "images": DRAW}}  # fmt: skip


def run(check, seconds, args, failed):
    """What came of a check, a dict: it has so many seconds, and then GRACE to stop in."""
    (folder := args.work / check.name).mkdir(parents=True, exist_ok=True)
    command = shlex.split(check.words.format(
        device=args.device, folder=shlex.quote(str(folder)), limit=int(seconds) - 5,
        how="off" if "threads" in failed else "on", **WORDS[args.device],
    ))  # fmt: skip
    env = {**os.environ, "AGD_DATA": str(args.data_dir.resolve()), "AGD_TEST_DEVICE": args.device,
           "TRITON_INTERPRET": str(int(args.device == "cpu"))}  # fmt: skip
    env |= {"AGD_NO_COMPILER": "1"} if "kernels" in failed else {}
    # Coreutils' ends a whole group of processes, and outlives this one.
    timeout = ["timeout", "--preserve-status", "--signal=INT", f"--kill-after={GRACE}",
               str(seconds), sys.executable, "-u", "-X", "faulthandler"]  # fmt: skip
    root, output, began = Path(__file__).parents[1], folder / "output.txt", time.monotonic()
    with open(output, "wb") as file:
        process = subprocess.Popen(timeout + command, cwd=root, env=env, stdout=file,
                                   stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT)  # fmt: skip
        try:
            code = process.wait()
        finally:
            process.terminate()
    took = time.monotonic() - began
    stopped = code == 75 or (code == 130 and "{long}" in check.words)  # as it has to be
    bad = "timeout" if took >= seconds else "failed"
    status = "passed" if code == 0 else "stopped" if stopped else bad
    return {"status": status, "seconds": round(took, 1), "budget": round(seconds, 1), "code": code,
            "plain step": "kernels" in failed, "command": shlex.join(["python", *command]),
            "target": check.target, "found": findings(folder),
            "output": output.read_text(errors="replace")[-2000:] if status == bad else ""}


def findings(folder):
    """What files tell: properties of tests, the last epoch of runs, ratios of times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        with suppress(Exception):  # what a killed process leaves has any form
            if path.suffix == ".xml":
                properties = ElementTree.parse(path).iter("property")
                found |= {x.get("name"): json.loads(x.get("value")) for x in properties}
            elif path.suffix == ".jsonl":
                epochs = [row for row in read_rows(path) if row["kind"] == "epoch"]
                seconds = statistics.median([row["seconds"] for row in epochs][-5:])
                found[path.stem] = {**epochs[-1], "seconds": seconds}
            elif path.suffix == ".json":
                kinds, told = ("ratios", "bytes a", "epochs a", "reports"), path.read_text()
                found |= {k: x for k, x in json.loads(told).items() if k.startswith(kinds)}
    return found


def keep(args, report):
    """Write the results, and the archive of what was written."""
    for folder in (args.work, args.out):  # which may be different disks
        partial = folder / "gpu_checks.partial"
        partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, folder / "gpu_checks.json")
    with open(partial, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for path in sorted(args.work.glob("*/**/*")):
            name = path.relative_to(args.work)
            with suppress(OSError):  # of a process that ends meanwhile
                fits = file.tell() + path.stat().st_size < ARCHIVE
                if fits and path.is_file() and not {"checkpoints", "data"} & set(name.parts):
                    archive.add(path, name)
    os.replace(partial, args.out / "gpu_checks.tgz")


def main(argv=None):
    parser = Parser(prog="python -m scripts.gpu_checks", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--plan", choices=PLANS, default="first", help="(default: first)")
    add("--only", choices=ALL, metavar="NAME", help="this check alone, even where it has passed")
    add("--budget", type=number(float, 0.01, 100), default=1.0, help="times the plan's seconds")
    add("--device", choices=WORDS, default="cuda", help="(default: cuda)")
    add("--data_dir", default=default_data_dir(), help="with cifar10.npz, now or soon")
    add("--work", type=Path, default=Path("reproduced/gpu"), help="(default: %(default)s)")
    add("--out", type=Path, help="(default: that of --work)")
    args, began = parser.parse_args(argv), time.monotonic()
    if args.device == "cuda" and not device_count():  # asks NVML: this process starts no CUDA
        parser.error("there is no GPU here; --device cpu is a rehearsal")
    args.work, args.out = args.work.resolve(), (args.out or args.work).resolve()
    args.data_dir = Path(args.work / "data" if args.device == "cpu" else args.data_dir).expanduser()
    for folder in (args.work, args.out, args.data_dir):
        folder.mkdir(parents=True, exist_ok=True)
    path = args.work / "gpu_checks.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    seconds, checks = (ALL[args.only].seconds, [ALL[args.only]]) if args.only else PLANS[args.plan]
    todo = [x for x in checks if args.only or done.get(x.name, {}).get("status") != "passed"]
    todo.sort(key=lambda check: check.name in done)
    limit = max(seconds * args.budget, LEAST * (len(todo) if args.device == "cpu" else 1))
    for i, check in enumerate(todo):
        left = limit - (time.monotonic() - began)
        if left <= GRACE:
            break
        part = max(LEAST, left * check.seconds / sum(x.seconds for x in todo[i:]))
        print(f"{check.name:15}", end="", flush=True)
        failed = {name for name, x in done.items() if x["status"] not in FINE}
        done[check.name] = run(check, part, args, failed)
        keep(args, done)
        print("{status:8}{seconds:6.1f} of {budget:.0f} s".format(**done[check.name]))
    bad = [x.name for x in checks if done.get(x.name, {}).get("status") not in FINE]
    print(f"Not well or not run: {', '.join(bad) or 'none'} ({path})")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else f"error: {error}")
