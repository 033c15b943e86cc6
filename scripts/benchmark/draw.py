"""The benchmark's picture, and its tables in README, from what the cases wrote."""

import json
import os
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from scripts.benchmark.checkpoint import PERCENT
from scripts.benchmark.step import GRAPH, GROWING, NETS, YARDSTICK
from scripts.figures import fingerprint
from scripts.results import data_name
from scripts.style import (
    BLACK,
    BLUE,
    GREEN,
    ORANGE,
    PINK,
    SKY,
    STYLE,
    WIDTH,
    legend,
    log_values,
)

README = Path(__file__).resolve().parents[2] / "README.md"
START, END = "<!-- benchmark: python -m scripts.benchmark draw -->", "<!-- end of the benchmark -->"
DEVICES = {"cpu": "", "cuda": "-cuda"}  # type -> what its files' names end in
COLOURS = {
    "AGD": BLACK, "SGD, fused": BLUE, "SGD with momentum, fused": SKY, "AdamW, fused": ORANGE,
    "AdamW, foreach": PINK, "Muon": GREEN,
}  # fmt: skip
SHOWN = list(NETS)[:3]
GREY = "#555555"


def file_name(case, device):
    """Of what a case found on a type of device. The data are read by the processor."""
    return f"{case}{'' if case == 'data' else DEVICES.get(device, f'-{device}')}.json"


def read(folder, device):
    """{case: what it found} of those that are there."""
    cases = "step", "epoch", "many", "checkpoint"
    paths = {case: Path(folder, file_name(case, device)) for case in cases}
    if device == "cpu":
        paths["data"] = Path(folder, file_name("data", device))
    return {case: json.loads(path.read_text(encoding="utf-8"))
            for case, path in paths.items() if path.exists()}  # fmt: skip


def draw(found):
    """A figure of the cases `found`, a panel each, and those of their growth."""
    where = GRAPH if f"ratios{GRAPH}" in found.get("step", {}) else ""
    with plt.style.context([STYLE]):
        figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 4.5))
        for ax, case, panel in (
            (axes[0, 0], "step", lambda ax, x: steps(ax, x, where)),
            (axes[0, 1], "step", lambda ax, x: weights(ax, x.get("growth"))),
            (axes[0, 2], "many", runs),
            (axes[1, 0], "epoch", lambda ax, x: sizes(ax, x["growth"], "width")),
            (axes[1, 1], "epoch", lambda ax, x: sizes(ax, x["growth"], "depth")),
            (axes[1, 2], "epoch", lambda ax, x: sizes(ax, x["growth"], "batch_size")),
        ):
            if case in found:
                panel(ax, found[case])
            else:
                ax.set_axis_off()
        if "epoch" in found:
            axes[1, 0].legend()
        peers = [name for name in COLOURS if name != YARDSTICK]
        keys = [plt.Line2D([], [], color=COLOURS[name], linewidth=4, label=name)
                for name in (*peers[:1], YARDSTICK, *peers[1:])]  # fmt: skip
        legend(figure, keys, ncols=3)
    return figure


