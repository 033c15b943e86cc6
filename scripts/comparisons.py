"""Optimisers beside one another on small workloads: the engine of scripts.any_model and
scripts.spectral. A case is {part: function that returns its rows} and bounds on them; a part runs
once, and its rows and a page stay under --out."""

import argparse
import copy
import itertools
import json
import platform
import sys
import time
from contextlib import suppress
from datetime import date
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn

import agd
from agd import AGD, SpectralAGD
from cli import Parser, UserError, a_path, command, one_of
from data import DATASETS, default_data_dir, load
from data.arrays import ArrayBatches, load_arrays
from data.prepare import prepare
from runs.files import write_whole
from runs.provenance import environment
from scripts.markdown import renew, table
from scripts.words import significant
from training.losses import xent
from training.schedule import scheduled
from training.step import evaluate, train_epoch

CPU = torch.device("cpu")
LIBRARIES = ("torch", "numpy", "torchvision", "transformers", "timm")
TINY = {  # settings of --quick, for tests; a case's own win
    "depth": 3, "depths": (3,), "width": 16, "layers": 2, "heads": 2, "channels": (4, 8, 8),
    "batch": 16, "images": 64, "test": 32, "context": 16, "texts": 4, "held": 64, "seeds": (0,),
    "epochs": 1, "before": 1, "steps": 4, "text_steps": 4, "image_steps": 3, "warm_up": 1,
    "activations": ("ReLU", "Tanh"), "rates": (1e-3,), "hidden": 16, "digits": 64,
    "digit_before": 1, "digit_marks": (1, 2), "digit_rates": (1e-3,),
}  # fmt: skip


class Limit(NamedTuple):
    """That a number of a run, or its difference from the same seed of `than`, is at most, or at
    `least`, `limit` at its worst seed."""

    run: str
    key: str
    limit: float
    least: bool = False
    than: str | None = None


def judged(rows, limits):
    """The bounds whose runs are there: {"what", "found", "limit", "least"}."""
    values, bounds = {}, []
    for x in rows:
        for key, number in x["numbers"].items():
            values.setdefault((x["run"], key), {})[x["seed"]] = number
    for run, key, limit, least, than in limits:
        ours = values.get((run, key), {})
        theirs = values.get((than, key), {}) if than else dict.fromkeys(ours, 0)
        if seeds := ours.keys() & theirs.keys():
            worst = (min if least else max)(ours[seed] - theirs[seed] for seed in seeds)
            what = f"{run}: {key}{f', minus that of {than}' if than else ''}"
            bounds.append({"what": what, "found": worst, "limit": limit, "least": least})
    return bounds


def verdict(bound):
    """The cells of a bound's line."""
    limit, least = bound["limit"], bound["least"]
    by = (bound["found"] - limit) * (1 if least else -1)
    words = "**holds**" if by >= 0 else "**does not hold**"
    return [bound["what"], significant(bound["found"], 4), f"{'≥' if least else '≤'} {limit:g}",
            f"{words}, by {significant(abs(by), 2)}"]  # fmt: skip


def tables(result):
    """A case in Markdown: runs with the numbers of each seed, bounds, how it was made."""
    keys, runs = list(dict.fromkeys(key for x in result["rows"] for key in x["numbers"])), {}
    for x in result["rows"]:
        cells = runs.setdefault(x["run"], {key: {} for key in keys})
        for key, number in x["numbers"].items():
            cells[key][significant(number, 4)] = None  # a number that several seeds share, once
    parts = [table(["run", *keys], [[run, *map("; ".join, cells.values())]
                                    for run, cells in runs.items()])]  # fmt: skip
    if result["bounds"]:
        head = ["bound on", "found", "limit", "verdict"]
        parts.append(table(head, map(verdict, result["bounds"])))
    words = [", ".join(f"{k} {v}" for k, v in result[x].items()) for x in ("settings", "versions")]
    words.append("{device_name}, threads: {threads}.</sub>".format(**result["environment"]))
    parts.append(f"<sub>`{result['command']}`, {result['date']}; {'; '.join(words)}")
    return "\n\n".join(parts)


