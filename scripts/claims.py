"""The paper's claims, each judged from the runs of the table: holds, does not hold, or not run.

A claim is a function of the Evidence of one scale that returns (whether it holds, the numbers
behind that). What counts as holding stands in its docstring, which is printed with the verdict.
"""

import math

from scripts.experiments import BATCHES, DEPTHS, WIDTHS
from scripts.results import read_measurement

CHANCE = 0.1  # of CIFAR-10, in a guess among ten classes


class Missing(Exception):
    """A run that the claim needs is not there."""


class Evidence:
    """The runs of one scale, and a note of those that a claim rests on."""

    def __init__(self, results):
        self.results, self.scale, self.used = results, results.scale, []

    def grid(self, figure, panel, curve):
        """All runs of a grid, or all seeds of a run."""
        found = self.results.of(figure, panel, curve)
        if not found or len(found) < len(self.results.planned(figure, panel, curve)):
            raise Missing
        self.used += found
        return found

    def one(self, figure, panel, curve):
        """The run of the first seed."""
        return self.grid(figure, panel, curve)[0]

    def tuned(self, figure, panel, curve):
        """The run of a grid that counts as tuned."""
        self.grid(figure, panel, curve)
        best = self.results.tuned(figure, panel, curve)
        if best is None:
            raise Missing
        return best


def points(x):
    return f"{100 * x:.1f} %"


def deep(runs):
    """AGD trains the 32-layer FCN where Adam's and SGD's defaults stay at 10 %.

    Holds if AGD's last train accuracy is over 20 % and those of Adam at 0.001 and SGD at 0.1 are
    under 15 % in every epoch.
    """
    agd = runs.one("fig1", "deep", "AGD").last["train_acc"]
    best = {x: max(runs.one("fig1", "deep", x).column("train_acc")) for x in ("Adam", "SGD")}
    said = ", ".join(f"{name} {points(x)} at best" for name, x in best.items())
    return agd > 2 * CHANCE and max(best.values()) < 1.5 * CHANCE, f"AGD {points(agd)}, {said}"


def best_rates(runs):
    """Adam's best rate is about three decades below SGD's.

    Holds if, on the grid of tens, three steps lie between the rates with the least final train
    loss; where figure 1 has the same network on the wider grid, there too.
    """
    holds, said = True, []
    places = [("fig5", "fcn")]
    network = [row.flags[:6] for row in runs.results.table if row.figure in ("fig1", "fig5")
               and row.panel in ("fcn", "rates")]  # fmt: skip
    if len(set(network)) == 1:
        places.append(("fig1", "rates"))
    for figure, panel in places:
        rate = {x: runs.tuned(figure, panel, x).experiment.flag("--lr") for x in ("Adam", "SGD")}
        rates = [row.flag("--lr") for row in runs.results.planned(figure, panel, "SGD")]
        decades = math.log10(float(rate["SGD"]) / float(rate["Adam"]))
        holds = holds and round(decades) == 3
        said.append(f"Adam {rate['Adam']}, SGD {rate['SGD']} on {rates[0]} to {rates[-1]}")
    return holds, "; ".join(said)


def smaller_objective(runs):
    """AGD and tuned Adam attain a smaller training objective than tuned SGD.

    Holds if both last train losses are below tuned SGD's.
    """
    loss = {name: runs.tuned("fig5", "fcn", name).loss for name in ("Adam", "SGD")}
    loss["AGD"] = runs.one("fig5", "fcn", "AGD").loss
    said = ", ".join(f"{name} {loss[name]:.4f}" for name in ("AGD", "Adam", "SGD"))
    return max(loss["AGD"], loss["Adam"]) < loss["SGD"], said


def comparable(runs):
    """On ResNet-18, AGD's accuracy is comparable to the best of Adam and SGD over their rates.

    Holds if AGD's last test accuracy is within 2.5 points of the best on the grid.
    """
    agd = runs.one("fig1", "rates", "AGD")
    if agd.experiment.flag("--arch") != "resnet18":
        raise Missing
    best = max(x.last["test_acc"] for name in ("Adam", "SGD")
               for x in runs.grid("fig1", "rates", name))  # fmt: skip
    acc = agd.last["test_acc"]
    return acc > best - 0.025, f"AGD {points(acc)}, the best of the grids {points(best)}"


def wider(runs):
    """Wider is better in train loss.

    Holds if at every depth each width's last train loss is below that of the width before.
    """
    widths = WIDTHS[runs.scale]
    pairs, odd = 0, []
    for depth in DEPTHS:
        losses = [
            runs.one("fig6", f"{depth}x{width}", "AGD").loss for width in widths
        ]
        for width, narrow, wide in zip(widths[1:], losses, losses[1:]):
            pairs += 1
            if not wide < narrow:
                odd.append(f"{depth}×{width}")
    said = f"{pairs - len(odd)} of {pairs} steps in width"
    return not odd, said + (f"; not at {', '.join(odd)}" if odd else "")


