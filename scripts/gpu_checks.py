"""What to run on a GPU that is there for minutes, the most valuable first (on Linux).

    python -m scripts.gpu_checks --plan first     8 minutes: agreement, training, figures 5, 7, 1
    python -m scripts.gpu_checks --plan times     4 minutes: speed, and runs that are killed
    python -m scripts.gpu_checks --plan spectral  4 minutes: SpectralAGD's agreement and speed
    python -m scripts.gpu_checks --plan text      8 minutes: a GPT on characters, GPT-2 small
    python -m scripts.gpu_checks --plan rest      4 minutes: processes, NCCL, memory, ResNet-50

A check is a test marked `gpu`, a case of scripts.benchmark or runs of main.py, in a process with
its part of the plan's time. Time that it leaves goes to later checks; one that hangs or crashes
takes no more than its own. Where kernels disagree with torch's operations, later checks do without.
--out gets gpu_checks.json, the results, and gpu_checks.tgz, all files but checkpoints, whole after
every check. The same command goes on: it skips passed checks and takes failed ones last. `--device
cpu` is a rehearsal.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import time

BEGAN = time.monotonic()  # before torch is imported, which may take a quarter of a minute

import argparse
import json
import os
import shlex
import subprocess
from contextlib import suppress
from typing import NamedTuple

from torch.cuda import device_count

from cli import Parser, a_path, command, number
from data import data_folder, default_data_dir
from runs.files import write_whole
from scripts.results import findings

LEAST, GRACE, ARCHIVE = 20, 10, 15e6  # seconds of any check; to stop in; bytes at most
SUCCESS = ("passed", "stopped")  # a stopped run can go on, and has kept its epochs


class Check(NamedTuple):
    name: str
    seconds: float  # its part of the plan's time
    command: str  # names in braces are filled in
    target: str = ""


TEST = ("-m pytest -qm gpu -o faulthandler_timeout={limit} --junitxml {folder}/t.xml "
        "tests/test_gpu.py -k ")  # fmt: skip
WHERE = "--device {device} --out {folder} "  # and the data in $AGD_DATA
MAIN = f"main.py {WHERE} --dataset cifar10 --test_bs 1000 "
FIGURE = f"-m scripts.reproduce {WHERE} --scale full --time_limit {{limit}}s --together {{how}} "
TIMES = f"-m scripts.benchmark {WHERE} {{quick}} "
MANY = "many --depth 8 --repeats 1 --counts {many} --together "
WAIT = """-c 'import os, time
while not os.path.exists(os.environ["AGD_DATA"] + "/cifar10.npz"): time.sleep(0.2)'"""
DRAW = """-c 'import os, numpy as n; x, y = n.arange(49152) % 251, n.arange(16) % 10
x = x.astype("u1").reshape(16, 32, 32, 3); n.savez(os.environ["AGD_DATA"] + "/cifar10.npz",
train_images=x, test_images=x, train_labels=y, test_labels=y)'"""
TOKENS = """-c 'import bz2, os, numpy as n; text = open("data/shakespeare.txt.bz2", "rb").read()
x = n.frombuffer(bz2.decompress(text), "u1").astype("<u2"); out = os.environ["AGD_DATA"] + "/tokens"
os.makedirs(out, exist_ok=True); cut = 1000000
x[:cut].tofile(out + "/train.bin"); x[cut:].tofile(out + "/val.bin")'"""
GPT2 = f"main.py {WHERE} --arch gpt2 --dataset tokens:{{data}}/tokens {{gpt2}} --optimizer "
DATA = Check("data", 1, "{images}")  # another process may still unpack them
KERNELS = Check("kernels", 45, TEST + "kernels")
PLANS = {  # name -> seconds in all, checks
    "first": (465, [
        Check("machine", 30, TEST + "machine"),
        KERNELS,
        Check("step", 45, TEST + "'step and not spectral'"),
        DATA,
        Check("graphs", 60, TEST + "'graphs and not Spectral'"),
        Check("resnet18", 100, MAIN + "--arch resnet18 {fast} {long}"),
        Check("adam", 80, MAIN + "--arch resnet18 {fast} {long} --optimizer adam --lr 1e-4"),
        Check("vgg", 55, MAIN + "--arch vgg {fast} {long}"),
        Check("threads", 45, FIGURE + "fig5 --runs fcn --jobs 3 {short}"),
        Check("fig5", 55, FIGURE + "fig5 --runs fcn --jobs 12 {long}"),
        Check("fig7", 45, FIGURE + "fig7 --runs fcn --jobs 4 {long}"),
        Check("fig1", 40, FIGURE + "fig1 --runs fcn --jobs 4 {long}"),
    ]),
    "times": (228, [
        KERNELS,
        DATA,
        Check("step-times", 45, TIMES + "step {nets} --repeats 7", "1.5 times fused SGD, graphs"),
        Check("fcn-epoch", 20, MAIN + "--arch fcn --depth 8 {short}", "0.15 s with its test"),
        Check("resnet18-epoch", 50, MAIN + "--arch resnet18 {fast} {compile} {short}", "1.0 s"),
        Check("many-threads", 55, TIMES + MANY + "on", "5 times one run"),
        Check("crashes", 60, "-m tests.crash --device {device} --cases digits --workers 1 "
              "--kills 1 --seconds 25"),
    ]),
    "spectral": (240, [
        KERNELS,
        DATA,
        Check("spectral-step", 35, TEST + "spectral"),
        Check("spectral-resnet18", 45, MAIN + "--arch resnet18 {fast} {short} --optimizer spectral",
              "1.15 times an epoch of adam"),
        Check("adam-resnet18", 35, MAIN + "--arch resnet18 {fast} {short} --optimizer adam"),
        Check("spectral-times", 60, TIMES + "spectral {nets} --repeats 5"),
    ]),
    # GPT-2 small with its own vocabulary, on the bytes of a text: speed, memory, the first losses.
    "text": (465, [
        KERNELS,
        Check("tokens", 5, TOKENS),
        Check("text", 60, TEST + "text_is"),
        Check("gpt", 35, f"main.py {WHERE} --arch gpt --dataset shakespeare {{gpt}} --optimizer "
              "spectral", "validation loss of 1.75"),
        Check("gpt2-agd", 95, GPT2 + "agd", "150,000 tokens a second"),
        Check("gpt2-spectral", 95, GPT2 + "spectral", "0.85 of adamw's tokens a second"),
        Check("gpt2-adamw", 95, GPT2 + "adamw --lr 6e-4 --weight_decay 0.1 --schedule cosine"),
        Check("gpt2-eager", 50, TEST + "text_speed"),
    ]),
    "rest": (240, [
        Check("vgg-epoch", 50, MAIN + "--arch vgg {fast} {compile} {short}", "0.6 s"),
        Check("many-processes", 70, TIMES + MANY + "off", "0.8 of what threads reach"),
        Check("nccl", 20, TEST + "rank"),
        Check("memory", 20, TEST + "'memory or read'"),
        Check("rates", 60, TEST + "rate"),
    ]),
}  # fmt: skip
ALL = {check.name: check for _, checks in PLANS.values() for check in checks}
WORDS = {
    "cuda": {"fast": "--precision bf16 --channels_last on", "compile": "--compile", "many": "16",
             "nets": "--nets 3", "quick": "", "long": "--epochs 2000", "short": "--epochs 6",
             "images": WAIT, "gpt": "",
             "gpt2": "--vocab 50257 --train_bs 32 --test_bs 32 --epoch_steps 50 --epochs 4 "
             "--precision bf16 --compile"},
    "cpu": {"fast": "", "compile": "", "many": "2", "nets": "--nets 1",
            "quick": "--quick", "long": "--epochs 2", "short": "--epochs 2", "images": DRAW,
            "gpt": "--depth 1 --width 16 --heads 2 --epoch_steps 2 --test_examples 8",
            "gpt2": "--vocab 256 --train_bs 2 --epoch_steps 2 --epochs 2 --test_examples 8 "
            "--depth 1 --width 32 --heads 2 --context 32"},
}  # fmt: skip


