"""Tables and figure 9 of what scripts.any_model has measured."""

import json
import os
import statistics


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def read(folder, cases):
    """{case: what its file holds} of the cases that have been run."""
    paths = {case: folder / f"{case}.json" for case in cases}
    return {case: json.loads(path.read_text(encoding="utf-8"))
            for case, path in paths.items() if path.exists()}  # fmt: skip


def report(folder, cases, title="AGD(net) on any network"):
    """Put each case's tables between its marks in README.md, or at its end if it has none."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.exists() else f"# {title}\n"
    for case, found in read(folder, cases).items():
        begin, end = f"<!-- {case} -->", f"<!-- end of {case} -->"
        if begin not in text:
            text += f"\n## {case}\n\n{begin}{end}\n"
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{tables(found)}\n{end}{after}"
    write(path, text)


def tables(found):
    """A case in Markdown: its runs, with the numbers of each seed, its bounds, how it was made."""
    keys = list(dict.fromkeys(key for x in found["rows"] for key in x["numbers"]))
    cells = [["run", *keys]]
    for run in dict.fromkeys(x["run"] for x in found["rows"]):
        seeds = [x["numbers"] for x in found["rows"] if x["run"] == run]
        values = [[f"{x[key]:.4g}" for x in seeds if key in x] for key in keys]
        cells.append([run, *("; ".join(dict.fromkeys(x)) for x in values)])
    lines = grid(cells)
    if found["bounds"]:
        lines += ["", *grid([["bound on", "found", "limit", "verdict"], *map(verdict,
                                                                           found["bounds"])])]
    settings = ", ".join(f"{k} {v}" for k, v in found["settings"].items())
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items())
    machine = found["environment"]
    lines += ["", f"<sub>`{found['command']}`, {found['date']}; {settings}; {versions}; "
              f"{machine['device_name']}, threads: {machine['threads']}.</sub>"]  # fmt: skip
    return "\n".join(lines)


def verdict(bound):
    """The cells of a bound's line."""
    least, limit = bound["least"], bound["limit"]
    by = (bound["found"] - limit) * (1 if least else -1)
    word = "**holds**" if by >= 0 else "**does not hold**"
    return [bound["what"], f"{bound['found']:.4g}", f"{'≥' if least else '≤'} {limit:g}",
            f"{word}, by {abs(by):.2g}"]  # fmt: skip


def grid(cells):
    head, *rest = [f"| {' | '.join(map(str, x))} |" for x in cells]
    return [head, "|" + " --- |" * len(cells[0]), *rest]


def draw(folder, cases):
    """Figure 9: train losses with vectors on and off, and of five families beside Adam."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MultipleLocator

    from scripts import style

    found = read(folder, cases)
    adam = {"color": style.ORANGE, "marker": "o", "markevery": 3, "markersize": 3.2,
            "markerfacecolor": "white"}  # fmt: skip
    with plt.style.context([style.STYLE]):
        figure, axes = plt.subplots(2, 4, figsize=(style.WIDTH, 3.5))
        titles = {"biases": "FCN, biases", "affine": "Conv net, gains and biases"}
        for ax, (case, title) in zip(axes[:, 0], titles.items()):
            for run, look in ("off", {"linestyle": style.DOTTED}), ("on", {}):
                for x in found[case]["rows"]:
                    if x["run"] == f"{case} {run}":
                        ax.plot(range(1, len(x["curve"]) + 1), x["curve"], color=style.BLUE,
                                linewidth=1, label=None if x["seed"] else run, **look)
            ax.set_title(title)
            ax.set_xlabel("epochs")
            ax.xaxis.set_major_locator(MultipleLocator(2))
            ax.set_ylabel("train loss")
            ax.legend()
        rows = found["families"]["rows"]
        names = list(dict.fromkeys(x["run"].rpartition(", ")[0] for x in rows))
        for ax, name in zip(axes[:, 1:].flat, names):
            best = best_adam(rows, name)
            for run, look in ("AGD", {"color": style.BLACK}), (best, adam):
                for x in rows:
                    if x["run"] == f"{name}, {run}":
                        steps = [10 * (i + 1) for i in range(len(x["curve"]))]
                        ax.plot(steps, x["curve"], **look)
            ax.set_title(name)
            ax.set_xlabel("steps")
            ax.text(0.04, 0.05, best, transform=ax.transAxes, fontsize=7)
            ax.set_xlim(0)
        losses = [y for x in rows for y in x["curve"] if x["run"].endswith("AGD")]
        for ax in axes[:, 1:].flat:
            ax.set_ylim(min(losses) - 0.4, max(losses) + 0.05)
        key = axes[1, 3]
        key.set_axis_off()
        key.legend(handles=[style.optimizer_key("AGD"), style.optimizer_key(
            "Adam", "Adam, best of 3 rates")], loc="center")  # fmt: skip
        figure.savefig(folder / "fig9.png")
    plt.close(figure)


def best_adam(rows, name):
    """The rate of Adam that is best for a network, by the last train loss."""
    losses = {}
    for x in rows:
        if x["run"].startswith(f"{name}, Adam"):
            losses.setdefault(x["run"], []).append(x["numbers"]["train loss"])
    return min(losses, key=lambda run: statistics.fmean(losses[run])).rpartition(", ")[2]
