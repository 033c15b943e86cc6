"""What only a GPU can show, the most valuable first: `python -m scripts.gpu_checks`.

Each check writes its finding to <out>/benchmark/gpu_checks.json as soon as it has one, and a check
that is there is not repeated: stop the command at any time, start it again, and it goes on. --fresh
starts over. Then the figures are run at the paper's scale as far as --epochs, for --time_limit at a
time (see scripts.reproduce). The exit code is 1 if a check failed, 75 if figures are left to run.

What is aimed at, and the check that shows it; a time that misses its target is told, not an error:

    no host read in an epoch                                           no_host_read_in_an_epoch
    ResNet-50: a step of at most 1.5 times fused SGD's                 step_times
    FCN 8x256: an epoch on CIFAR-10 in 0.15 s, its test included       epoch_times
    ResNet-18: in 1.0 s, VGG-16: in 0.6 s, bf16, channels_last,
        compiled                                                       epoch_times
    16 FCN runs at once: at least 5 times the epochs a second of one   runs_at_once
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from itertools import product
from pathlib import Path

import torch

from agd import AGD, init_weights
from architecture import build
from data import default_data_dir, load
from flags import Parser
from gradient import Gradient
from provenance import environment
from replay import Replay
from run import read_rows
from scripts.benchmark import __main__ as benchmark
from scripts.benchmark.program import epochs_of_main
from scripts.links import rates
from scripts.reproduce import duration
from train import Step, evaluate, mse, train_epoch

CPU = torch.device("cpu")


def network(arch, shape, classes, device, seed=0):
    torch.manual_seed(seed)
    net = build(arch, shape, classes).to(device)
    init_weights(net.parameters(), torch.Generator().manual_seed(seed))
    return net


def same_step_as_the_cpu(args):
    """A step of AGD on the GPU, by its kernels and the plain one, and on the CPU: same weights and
    gradients, each format."""
    worst = {"fused": 0.0, "plain": 0.0}
    for arch, shape in (("fcn", (3, 32, 32)), ("resnet18", (3, 32, 32)), ("vgg", (3, 32, 32))):
        for channels_last, fused in product((False, True), (True, False)):
            form = torch.channels_last if channels_last else torch.contiguous_format
            nets = [network(arch, shape, 10, d).to(memory_format=form) for d in (CPU, args.device)]
            pairs = list(zip(nets[0].parameters(), nets[1].parameters()))
            for p, q in pairs:
                if not torch.equal(p, q.cpu()):
                    raise AssertionError("one seed gave two sets of weights")
                p.grad = torch.randn_like(p) * 1e-3
                q.grad = p.grad.to(args.device)
            before = [p.detach().clone() for p, _ in pairs]
            AGD(nets[0].parameters(), fused=False).step()
            AGD(nets[1].parameters(), fused=fused).step()
            for (p, q), w in zip(pairs, before):
                error = ((q.cpu() - p).norm() / (p - w).norm()).item()
                kind = "fused" if fused else "plain"
                worst[kind] = max(worst[kind], error)
    if not max(worst.values()) < 1e-5:
        raise AssertionError(f"updates differ by {worst}")
    return {"worst relative difference of an update": worst}


def not_finite_and_scale(args):
    """A NaN leaves every weight, and gradients from 1e-37 to 1e37 keep their direction."""
    worst = 0.0
    for k in range(-37, 38):
        p = torch.zeros(64, 32, device=args.device, requires_grad=True)
        p.grad = torch.randn(64, 32, device=args.device) * 10.0**k
        AGD([p]).step()
        expected = -p.grad.double() / p.grad.double().norm()
        worst = max(worst, (p.double() / p.double().norm() - expected).norm().item())
    if not worst < 1e-6:
        raise AssertionError(f"directions differ by {worst:.1e}")
    p = torch.randn(64, 32, device=args.device, requires_grad=True)
    p.grad = torch.randn_like(p)
    p.grad[3, 3] = float("nan")
    before, optimizer = p.detach().clone(), AGD([p])
    optimizer.step()
    if not torch.equal(p, before) or int(optimizer.skipped) != 1:
        raise AssertionError("a NaN changed weights")
    return {"worst difference of a direction": worst}


def no_host_read_in_an_epoch(args):
    """Batches, training and evaluation under CUDA's own check for synchronisation."""
    data = load(args.dataset, args.data_dir, 128, 1000, args.device)
    net = network("fcn", data.shape, data.classes, args.device)
    optimizer = AGD(net.parameters())
    train_epoch(net, data.train, mse, optimizer).read()
    evaluate(net, data.test, mse).read()
    data.train.set_epoch(1)
    train, test = iter(data.train), iter(data.test)
    next(train), next(test)  # the epoch's draws have gone to the device with the first batch
    torch.cuda.set_sync_debug_mode("error")
    try:
        totals = train_epoch(net, train, mse, optimizer)
        tested = evaluate(net, test, mse)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"train_loss": totals.read()["loss"], "test_acc": tested.read()["acc"]}