def report(folder, cases, title):
    """Put each case's tables between its marks in README.md, or at its end without marks."""
    page = folder / "README.md"
    for case in cases:
        if not (path := folder / f"{case}.json").exists():
            continue
        text = page.read_text(encoding="utf-8") if page.exists() else f"# {title}\n"
        marks = f"<!-- {case} -->", f"<!-- end of {case} -->"
        if marks[0] not in text:
            write_whole(page, f"{text}\n## {case}\n\n{''.join(marks)}\n")
        renew(page, *marks, tables(json.loads(path.read_text(encoding="utf-8"))))


def stored(path, args, settings, parts):
    """What a case's file holds, or will. Exits where the file was measured with other settings. One
    without parts was measured as a whole."""
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    result = {"command": f"python -m scripts.{args.script} {args.case}" + " --quick" * args.quick,
              "date": date.today().isoformat(), "settings": {k: getattr(args, k) for k in settings},
              "data": args.data, "versions": versions, "environment": environment(CPU),
              "parts": {}, "rows": [], "bounds": []}  # fmt: skip
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        ours = json.loads(json.dumps(result["settings"]))
        if ours != {key: kept["settings"].get(key) for key in ours}:
            sys.exit(f"{path} has other settings: move it away, or give another --out")
        result["parts"] = kept.get("parts", dict.fromkeys(parts))
        result |= {key: kept[key] for key in ("rows", "bounds")}
        result["data"] = result["data"] or kept["data"]
    return result


def main(module, title, argv=None):
    """The command line of a script: `module` has CASES, SETTINGS and perhaps QUICK."""
    script, cases = Path(module["__file__"]).stem, module["CASES"]
    parser = Parser(prog=command(f"scripts.{script}"), description=module["__doc__"],
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("case", type=one_of([*cases, "report"]), metavar="CASE")
    add("--data_dir", default=default_data_dir())
    add("--out", type=a_path, default="reproduced",
        help="(default: %(default)s; results holds the published files)")
    add("--quick", action="store_true", help="tiny, to see that it runs")
    add("--only", default="", metavar="TEXT", help="parts with it in their names")
    add("--list", action="store_true", help="name the parts, and run none")
    parser.set_defaults(script=script, data=None)
    args = parser.parse_args(argv)
    if args.case == "report":
        parser.refuse(argv, dict.fromkeys(("quick", "only", "list"), "is not for report"))
    parser.refuse(argv, {"only": "is not for --list, which names all parts"} if args.list else {})
    folder = Path(args.out, script)
    if args.case == "report":
        return report(folder, cases, title)
    settings, path = module["SETTINGS"][args.case], folder / f"{args.case}.json"
    tiny = TINY | module.get("QUICK", {}).get(args.case, {}) if args.quick else {}
    for key, value in settings.items():
        setattr(args, key, tiny.get(key, value))
    parts, limits = cases[args.case](args)
    for name, run in parts.items():
        result = stored(path, args, settings, parts)
        if args.list:
            print(name, "(done)" * (name in result["parts"]))
        if args.list or args.only not in name or name in result["parts"]:
            continue
        begun = time.perf_counter()
        try:
            rows = [{**x, "part": name} for x in run()]
        except UserError as error:
            parser.error(str(error))
        seconds = round(time.perf_counter() - begun)
        result = stored(path, args, settings, parts)  # other processes may have added parts
        result["parts"][name] = {"date": result["date"], "seconds": seconds,
                                 "commit": result["environment"]["commit"]}  # fmt: skip
        rows += result["rows"]
        result["rows"] = [x for part in parts for x in rows if x["part"] == part]
        result["bounds"] = judged(result["rows"], limits)
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(result, indent=1) + "\n")
    if not args.list:
        print(tables(stored(path, args, settings, parts)))