def run(check, seconds, args, failed):
    """The result of a check, a dict: it has so many seconds, and then GRACE to stop in."""
    (folder := args.work / check.name).mkdir(parents=True, exist_ok=True)
    how = "off" if failed & {"threads", "fig5", "fig7", "fig1"} else "on"
    command = shlex.split(check.command.format(
        device=args.device, folder=shlex.quote(str(folder)), limit=int(seconds) - 5, how=how,
        data=shlex.quote(str(args.data_dir.resolve())), **WORDS[args.device]))  # fmt: skip
    env = {**os.environ, "AGD_DATA": str(args.data_dir.resolve()), "AGD_TEST_DEVICE": args.device,
           "TRITON_INTERPRET": str(int(args.device == "cpu")), "PYTHONFAULTHANDLER": "1"}
    env |= {"AGD_NO_COMPILER": "1"} if "kernels" in failed else {}
    # Coreutils' ends a whole group of processes, and outlives this one.
    timeout = ["timeout", "--preserve-status", "--signal=INT", f"--kill-after={GRACE}"]
    root, output, began = Path(__file__).parents[1], folder / "output.txt", time.monotonic()
    with open(output, "wb") as file, suppress(subprocess.TimeoutExpired):
        process = subprocess.Popen(
            [*timeout, str(seconds), sys.executable, "-u", *command], cwd=root, env=env,
            stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            process.wait(seconds + GRACE + 5)  # a driver may hold even a killed process
        finally:
            process.terminate()
    took, code, results = time.monotonic() - began, process.poll(), findings(folder)
    text = output.read_text(encoding="utf-8", errors="replace")[-2000:]
    # A run without an end of its own has to have finished an epoch.
    stopped = code == (75 if "time_limit" in check.command else 130) and "{long}" in check.command
    status = "passed" if code == 0 else "timeout" if took >= seconds else "failed"
    if code and stopped and results:
        status = "failed" if " failed: " in text else "stopped"
    return {"status": status, "seconds": round(took, 1), "budget": round(seconds, 1), "code": code,
            "without kernels": "kernels" in failed, "command": shlex.join(["python", *command]),
            "target": check.target, "found": results,
            "output": "" if status in SUCCESS else text}  # fmt: skip


def keep(args, report):
    """Write the results, and the archive of all files."""
    for folder in (args.work, args.out):
        write_whole(folder / "gpu_checks.json", json.dumps(report, indent=1) + "\n")
    partial = args.out / "gpu_checks.partial"
    leave_out = [f"--exclude={x}" for x in ("checkpoints", "./data", "gpu_checks.*")]
    # Its exit code is 1 for a file that has changed meanwhile.
    subprocess.run(["tar", "-C", args.work, *leave_out, "-czf", partial, "."], capture_output=True)
    if partial.stat().st_size < ARCHIVE:
        os.replace(partial, args.out / "gpu_checks.tgz")
    else:
        print("(gpu_checks.tgz would be too large: it stays as it was) ", end="")


def main(argv=None):
    parser = Parser(prog=command("scripts.gpu_checks"), description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("--plan", choices=PLANS, default="first", help="(default: first)")
    add("--only", choices=ALL, metavar="NAME", help="this check alone, even where it has passed")
    add("--budget", type=number(float, 0.01, 100), default=1.0, help="times the plan's seconds")
    add("--device", choices=WORDS, default="cuda", help="(default: cuda)")
    add("--data_dir", default=default_data_dir(), help="with cifar10.npz, now or soon")
    add("--work", type=a_path, default="reproduced/gpu", help="(default: %(default)s)")
    add("--out", type=a_path, help="(default: that of --work)")
    args = parser.parse_args(argv)
    parser.refuse(argv, {"plan": "is of many checks, and --only is one"} if args.only else {})
    if args.device == "cuda" and not device_count():  # asks NVML: this process starts no CUDA
        parser.error("there is no GPU here; --device cpu is a rehearsal")
    args.work, args.out = (Path(x).resolve() for x in (args.work, args.out or args.work))
    args.data_dir = args.work / "data" if args.device == "cpu" else data_folder(args.data_dir)
    for folder in (args.work, args.out, args.data_dir):
        folder.mkdir(parents=True, exist_ok=True)
    path = args.work / "gpu_checks.json"
    done = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    seconds, checks = (ALL[args.only].seconds, [ALL[args.only]]) if args.only else PLANS[args.plan]
    again = {x.name for x in checks if args.only or x is DATA}
    todo = [x for x in checks if x.name in again or done.get(x.name, {}).get("status") != "passed"]
    # Other checks need the data, and the verdict on the kernels: those two keep their places.
    todo.sort(key=lambda check: check.name in done and check.name not in ("data", "kernels"))
    many = len(todo) if args.device == "cpu" else 1
    limit = max(seconds * args.budget, LEAST * (many + 1))
    for i, check in enumerate(todo):
        left = limit - (time.monotonic() - BEGAN)
        if left < LEAST:
            break
        part = left * check.seconds / sum(x.seconds for x in todo[i:])
        part = min(max(LEAST, part), left - GRACE)
        print(f"{check.name:15}", end="", flush=True)
        failed = {name for name, x in done.items() if x["status"] not in SUCCESS}
        done[check.name] = run(check, part, args, failed)
        keep(args, done)
        print("{status:8}{seconds:6.1f} of {budget:.0f} s".format(**done[check.name]))
    bad = [x.name for x in checks if done.get(x.name, {}).get("status") not in SUCCESS]
    print(f"Not well or not run: {', '.join(bad) or 'none'} ({path})")
    return 1 if bad else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (KeyboardInterrupt, OSError) as error:
        sys.exit(130 if isinstance(error, KeyboardInterrupt) else f"error: {error}")