def graphs_are_the_loop(args):
    """Five epochs by CUDA graphs and by the loop: the worst difference of a weight, milliseconds a
    step, both in the fifth, in which CUDA's own check for synchronisation watches."""
    found = {}
    with torch.cuda.stream(torch.cuda.Stream(args.device)):
        for arch in ("fcn", "resnet18"):
            weights, times = [], []
            for by_graph in (False, True):
                data = load(args.dataset, args.data_dir, 128, 10_000, args.device)
                net = network(arch, data.shape, data.classes, args.device)
                optimizer, gradient = AGD(net.parameters()), Gradient(net, mse)
                step = Step(net, mse, optimizer, gradient)
                replay = Replay(step, data.train, required=True) if by_graph else None
                for epoch in range(1, 6):
                    data.train.set_epoch(epoch)
                    torch.cuda.synchronize()
                    start = time.perf_counter()
                    torch.cuda.set_sync_debug_mode("error" if epoch == 5 else "default")
                    try:
                        totals = train_epoch(
                            net, data.train, mse, optimizer, gradient, replay=replay
                        )
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
                    torch.cuda.synchronize()
                    seconds = time.perf_counter() - start
                    if not totals.read()["loss"] < 2:
                        raise AssertionError(f"{arch} does not learn")
                weights.append([p.detach().double() for p in net.parameters()])
                times.append(seconds / len(data.train) * 1e3)
            worst = max(((a - b).norm() / a.norm()).item() for a, b in zip(*weights))
            if arch == "fcn" and not worst < 1e-6:
                raise AssertionError(f"weights differ by {worst:.1e}")
            found[arch] = {"worst difference": worst, "ms, loop": times[0], "ms, graph": times[1]}
    return found


def beside(found, target, most=True):
    """A number beside its target, `most` or least."""
    return {"found": found, "target": target, "met": found <= target if most else found >= target}


def measured(case, args, *flags):
    """What a case of scripts.benchmark finds here; it is written to a file of its own as well."""
    place = ["--device", str(args.device), "--data_dir", str(args.data_dir), "--out", str(args.out)]
    return benchmark.measure(case, benchmark.parse([case, *place, *flags]))[0]


def step_times(args):
    """A step beside fused SGD's: by the clock, launches included, and in the GPU's own queue."""
    found = measured("step", args, "--repeats", "20")
    return {kind: {net: beside(x["AGD"], 1.5) for net, x in found[kind].items()}
            for kind in ("ratios", "ratios in the queue") if kind in found}  # fmt: skip


FAST = ("--precision", "bf16", "--channels_last", "on", "--compile")
EPOCHS = {  # flags of main.py -> seconds
    ("--arch", "fcn", "--depth", "8"): 0.15,
    ("--arch", "resnet18", *FAST): 1.0,
    ("--arch", "vgg", *FAST): 0.6,
}


def epoch_times(args):
    """Seconds of an epoch, training and test, of main.py: medians of all but the first."""
    found = {}
    for words, target in EPOCHS.items():
        flags = [*words, "--dataset", args.dataset, "--test_bs", "1000", "--epochs", "6"]
        rows = epochs_of_main(flags, args, args.device)[1:]
        told = beside(statistics.median(row["seconds"] for row in rows), target)
        rate = statistics.median(row["images_per_second"] for row in rows)
        told |= {"images per second in training": rate, "test_acc": rows[-1]["test_acc"]}
        found[" ".join(words)] = told
    return found


def runs_at_once(args):
    """Epochs a second of many small runs beside those of one."""
    ratios = measured("many", args, "--repeats", "1", "--depth", "8")["ratios"]
    return {name: beside(x, 5, most=False) if name.startswith("16 ") else x
            for name, x in ratios.items()}  # fmt: skip


def resnet50_rate(args):
    """Images a second of ResNet-50 at 224 pixels, forward, backward and step, by batch size."""
    return {"images per second": rates("resnet50", 224, [2**k for k in range(3, 10)], args.device)}


def memory_that_runs_out(args):
    """A batch that does not fit is halved and repeated: the same update as in small passes."""
    found = []
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info(args.device)[1]
    images, labels = torch.randn(4096, 3, 32, 32), torch.arange(4096) % 10
    images, labels = images.to(args.device), labels.to(args.device)
    for fraction, micro_bs in ((min(1.0, 4e9 / total), None), (1.0, 64)):
        torch.cuda.set_per_process_memory_fraction(fraction, args.device)
        # without batch norm, whose statistics are those of each pass
        net = torch.nn.Sequential(
            torch.nn.Conv2d(3, 256, 3, bias=False), torch.nn.ReLU(),
            torch.nn.Conv2d(256, 64, 3, bias=False), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 10, bias=False),
        ).to(args.device)  # fmt: skip
        init_weights(net.parameters(), torch.Generator().manual_seed(0))
        gradient = Gradient(net, mse, micro_bs=micro_bs)
        gradient(images, labels)
        found.append(([p.grad.double() for p in net.parameters()], gradient.micro_bs))
    torch.cuda.set_per_process_memory_fraction(1.0, args.device)
    (halved, micro_bs), (small, _) = found
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(halved, small))
    if micro_bs is None or not worst < 1e-3:
        raise AssertionError(f"micro_bs {micro_bs}, gradients differ by {worst:.1e}")
    return {"micro_bs": micro_bs, "worst relative difference of a gradient": worst}