def steps(ax, found, where):
    """Bars of the peers for each network, with their quartiles."""
    peers = [name for name in COLOURS if name != YARDSTICK]
    ratios, spread = found[f"ratios{where}"], found[f"quartiles{where}"]
    nets = [name for name in SHOWN if name in ratios]
    for i, name in enumerate(peers):
        there = [(x, net) for x, net in enumerate(nets) if name in ratios[net]]
        if not there:
            continue
        at = np.array([x for x, _ in there]) + (i - (len(peers) - 1) / 2) * 0.16
        y = np.array([ratios[net][name] for _, net in there])
        ends = np.array([spread[net][name] for _, net in there]).T
        ax.bar(at, y - 1, 0.15, bottom=1, color=COLOURS[name])
        # The median of a ratio lies within its quartiles up to the rounding of a file.
        around = np.maximum(abs(ends - y), 0)
        ax.errorbar(at, y, around, fmt="none", ecolor="#888888", elinewidth=0.8)
    ax.axhline(1, color=COLOURS[YARDSTICK])
    log_values(ax)
    ax.set_ylim(bottom=ax.get_ylim()[0] / 1.2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(range(len(nets)), [net.split(",")[0] for net in nets])
    ax.grid(False, axis="x")
    ax.set_title("Time of a step / fused SGD's")


def weights(ax, growth):
    if growth is None:
        return ax.set_axis_off()
    for name in GROWING:
        lines(ax, growth["weights"], growth["seconds"][name], 1e3, COLOURS[name])
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("weights")
    ax.set_title("Milliseconds of a step")


def runs(ax, found):
    spread = found["epochs a second"]
    counts = sorted(map(int, spread))
    lines(ax, counts, [spread[str(k)] for k in counts], 1, BLACK)
    powers(ax, counts)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("runs at once")
    ax.set_title("Epochs a second, all runs")


def sizes(ax, growth, key):
    for name, colour, label in (("ours", BLACK, "training"), ("bare", GREY, "bare passes")):
        style = "-" if name == "ours" else (0, (4, 1.8))
        lines(ax, growth[key]["values"], growth[key][name], 1, colour, linestyle=style, label=label)
    powers(ax, growth[key]["values"])
    log_values(ax)
    low, high = ax.get_ylim()
    if high / low >= 30:  # where log_values has left what matplotlib makes of it
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel({"batch_size": "batch"}.get(key, key))
    ax.set_title(f"Seconds of {growth['images']:,} images")


def lines(ax, x, told, scale, colour, **style):
    """Medians within their quartiles, of [median, lower, upper]."""
    median, lower, upper = scale * np.array(told).T
    ax.fill_between(x, lower, upper, color=colour, alpha=0.2, linewidth=0)
    ax.plot(x, median, color=colour, marker="o", markersize=2.5, **style)


def powers(ax, x):
    """A log axis with these values, as many as there is room for."""
    shown = x[:: 1 if len(x) < 7 else 2]
    ax.set_xscale("log", base=2)
    ax.set_xticks(shown, [str(value) for value in shown])
    ax.xaxis.set_minor_locator(NullLocator())


def row(*cells):
    return f"| {' | '.join(cells)} |"


def table(head, rows):
    return "\n".join([row(*head), row(*["---"] * len(head)), *(row(*cells) for cells in rows)])


def step_table(found, where=""):
    """Ratios to fused SGD, contiguous weights and where there are others channels_last ones."""
    ratios = found[f"ratios{where}"]
    nets = [net for net in SHOWN if net in ratios]

    def cell(net, peer):
        forms = (ratios.get(f"{net}{form}", {}) for form in ("", ", channels_last"))
        return " / ".join(f"{form[peer]:.2f}" for form in forms if peer in form) or "–"

    peers = dict.fromkeys(peer for net in nets for peer in ratios[net])
    head = [f"a step / one of fused SGD{where}", *nets]
    return table(head, [[peer, *(cell(net, peer) for net in nets)] for peer in peers])


def figures(found):
    """What the other cases found: (what, how much)."""
    epoch, data, many = (found.get(case, {}) for case in ("epoch", "data", "many"))
    rows = []
    if epoch:
        flags = epoch["flags"]
        of = f"FCN {flags['depth']}×{flags['width']}, {data_name(flags['dataset'], epoch['data'])}"
        words = {
            "ours, training / bare": f"an epoch of training, {of} / its bare passes",
            "ours / bare": "the same with its test / the bare passes",
            "conventional / ours": "the conventional pipeline / an epoch with its test",
        }
        rows += [(text, f"{epoch['ratios'][key]:.2f}") for key, text in words.items()]
    if "conventional / ours" in data.get("ratios", {}):
        rows.append(("reading a folder of JPEGs, a core: the conventional pipeline / ours",
                     f"{data['ratios']['conventional / ours']:.2f}"))  # fmt: skip
    start = epoch.get("seconds", {}).get("main.py, to its first step")
    if start:
        torch_alone = epoch["seconds"]["import torch"][0]
        told = f"{start[0]:.1f} s; a process that imports torch and ends: {torch_alone:.1f} s"
        rows.append(("from the command to the end of the first step", told))
    if many.get("ratios"):
        count, times = max(many["ratios"].items(), key=lambda item: item[1])
        rows.append((f"epochs a second of small runs, {count}",
                     f"{times:.2f}"))  # fmt: skip
    for run, percent in found.get("checkpoint", {}).get(PERCENT, {}).items():
        rows.append((f"checkpoints, of the time of an epoch, {run}", f"{percent:.2f} %"))
    for net, told in found.get("step", {}).get("memory in bytes", {}).items():
        if net in SHOWN:
            agd, adamw = (told["scratch"][k] + told["kept"][k] for k in ("AGD", "AdamW, fused"))
            rows.append((f"memory beside weights and gradients, {net}",
                         f"AGD {agd / 1e6:.1f} MB, fused AdamW {adamw / 1e6:.1f} MB; "
                         f"the largest weight has {told['largest weight'] / 1e6:.1f} MB"))
    return rows


def block(folder):
    """What README says of speed."""
    parts = []
    for device, suffix in DEVICES.items():
        found = read(folder, device)
        if not found:
            continue
        names = dict.fromkeys(x["environment"]["device_name"] for x in found.values())
        versions = dict.fromkeys(x["environment"]["torch"].split("+")[0] for x in found.values())
        parts.append(f"On {' and '.join(names)}, torch {' and '.join(versions)}, medians of peers "
                     "that take\nturns: `python -m scripts.benchmark all`. Bare passes are forward "
                     "and backward alone, on batches\nthat lie ready; the conventional pipeline is "
                     "a DataLoader of PIL images.")  # fmt: skip
        if "step" in found:
            parts.append(f"![Times of a step and of an epoch, beside their peers, against sizes]"
                         f"(results/benchmark/benchmark{suffix}.png)")  # fmt: skip
            parts.append("Of two numbers the second is that of weights in channels_last.")
            parts.append(step_table(found["step"]))
            if f"ratios{GRAPH}" in found["step"]:
                parts.append(step_table(found["step"], GRAPH))
        parts.append(table(["", ""], figures(found)))
    return "\n\n".join(parts)


def write(folder, readme=README):
    """Renew the pictures, and README's block if `folder` is where README's numbers are from;
    returns the paths."""
    paths = []
    for device, suffix in DEVICES.items():
        found = read(folder, device)
        if "step" not in found:
            continue
        figure = draw(found)
        paths.append(Path(folder, f"benchmark{suffix}.png"))
        with plt.style.context([STYLE]):
            figure.savefig(paths[-1], metadata={"Source": fingerprint(figure)})
        plt.close(figure)
    if Path(folder).resolve() == readme.parent / "results" / "benchmark":
        before, rest = readme.read_text(encoding="utf-8").split(START)
        text = f"{before}{START}\n\n{block(folder)}\n\n{END}{rest.split(END)[1]}"
        partial = readme.with_suffix(".partial")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, readme)
        paths.append(readme)
    return paths