def row(run, seed, optimizer=None, curve=(), **numbers):
    """One run: its numbers, L and the last eta of AGD, the clock of SpectralAGD's weights."""
    if isinstance(optimizer, SpectralAGD):
        numbers |= dict(zip(("length", "turn"), map(float, optimizer.clock())))
    if isinstance(optimizer, AGD):
        numbers |= {"L": optimizer.L, "η": optimizer.eta.item()}
    numbers = {key.replace("_", " "): float(f"{x:.5g}") for key, x in numbers.items()}
    return {"run": run, "seed": seed, "numbers": numbers, "curve": [round(x, 5) for x in curve]}


def whole(batches):
    """The batches of the full size: the rest of an epoch may be a few images."""
    return (batch for batch in batches if len(batch[1]) == batches.batch_size)


def measure(args, run, work, rule, seed, *, keys=("test_loss", "test_accuracy"), marks=None,
            width=10, take=whole, recalibrate=False,
            more=lambda net, batches, loss: {}):  # fmt: skip
    """[row] of a run. work(seed): (net, training batches, test batches, loss, steps), where steps
    are None for epochs; rule(net, steps): its optimiser; keys: of loss and accuracy; marks: the
    epochs or steps after which a row is read, instead of one at the end of args.epochs or steps;
    width: the steps between two points of the curve, which has mean train losses; take: the batches
    of an epoch that train; more(net, batches, train loss): further numbers."""
    torch.manual_seed(seed)
    net, batches, tests, loss, steps = work(seed)
    last = max(marks or [steps or args.epochs])
    if steps:
        unit, optimizer = "steps", rule(net, last)
        chunks = in_steps(epochs(batches, None, take), last, width)
    else:
        unit, width = "epochs", 1
        size = batches.examples // batches.batch_size if take is whole else len(batches)
        optimizer, chunks = rule(net, last * size), epochs(batches, last, take)
    rows, curve = [], []
    for mean, seconds in train(net, optimizer, chunks, loss):
        curve.append(mean)
        done = min(len(curve) * width, last)
        if done not in (marks or [last]):
            continue
        if recalibrate:
            agd.recalibrate(net, itertools.islice(batches, 8))
        numbers = {"train_loss": mean, **dict(zip(keys, score(net, tests, loss)))}
        numbers |= seconds | more(net, batches, mean)
        name = f"{run}, {done} {unit}" if marks else run
        rows.append(row(name, seed, optimizer, [] if marks else curve, **numbers))
        print(name, seed, rows[-1]["numbers"], file=sys.stderr, flush=True)
    return rows


def adapted(args, name, start, new, tests, loss, runs, seed, **how):
    """Rows of a trained network, `start`, and of its copies that each of `runs` trains on the
    batches `new`."""

    def work(seed):
        return copy.deepcopy(start), new, tests, loss, None

    rows = [row(f"{name}before", seed, **how["more"](start))]
    for run, rule in runs.items():
        rows += measure(args, f"{name}{run}", work, rule, seed, keys=(), **how)
    return rows


def parts(args, runs, seeds=None, **how):
    """{part: function} that measures each of {run: (work, rule)} at each seed."""
    return {f"{run}, seed {seed}": partial(measure, args, run, *what, seed, **how)
            for run, what in runs.items() for seed in seeds or args.seeds}  # fmt: skip


def cifar(args, seed, part=slice(None), pad=0, flip=False):
    """(training, test) batches of CIFAR-10, `images` and `test` of them drawn from the whole set,
    which may be sorted by class; of the training images, `part`, cropped by `pad` and mirrored."""
    spec, path, both = DATASETS["cifar10"], prepare("cifar10", args.data_dir), []
    arrays, args.data = load_arrays(path, spec.shape, spec.classes)
    for i, (split, count) in enumerate((("train", args.images), ("test", args.test))):
        images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
        order = np.random.RandomState(i).permutation(len(labels))[:count]
        order = order if i else order[part]
        augment = {} if i else {"pad": pad, "flip": flip, "shuffle": True}
        both.append(ArrayBatches(images[order], labels[order], spec.mean, spec.std, args.batch,
                                 CPU, seed=seed, **augment))  # fmt: skip
    return both