def depth_32(runs):
    """In train loss, depth 8 and depth 16 are superior to depth 32.

    Holds if both are below it at every width.
    """
    odd, count = [], 0
    for width in WIDTHS[runs.scale]:
        loss = {
            depth: runs.one("fig6", f"{depth}x{width}", "AGD").loss
            for depth in (8, 16, 32)
        }
        for depth in (8, 16):
            count += 1
            if not loss[depth] < loss[32]:
                odd.append(f"{depth}×{width}")
    said = f"{count - len(odd)} of {count} comparisons"
    return not odd, said + (f"; not at {', '.join(odd)}" if odd else "")


def batches(runs):
    """AGD converges at every batch size.

    Holds if, with every seed, the last epoch's train loss is below the first's and within 2 % of
    the least of all epochs, and the last train accuracy is over 20 %.
    """
    holds, said = True, []
    for batch in BATCHES:
        for found in runs.grid("fig7", f"batch {batch}", "AGD"):
            loss = found.column("train_loss")
            holds = holds and loss[-1] < loss[0] and loss[-1] <= 1.02 * min(loss)
            holds = holds and found.last["train_acc"] > 2 * CHANCE
        first = runs.results.of("fig7", f"batch {batch}", "AGD")[0].column("train_loss")
        said.append(f"{batch}: {first[0]:.3f} to {first[-1]:.3f}")
    return holds, "train loss at " + ", ".join(said)


def larger_batches(runs):
    """Test accuracy generally improves with the batch size.

    Holds if the last test accuracy at 1,024 and at 4,096 is above that at 32 and at 128, means over
    the seeds.
    """
    mean = {}
    for batch in BATCHES:
        accs = [x.last["test_acc"] for x in runs.grid("fig7", f"batch {batch}", "AGD")]
        mean[batch] = sum(accs) / len(accs)
    said = ", ".join(f"{batch}: {points(acc)}" for batch, acc in mean.items())
    return min(mean[1024], mean[4096]) > max(mean[32], mean[128]), said


def two_phases(runs):
    """η rises slowly, then falls once the training set is fitted.

    Judged on a run that ends with a train accuracy of 95 % or more. Holds if η, its mean in an
    epoch smoothed over a twentieth of the run, comes to its top after the first tenth of the run
    and with more than half of the training set fitted, a quarter or more above its lowest value
    before, and ends a tenth or more below the top.
    """
    places = [("phases", "fcn")] + [("fig6", f"{d}x{w}") for d in (4, 8) for w in (2048, 512)]
    for figure, panel in places:
        runs.used.clear()
        try:
            found = runs.one(figure, panel, "AGD")
        except Missing:
            continue
        if found.last["train_acc"] < 0.95:
            continue
        eta = found.column("eta_mean")
        window = max(1, len(eta) // 20)
        smooth = [sum(eta[i : i + window]) / window for i in range(len(eta) - window + 1)]
        top = max(range(len(smooth)), key=smooth.__getitem__)
        lowest = min(smooth[: top + 1])
        epoch = top + window // 2 + 1
        acc = found.epochs[epoch - 1]["train_acc"]
        holds = (
            top > len(eta) / 10
            and acc > 0.5
            and smooth[top] >= 1.25 * lowest
            and smooth[-1] <= 0.9 * smooth[top]
        )
        return holds, (
            f"η {lowest:.3f} to {smooth[top]:.3f} at epoch {epoch} (train accuracy {points(acc)}), "
            f"then {smooth[-1]:.3f} at the end ({points(found.last['train_acc'])})"
        )
    raise Missing


def bound(runs):
    """The majorisation lies above the objective along AGD's direction.

    Holds if it does at every point of figure 3 beyond its start, where they touch, at
    initialisation and after training.
    """
    path = runs.results.folder / "fig3.json"
    if not path.exists():
        raise Missing
    what = read_measurement(path)
    (row,) = (row for row in runs.results.table if row.figure == "fig3")
    states = list(what["states"].values())
    if len(states) < 2 or what["run"]["epochs"] < row.epochs:
        raise Missing
    pairs = [pair for state in states
             for pair in zip(state["t"], state["loss"], state["bound"])]  # fmt: skip
    beyond = [(loss, bound) for t, loss, bound in pairs if t > 0]
    below = sum(loss <= bound for loss, bound in beyond)
    reach = max(state["t"][-1] / state["eta"] for state in states)
    return below == len(beyond), f"{below} of {len(beyond)} points, up to t = {reach:g} η"


CLAIMS = [deep, comparable, best_rates, smaller_objective, wider, depth_32, batches,
          larger_batches, two_phases, bound]  # fmt: skip


def judge(claim, results):
    """("holds", "does not hold" or "not run", the numbers). Runs that have not come to their end
    judge nothing; where they are equally long, the numbers say how it stands so far."""
    evidence = Evidence(results)
    try:
        holds, said = claim(evidence)
    except Missing:
        return "not run", ""
    if not all(found.finished for found in evidence.used):
        lengths = {(len(found.epochs), found.experiment.epochs)
                   for found in evidence.used if not found.stopped}  # fmt: skip
        if len(lengths) > 1:
            return "not run", ""
        return "not run", "so far, {} of {} epochs: {}".format(*lengths.pop(), said)
    return ("holds" if holds else "does not hold"), said
