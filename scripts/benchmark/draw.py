"""The benchmark's picture, and the tables of docs/performance.md, from the files of the cases."""

import json
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

from runs.files import write_whole
from scripts.benchmark.epoch import PERCENT
from scripts.benchmark.step import GRAPH, GROWING, NETS, YARDSTICK
from scripts.figures import fingerprint
from scripts.results import data_name
from scripts.style import BLACK, BLUE, GREEN, ORANGE, PINK, SKY, STYLE, WIDTH, legend, log_values

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
START, END = "<!-- benchmark: python -m scripts.benchmark draw -->", "<!-- end of the benchmark -->"
DEVICES = {"cpu": "", "cuda": "-cuda"}  # type -> the end of its files' names
COLOURS = {
    "AGD": BLACK, YARDSTICK: BLUE, "SGD with momentum, fused": SKY, "AdamW, fused": ORANGE,
    "AdamW, foreach": PINK, "Muon": GREEN,
}  # fmt: skip
PEERS, SHOWN = [name for name in COLOURS if name != YARDSTICK], list(NETS)[:3]
WORDS = {  # keys of the epoch's ratios, in the tables
    "ours, training / bare": "an epoch of training, {} / its bare passes",
    "ours / bare": "the same with its test / the bare passes",
    "conventional / ours": "the conventional pipeline / an epoch with its test",
}


def file_name(case, device):
    """The file of a case on a type of device. The processor reads the data on any."""
    return f"{case}{'' if case == 'data' else DEVICES.get(device, f'-{device}')}.json"


def read(folder, device):
    """{case: its result} of the files in a folder."""
    cases = ["step", "epoch", "many", "checkpoint", *["data"] * (device == "cpu")]
    paths = {case: Path(folder, file_name(case, device)) for case in cases}
    return {case: json.loads(path.read_text(encoding="utf-8"))
            for case, path in paths.items() if path.exists()}  # fmt: skip


def draw(results):
    """A figure of {case: result}."""
    with plt.style.context([STYLE]):
        figure, axes = plt.subplots(2, 3, figsize=(WIDTH, 4.5))
        for ax in axes.flat:
            ax.set_axis_off()
        if "step" in results:
            steps(axes[0, 0], results["step"])
        if growth := results.get("step", {}).get("growth"):
            for name in GROWING:
                lines(axes[0, 1], growth["weights"], growth["seconds"][name], 1e3, COLOURS[name])
            axes[0, 1].set(xscale="log", yscale="log", xlabel="weights",
                           title="Milliseconds of a step")  # fmt: skip
        if rates := results.get("many", {}).get("epochs a second"):
            counts = sorted(map(int, rates))
            lines(axes[0, 2], counts, [rates[str(k)] for k in counts], 1, BLACK)
            powers(axes[0, 2], counts)
            axes[0, 2].set(ylim=(0, None), xlabel="runs at once", title="Epochs a second, all runs")
        if "epoch" in results:
            for ax, key in zip(axes[1], ("width", "depth", "batch_size")):
                sizes(ax, results["epoch"]["growth"], key)
            axes[1, 0].legend()
        legend(figure, [plt.Line2D([], [], color=COLOURS[name], linewidth=4, label=name)
                        for name in (*PEERS[:1], YARDSTICK, *PEERS[1:])], ncols=3)  # fmt: skip
    return figure


def steps(ax, result):
    """Bars of the peers for each network, with their quartiles."""
    where = GRAPH if f"ratios{GRAPH}" in result else ""
    ratios, quartiles = result[f"ratios{where}"], result[f"quartiles{where}"]
    nets = [name for name in SHOWN if name in ratios]
    for i, name in enumerate(PEERS):
        here = [net for net in nets if name in ratios[net]]
        if here:
            at = np.array([nets.index(net) for net in here]) + (i - (len(PEERS) - 1) / 2) * 0.16
            y = np.array([ratios[net][name] for net in here])
            ends = np.array([quartiles[net][name] for net in here]).T
            ax.bar(at, y - 1, 0.15, bottom=1, color=COLOURS[name])
            # The median of a ratio lies within its quartiles up to the rounding of a file.
            ax.errorbar(at, y, np.maximum(abs(ends - y), 0), fmt="none", ecolor="#888888",
                        elinewidth=0.8)  # fmt: skip
    ax.set_axis_on()
    ax.axhline(1, color=COLOURS[YARDSTICK])
    log_values(ax)
    ax.set_ylim(bottom=ax.get_ylim()[0] / 1.2)
    ax.yaxis.set_major_formatter("{x:g}")
    ax.set_xticks(range(len(nets)), [net.split(",")[0] for net in nets])
    ax.grid(False, axis="x")
    ax.set_title("Time of a step / fused SGD's")


def sizes(ax, growth, key):
    for name, colour, label, style in (("ours", BLACK, "training", "-"),
                                       ("bare", "#555555", "bare passes", (0, (4, 1.8)))):
        lines(ax, growth[key]["values"], growth[key][name], 1, colour, linestyle=style, label=label)
    powers(ax, growth[key]["values"])
    log_values(ax)
    low, high = ax.get_ylim()
    if high / low >= 30:  # where log_values has left matplotlib's own
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel={"batch_size": "batch"}.get(key, key),
           title=f"Seconds of {growth['images']:,} images")  # fmt: skip