def epochs(batches, count=None, take=iter):
    """Each of `count` epochs, or of epochs without an end."""
    for epoch in range(count) if count else itertools.count():
        batches.set_epoch(epoch)
        yield take(batches)


def in_steps(epochs, steps, size):
    """The first `steps` batches, by `size`."""
    stream = itertools.chain.from_iterable(epochs)
    return (itertools.islice(stream, min(size, steps - i)) for i in range(0, steps, size))


def train(net, optimizer, chunks, loss):
    """Train on each of `chunks`, iterables of batches. Yields (its mean loss, the seconds of
    training so far: of the wall, and of this process's CPU time)."""
    clocks = {"seconds": time.perf_counter, "CPU_seconds": time.process_time}
    seconds = dict.fromkeys(clocks, 0.0)
    for chunk in chunks:
        begun = {key: clock() for key, clock in clocks.items()}
        mean = train_epoch(net, chunk, loss, optimizer).read()["loss"]
        seconds = {key: seconds[key] + clock() - begun[key] for key, clock in clocks.items()}
        yield mean, seconds


def score(net, batches, loss):
    """(loss, accuracy in %) of the network on all of `batches`."""
    result = evaluate(net, batches, loss).read()
    return result["loss"], 100 * result["acc"]


class Characters:
    """Batches of (characters (B, T), the following ones (B, T)): `steps` at random places of a
    text, or, if it is None, all of the text."""

    def __init__(self, text, args, steps=None, seed=0, batch=None):
        self.text, self.context, self.steps, self.seed = text, args.context, steps, seed
        self.batch_size = batch or args.batch

    def set_epoch(self, epoch):
        """There is one."""

    def __iter__(self):
        last, rng = len(self.text) - self.context, np.random.default_rng(self.seed)
        for _ in range(self.steps or 0):
            yield self._batch(rng.integers(0, last, self.batch_size))
        places = [] if self.steps else range(0, last, self.context)
        for i in range(0, len(places), 128):
            yield self._batch(places[i : i + 128])

    def _batch(self, places):
        windows = torch.stack([self.text[i : i + self.context + 1] for i in places])
        return windows[:, :-1], windows[:, 1:]


def of_text(args, net, steps, seed, batch=None, held=None):
    """The work of a network, net(letters), that reads Shakespeare; it is tested on the first `held`
    characters of the last tenth."""
    data = load("shakespeare", None, 1, 1, CPU, context=args.context)
    text, rest = (torch.from_numpy(x.tokens.ids.astype(np.int64)) for x in data[:2])
    stream = Characters(text, args, steps, seed, batch)
    tests = Characters(rest[:held], args, batch=batch)
    return net(data.classes), stream, tests, xent, steps


def stock_gpt2(args, letters):
    """transformers' GPT-2 with a tied head, without dropout: characters to logits (B, T, V)."""
    import transformers

    class Logits(transformers.GPT2LMHeadModel):
        def forward(self, x):
            return super().forward(input_ids=x).logits

    config = {"vocab_size": letters, "n_positions": args.context, "n_embd": args.width,
              "n_layer": args.layers, "n_head": args.heads, "resid_pdrop": 0, "embd_pdrop": 0,
              "attn_pdrop": 0, "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    return Logits(transformers.GPT2Config(**config))


def adamw(rate, args, net, steps):
    """AdamW with a warm-up, a cosine to 0 at `steps` and, if `clip`, clipped gradients."""
    optimizer = torch.optim.AdamW(net.parameters(), rate, betas=args.betas,
                                  weight_decay=args.weight_decay)  # fmt: skip

    def clip(*_):
        nn.utils.clip_grad_norm_(net.parameters(), args.clip)

    if args.clip:
        optimizer.register_step_pre_hook(clip)
    return scheduled(optimizer, steps, args.warm_up)
