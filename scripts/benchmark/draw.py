"""The tables of docs/performance.md, from the files of the cases."""

import json
from pathlib import Path

from scripts.benchmark.epoch import PERCENT
from scripts.benchmark.step import ADAMW, GRAPH, NETS
from scripts.markdown import renew, table
from scripts.words import data_name

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
MARKS = "<!-- benchmark: python -m scripts.benchmark draw -->", "<!-- end of the benchmark -->"
DEVICES = {"cpu": "", "cuda": "-cuda"}  # type -> the end of its files' names
SHOWN = list(NETS)[:3]
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
    """(what, how much) of the cases but the ratios of a step."""
    step, many, rows = results.get("step", {}), results.get("many", {}), []
    if epoch := results.get("epoch"):
        flags, (start, alone) = epoch["flags"], (
            epoch["seconds"][k][0] for k in ("main.py, to its first step", "import torch"))
        of = f"FCN {flags['depth']}×{flags['width']}, {data_name(flags['dataset'], epoch['data'])}"
        rows = [(WORDS[key].format(of), f"{ratio:.2f}")
                for key, ratio in epoch["ratios"].items() if key in WORDS]  # fmt: skip
        rows.append(("from the command to the end of the first step",
                     f"{start:.1f} s; a process that imports torch and ends: {alone:.1f} s"))
    for ratio in results.get("data", {}).get("ratios", {}).values():
        rows.append(("reading a folder of JPEGs, a core: the conventional pipeline / ours",
                     f"{ratio:.2f}"))  # fmt: skip
    if many.get("ratios"):
        count, times = max(many["ratios"].items(), key=lambda item: item[1])
        rows.append((f"epochs a second of small runs, {count}", f"{times:.2f}"))
    for run, percent in results.get("checkpoint", {}).get(PERCENT, {}).items():
        rows.append((f"checkpoints, of the time of an epoch, {run}", f"{percent:.2f} %"))
    for net in (net for net in SHOWN if net in step.get("memory in bytes", {})):
        held = step["memory in bytes"][net]
        agd, adamw = ((held["scratch"][k] + held["kept"][k]) / 1e6 for k in ("AGD", ADAMW))
        rows.append((f"memory beside weights and gradients, {net}",
                     f"AGD {agd:.1f} MB, fused AdamW {adamw:.1f} MB; the largest weight has "
                     f"{held['largest weight'] / 1e6:.1f} MB"))  # fmt: skip
    return rows


def block(folder):
    """The tables of a folder's files, in Markdown."""
    parts = []
    for device in DEVICES:
        if not (results := read(folder, device)):
            continue
        here = [x["environment"] for x in results.values()]
        names = " and ".join(dict.fromkeys(x["device_name"] for x in here))
        versions = " and ".join(dict.fromkeys(x["torch"].split("+")[0] for x in here))
        parts.append(f"On {names}, torch {versions}.")
        if "step" in results:
            parts += [step_table(results["step"], where) for where in ("", GRAPH)
                      if f"ratios{where}" in results["step"]]  # fmt: skip
        parts.append(table(["", ""], numbers(results)))
    return "\n\n".join(parts)


def write(folder):
    """Print the tables of a folder and, where it is the results' own, renew the page's."""
    print(text := block(folder) or f"There are no files of a benchmark in {folder}")
    if Path(folder).resolve() == PAGE.parents[1] / "results" / "benchmark":
        renew(PAGE, *MARKS, text, "\n\n")