def lines(ax, x, spreads, scale, colour, **style):
    """Medians within their quartiles, of [median, lower, upper]."""
    median, lower, upper = scale * np.array(spreads).T
    ax.fill_between(x, lower, upper, color=colour, alpha=0.2, linewidth=0)
    ax.plot(x, median, color=colour, marker="o", markersize=2.5, **style)
    ax.set_axis_on()


def powers(ax, x):
    """A log axis with these values, as many as there is room for."""
    shown = x[:: 1 if len(x) < 7 else 2]
    ax.set_xscale("log", base=2)
    ax.set_xticks(shown, [str(value) for value in shown])
    ax.xaxis.set_minor_locator(NullLocator())


def table(head, rows):
    return "\n".join(f"| {' | '.join(x)} |" for x in (head, ["---"] * len(head), *rows))


def step_table(result, where=""):
    """Ratios to fused SGD: of contiguous weights, and after a slash of channels_last ones."""
    ratios = result[f"ratios{where}"]
    nets = [net for net in SHOWN if net in ratios]

    def cell(net, peer):
        forms = (ratios.get(f"{net}{form}", {}) for form in ("", ", channels_last"))
        return " / ".join(f"{form[peer]:.2f}" for form in forms if peer in form) or "–"

    peers = dict.fromkeys(peer for net in nets for peer in ratios[net])
    return table([f"a step / one of fused SGD{where}", *nets],
                 [[peer, *(cell(net, peer) for net in nets)] for peer in peers])  # fmt: skip


def numbers(results):
    """(what, how much) of the other cases."""
    epoch, data, many = (results.get(case, {}) for case in ("epoch", "data", "many"))
    rows, ratios, seconds = [], epoch.get("ratios", {}), epoch.get("seconds", {})
    if epoch:
        flags = epoch["flags"]
        of = f"FCN {flags['depth']}×{flags['width']}, {data_name(flags['dataset'], epoch['data'])}"
        rows += [(text.format(of), f"{ratios[key]:.2f}") for key, text in WORDS.items()]
    for ratio in data.get("ratios", {}).values():
        rows.append(("reading a folder of JPEGs, a core: the conventional pipeline / ours",
                     f"{ratio:.2f}"))  # fmt: skip
    if seconds:
        start, alone = (seconds[k][0] for k in ("main.py, to its first step", "import torch"))
        rows.append(("from the command to the end of the first step",
                     f"{start:.1f} s; a process that imports torch and ends: {alone:.1f} s"))
    if many.get("ratios"):
        count, times = max(many["ratios"].items(), key=lambda item: item[1])
        rows.append((f"epochs a second of small runs, {count}", f"{times:.2f}"))
    for run, percent in results.get("checkpoint", {}).get(PERCENT, {}).items():
        rows.append((f"checkpoints, of the time of an epoch, {run}", f"{percent:.2f} %"))
    for net, held in results.get("step", {}).get("memory in bytes", {}).items():
        if net in SHOWN:
            agd, adamw = ((held["scratch"][k] + held["kept"][k]) / 1e6 for k in GROWING[::2])
            rows.append((f"memory beside weights and gradients, {net}",
                         f"AGD {agd:.1f} MB, fused AdamW {adamw:.1f} MB; the largest weight has "
                         f"{held['largest weight'] / 1e6:.1f} MB"))  # fmt: skip
    return rows


def block(folder):
    """The tables and the picture of docs/performance.md, in Markdown."""
    parts = []
    for device, suffix in DEVICES.items():
        if not (results := read(folder, device)):
            continue
        here = [x["environment"] for x in results.values()]
        names = " and ".join(dict.fromkeys(x["device_name"] for x in here))
        versions = " and ".join(dict.fromkeys(x["torch"].split("+")[0] for x in here))
        parts.append(f"On {names}, torch {versions}.")
        if "step" in results:
            parts.append("![Times of a step and of an epoch, beside their peers, against sizes]"
                         f"(../results/benchmark/benchmark{suffix}.png)")  # fmt: skip
            parts += [step_table(results["step"], where) for where in ("", GRAPH)
                      if f"ratios{where}" in results["step"]]  # fmt: skip
        parts.append(table(["", ""], numbers(results)))
    return "\n\n".join(parts)


def write(folder, page=PAGE):
    """Renew the pictures and, where `folder` is the results' own, the page's block; returns the
    paths."""
    paths = []
    for device, suffix in DEVICES.items():
        if "step" in (results := read(folder, device)):
            figure = draw(results)
            paths.append(Path(folder, f"benchmark{suffix}.png"))
            with plt.style.context([STYLE]):
                figure.savefig(paths[-1], metadata={"Source": fingerprint(figure)})
            plt.close(figure)
    if Path(folder).resolve() == page.parents[1] / "results" / "benchmark":
        before, rest = page.read_text(encoding="utf-8").split(START)
        write_whole(page, f"{before}{START}\n\n{block(folder)}\n\n{END}{rest.split(END)[1]}")
        paths.append(page)
    return paths