def broken_runs(args):
    """Runs that are killed at random moments, with --deterministic, end with the unbroken one's
    bits: ordinary steps, CUDA graphs and Adam."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder, "told.json")
        done = subprocess.run(
            [sys.executable, "-m", "scripts.crashtest", "--device", str(args.device), "--kills",
             "6", "--workers", "1", "--seconds", "150", "--out", str(told)],
            capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise AssertionError((done.stdout + done.stderr)[-2000:])
        reports = json.loads(told.read_text())["reports"]
    return {f"{x['case']}, {x['how']}": {key: x[key] for key in ("hits", "rounds", "equal")}
            for x in reports}  # fmt: skip


def ranks_of_nccl(args):
    """main.py over NCCL with a rank a GPU, beside one process: the losses of two epochs. None where
    there is one GPU alone."""
    losses, ranks = [], torch.cuda.device_count()
    if ranks < 2:
        return None
    flags = ["main.py", "--dataset", "digits", "--arch", "resnet18", "--epochs", "2"]
    flags += ["--device", "cuda"]
    with tempfile.TemporaryDirectory() as out:
        for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node",
                              str(ranks)]):  # fmt: skip
            more = ["--distribute", "--sync_bn"] if launcher else []
            place = Path(out, str(len(launcher)))
            subprocess.run([sys.executable, *launcher, *flags, *more, "--out", str(place)],
                           check=True, stdout=subprocess.DEVNULL)  # fmt: skip
            (log,) = Path(place, "logs").glob("*.jsonl")
            losses.append([row["train_loss"] for row in read_rows(log) if row["kind"] == "epoch"])
    worst = max(abs(a - b) / a for a, b in zip(*losses))
    if not worst < 1e-3:
        raise AssertionError(f"losses differ by {worst:.1e}")
    return {"ranks": ranks, "worst relative difference of a loss": worst}


def figures(args):
    """The figures at full scale, those first whose claims a hundred epochs can judge."""
    worst = 0
    for figure in ("fig5", "fig7", "fig1", "fig6", "fig3", "fig8", "fig4"):
        left = args.time_limit - (time.monotonic() - args.began)
        if left < 60:
            return 75
        code = subprocess.run(
            [sys.executable, "-m", "scripts.reproduce", figure, "--scale", "full", "--out",
             args.out, "--data_dir", args.data_dir, "--jobs", str(args.jobs), "--epochs",
             str(args.epochs), "--device", str(args.device), "--time_limit", f"{left:.0f}s"]
        ).returncode  # fmt: skip
        if code not in (0, 1):  # a run that failed keeps no other figure from being made
            return code
        worst = max(worst, code)
    return worst


CHECKS = [same_step_as_the_cpu, no_host_read_in_an_epoch, graphs_are_the_loop, step_times,
          epoch_times, broken_runs, runs_at_once, not_finite_and_scale, memory_that_runs_out,
          resnet50_rate, ranks_of_nccl]  # fmt: skip


def main(argv=None):
    parser = Parser(
        prog="python -m scripts.gpu_checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--data_dir", default=default_data_dir())
    parser.add_argument("--out", default="results")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--epochs", type=int, default=100, help="of the figures (default: 100)")
    parser.add_argument("--jobs", type=int, default=4, help="runs at once (default: 4)")
    parser.add_argument("--time_limit", type=duration, default="9m",
        help="for checks and figures together (default: 9m)")  # fmt: skip
    args = parser.parse_args(argv)
    args.began = time.monotonic()
    args.device = torch.device(args.device)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here")
    path = Path(args.out, "benchmark", "gpu_checks.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        done = {} if args.fresh or not path.exists() else json.loads(path.read_text())
    except ValueError:
        parser.error(f"{path} is damaged; --fresh starts over")
    done.setdefault("environment", environment(args.device))
    failed = False
    for check in CHECKS:
        if check.__name__ in done and "error" not in done[check.__name__]:
            print(f"{check.__name__}: done before")
            continue
        try:
            finding = check(args)
        except Exception as error:  # a failed check must not keep the others from running
            traceback.print_exc()
            finding, failed = {"error": f"{type(error).__name__}: {error}"}, True
        if finding is None:
            print(f"{check.__name__}: needs more GPUs than there are here")
            continue
        done[check.__name__] = finding
        path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        print(f"{check.__name__}: {json.dumps(finding)}", flush=True)
    return 1 if failed else figures(args)


if __name__ == "__main__":
    sys.exit(main())
