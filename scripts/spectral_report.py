"""Bounds and the figure of what scripts.spectral has measured."""

from typing import NamedTuple

from scripts import any_model_report


class Limit(NamedTuple):
    """That a number of a run is at most, or at least, `limit`; or its difference from `than`'s."""

    run: str
    key: str
    limit: float
    least: bool = False
    than: str | None = None


def judged(rows, limits):
    """The bounds of the runs that are there, at the worst seed; against the best one of `than`."""
    values, bounds = {}, []
    for x in rows:
        for key, number in x["numbers"].items():
            values.setdefault((x["run"], key), []).append(number)
    for run, key, limit, least, than in limits:
        worst, best = (min, max) if least else (max, min)
        if (run, key) not in values or (than and (than, key) not in values):
            continue
        found, what = worst(values[run, key]), f"{run}: {key}"
        if than:
            found, what = found - best(values[than, key]), f"{what}, minus that of {than}"
        bounds.append({"what": what, "found": found, "limit": limit, "least": least})
    return bounds


PANELS = (  # case, x, y, title
    ("fcn", "epochs", "test accuracy", "FCN"), ("fcn", "CPU seconds", "test accuracy", "FCN"),
    ("gpt", "steps", "validation loss", "GPT"), ("gpt", "steps", "free", "GPT, free weights"),
)  # fmt: skip
FREE = ("largest gain", "output layer / s")


def draw(folder, cases):
    """The figure: both rules over epochs, steps and seconds, and the norms of free weights."""
    import matplotlib.pyplot as plt

    from scripts import style

    found = any_model_report.read(folder, cases)
    with plt.style.context([style.STYLE]):
        figure, axes = plt.subplots(2, 2, figsize=(style.WIDTH, 4.4))
        for ax, (case, x, y, title) in zip(axes.flat, PANELS):
            lines = {}
            for row in found[case]["rows"]:
                ours, history = row["run"].startswith("SpectralAGD"), row.get("history")
                if not history or (y == "free" and not ours):
                    continue
                look = {"color": style.RED if ours else style.ORANGE,
                         "linewidth": 1.2 if ours else 0.8}  # fmt: skip
                name = "SpectralAGD" if ours else "AdamW, each rate and horizon"
                for key in FREE if y == "free" else (y,):
                    dots = {"linestyle": style.DOTTED} if key == FREE[1] else {}
                    (lines[key if y == "free" else name],) = ax.plot(
                        history[x], history[key], **look, **dots)  # fmt: skip
            ax.set(title=title, xlabel=x, ylabel="norm" if y == "free" else y, xlim=0)
            ax.legend(lines.values(), lines)
        values = [y for row in found["gpt"]["rows"] if "history" in row
                  for y in row["history"]["validation loss"]]  # fmt: skip
        axes[1, 0].set_ylim(min(values) - 0.05, min(min(values) + 0.8, max(values) + 0.05))
        figure.savefig(folder / "spectral.png")
    plt.close(figure)
