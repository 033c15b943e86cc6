"""The plan of docs/scaling.md as tables: what follows from scripts/costs.py for the flags given."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from scripts import costs, links
from scripts.costs import IMAGES, INPUTS, LARGEST, LINKS, Cluster, Work, buckets, known, step

GPUS = [2**k for k in range(11)]
VERSION = torch.__version__.split("+")[0]  # the number of kernels is this version's


class Plan:
    """The networks' work at each rate, the links, and what was measured, as the flags say."""

    def __init__(self, args):
        self.args = args
        self.net = costs.network(args.arch, args.image_size)
        found = read(args.source) if args.source else {}
        self.node = {"gpus_per_node": args.gpus_per_node, "node_link": args.node_link}
        if found.get("ranks", 1) > 1:
            c = links.cluster(found)
            # Of its latency NCCL's base is a part; what is left counts as one step's.
            self.node |= {"node_link": c.node_link, "latency_base": c.latency_base,
                          "latency_node": 0.0, "gpus_per_node": found["ranks"]}  # fmt: skip
        rates = LINKS
        if args.inter_link:
            rates = {f"{x:g} GB/s": x for x in args.inter_link}
        share = known("inter_share")
        self.links = {k: Cluster(share * x, **self.node) for k, x in rates.items()}
        self.main = next((k for k in self.links if k == "8 × HDR 200"), next(iter(self.links)))
        checks = read(Path(args.results, "benchmark", "gpu_checks.json"))
        rates = checks.get("rates", {}).get("found", {})
        measured = found.get("rates") or rates.get("images per second")
        if args.images_per_second:
            self.works = {"as given": Work.at(self.net, args.images_per_second, args.rate_batch)}
        elif measured and len(measured) > 1:
            name = (found.get("environment") or rates)["device_name"]
            rates = {int(k): v for k, v in measured.items()}
            self.works = {f"measured, {name}": Work.fitted(self.net, rates)}
        else:
            self.works = {k: Work.at(self.net, known(f"rate, {k}"), known("rate_batch"))
                          for k in ("TF32", "mixed")}  # fmt: skip
        data = read(Path(args.results, "benchmark", "data.json"))
        self.decode = data.get("images_per_second_per_core")

    def weak(self, work, cluster, n, batch):
        """(Step, images/s, efficiency) with `batch` images a GPU, beside one GPU with as many."""
        micro = -(-batch // LARGEST)
        one, many = (step(work, cluster, k, batch, micro) for k in (1, n))
        return many, n * batch / many.total, one.total / many.total

    def strong(self, work, cluster, n, batch):
        """The same with `batch` images in all, beside one GPU that does them in micro-batches."""
        one = step(work, cluster, 1, batch, -(-batch // LARGEST))
        many = step(work, cluster, n, batch / n, max(1, -(-batch // (LARGEST * n))))
        return many, batch / many.total, one.total / (n * many.total)


def read(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{path} is no JSON, {error}") from error


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def number(x):
    """Three figures, with commas."""
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def inputs(plan):
    rows = [(k, f"{v:,.6g}" if v >= 1e-3 else f"{v:.2g}", unit, source)
            for k, (v, unit, source) in INPUTS.items()
            if k != "decode" or not plan.decode]  # fmt: skip
    if plan.decode:
        rows.append(("decode", number(plan.decode), "images/s a core",
                     "measured: results/benchmark/data.json"))  # fmt: skip
    rows += [(k, f"{v:g}", "GB/s a node", "line rate: Gb/s by eight, times the adapters")
             for k, v in LINKS.items()]  # fmt: skip
    return table(("input", "value", "unit", "source"), rows)


def counted(plan):
    net, flops = plan.net, sum(plan.net.flops)
    first = next(iter(plan.works.values()))
    sizes = ", ".join(f"{size / 1e6:.1f} MB at {100 * ready:.0f} %" for size, ready in buckets(net))
    rows = [
        ("weights", f"{sum(net.sizes) // 4:,} in {len(net.sizes)} tensors"),
        ("gradient", f"{sum(net.sizes) / 1e6:.1f} MB in float32"),
        # The first layer's input needs no gradient.
        ("FLOPs an image (a multiply-add is two)", f"{flops / 1e9:.2f} G forward, "
         f"{(3 * flops - net.flops[0]) / 1e9:.2f} G with the backward pass"),
        ("buckets, and how much of the backward pass has filled each", sizes),
        (f"kernels a step, torch {VERSION}", f"{net.launches}; t0 = {1e3 * first.t0:.1f} ms"),
        ("AGD's step", f"reads and writes {net.traffic / 1e9:.2f} GB, "
         f"{net.traffic / sum(net.sizes):.0f} times the gradient: "
         f"{1e3 * net.traffic / known('memory') / 1e9:.2f} ms"),
    ]  # fmt: skip
    return table(("counted from the code", ""), rows)


def reductions(plan):
    def cell(cluster, n):
        ring, two = (sum(f(size, n) for size, _ in buckets(plan.net))
                     for f in (cluster.ring, cluster.hierarchical))  # fmt: skip
        return f"{number(1e3 * ring)} / {number(1e3 * two)}"

    rows = [(n, *(cell(c, n) for c in plan.links.values())) for n in GPUS[1:]]
    return table(("GPUs", *plan.links), rows)


def steps(plan, kind, batch):
    work, cluster = next(iter(plan.works.values())), plan.links[plan.main]
    rows = []
    for n in GPUS if kind == "weak" else [n for n in GPUS if n <= batch]:
        s, images, efficiency = getattr(plan, kind)(work, cluster, n, batch)
        whole = n * batch if kind == "weak" else batch
        times = [number(1e3 * x) for x in (s.compute, s.communication, s.exposed, s.total)]
        node = images * min(1, cluster.gpus_per_node / n)
        rows.append((n, f"{whole / n:,.0f}", f"{whole:,}", *times, number(images),
                     f"{efficiency:.2f}", number(IMAGES / images / 60), number(node)))  # fmt: skip
    head = ("GPUs", "images a GPU", "batch", "compute, ms", "all-reduce, ms", "of which shows, ms",
            "step, ms", "images/s", "efficiency", "minutes an epoch", "images/s a node")
    return table(head, rows)


def cases(plan):
    return [("weak", b) for b in plan.args.batch_per_gpu] + [("strong", b) for b in plan.args.batch]


def reach(plan, kind, work, cluster, batch, least):
    """The most GPUs, by powers of two, up to which the efficiency is at least `least`."""
    most = 0
    for n in GPUS if kind == "weak" else [n for n in GPUS if n <= batch]:
        if getattr(plan, kind)(work, cluster, n, batch)[2] < least:
            break
        most = n
    return most


def limits(plan):
    rows = []
    for name, work in plan.works.items():
        for link, cluster in plan.links.items():
            found = [[reach(plan, kind, work, cluster, batch, least) for least in (0.8, 0.5)]
                     for kind, batch in cases(plan)]  # fmt: skip
            rows.append((name, link, *(f"{a:,} / {b:,}" for a, b in found)))
    words = [f"{b:,} a GPU" if kind == "weak" else f"{b:,} in all" for kind, b in cases(plan)]
    return table(("rate", "link of a node", *words), rows)


def batches(plan):
    """The least batch a GPU with 0.8 of the images a second of one GPU at its largest batch."""

    def least(work, cluster, n):
        goal = 0.8 * LARGEST / step(work, cluster, 1, LARGEST).total
        for b in range(1, 2 * LARGEST + 1):
            if b / step(work, cluster, n, b, -(-b // LARGEST)).total >= goal:
                return f"{b} ({n * b:,})"
        return f"over {2 * LARGEST}"

    rows = [
        (name, link, *(least(work, cluster, n) for n in (1, 8, 64, 1024)))
        for name, work in plan.works.items()
        for link, cluster in plan.links.items()
    ]
    return table(("rate", "link of a node", "1 GPU", "8", "64", "1,024"), rows)


def launches(plan):
    """The same limits where a launch takes another time, on the main link."""
    rows, cluster = [], plan.links[plan.main]
    for name, work in plan.works.items():
        whole = work.t0 + LARGEST / work.rate  # the time of the rate that is known stays
        for launch in (0.0, 5e-6, 20e-6, 46e-6):
            t0 = plan.net.launches * launch
            other = replace(work, t0=t0, rate=LARGEST / (whole - t0))
            found = [[reach(plan, "strong", other, cluster, batch, least) for least in (0.8, 0.5)]
                     for batch in plan.args.batch]  # fmt: skip
            rows.append((name, f"{1e6 * launch:g}", f"{1e3 * t0:.1f}",
                         *(f"{a:,} / {b:,}" for a, b in found)))  # fmt: skip
    head = ("rate", "a launch, µs", "t0, ms", *(f"{b:,} in all" for b in plan.args.batch))
    return table(head, rows)


def published(plan):
    """The model's eight GPUs beside the published ones of the same table as the rates."""
    rows = []
    for name, work in plan.works.items():
        if f"8 GPUs, {name}" not in INPUTS:
            continue
        _, images, efficiency = plan.weak(work, plan.links[plan.main], 8, known("rate_batch"))
        eight = known(f"8 GPUs, {name}")
        rows.append((name, number(images), f"{efficiency:.3f}", number(eight),
                     f"{eight / 8 / known(f'rate, {name}'):.3f}"))  # fmt: skip
    return table(("rate", "images/s here", "efficiency", "published", "efficiency"), rows)


def overlapping(plan, n=64, batch=32):
    rows = []
    for name, work in plan.works.items():
        for link, cluster in plan.links.items():
            found = []
            for micro, overlap in ((1, False), (1, True), (4, True), (16, True)):
                one, many = (step(work, cluster, k, micro * batch, micro, overlap) for k in (1, n))
                found.append(f"{number(1e3 * many.exposed)} ms, {one.total / many.total:.2f}")
            rows.append((name, link, *found))
    head = ("rate", "link of a node", "not overlapped", "overlapped", "4 micro-batches", "16")
    return table(head, rows)


def data(plan):
    cluster = plan.links[plan.main]
    decode, n = plan.decode or known("decode"), cluster.gpus_per_node
    rows = []
    for name, work in plan.works.items():
        need = n * LARGEST / step(work, cluster, 1, LARGEST).total
        rows.append((name, number(need), number(need / decode),
                     f"{need * known('file') / 1e9:.2f}", f"{need * known('file_256') / 1e9:.2f}"))
    where = "results/benchmark/data.json" if plan.decode else (
        "the first table, since there is no results/benchmark/data.json yet")
    head = ("rate", f"images/s a node of {n}", "cores", "GB/s of original files",
            "GB/s of 256-pixel files")  # fmt: skip
    return table(head, rows) + f"\n\nA core decodes {number(decode)} images/s: {where}."


def tables(plan):
    """All tables, in Markdown."""
    first = next(iter(plan.works))
    parts = [("The inputs", inputs(plan)), ("What is counted", counted(plan)),
             ("The all-reduce of the gradient, ms: ring / hierarchical", reductions(plan))]
    for kind, batch in cases(plan):
        what = f"{batch:,} images a GPU" if kind == "weak" else f"{batch:,} images in all"
        parts.append((f"A step: {what}, {first}, {plan.main}", steps(plan, kind, batch)))
    parts += [("GPUs up to which the efficiency is at least 0.8 / 0.5", limits(plan)),
              (f"The same with other launch times, {plan.main}", launches(plan)),
              ("Least images a GPU (in all) for 0.8 of one GPU's best rate", batches(plan)),
              ("Communication that shows, and efficiency: 64 GPUs, micro-batches of 32",
               overlapping(plan)),
              ("What a node has to read", data(plan))]  # fmt: skip
    if published(plan).count("\n") > 1:
        parts.append(("Eight GPUs in one node beside NVIDIA's, 256 images each", published(plan)))
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts)
