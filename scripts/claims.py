"""The paper's claims, and two on a text, with their verdicts, judged from the runs of the table.

CLAIMS is the table, `judge` gives a claim's verdict.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean
from typing import NamedTuple

from scripts import majorisation
from scripts.bigram import bigram_loss
from scripts.experiments import ADAMW, BASELINES, BATCHES, DEPTHS, SPECTRAL, WIDTHS
from scripts.results import BEGINNING
from scripts.words import number, short_name

CHANCE = 0.1  # of CIFAR-10, in a guess among ten classes
NEAR = 0.025  # accuracies that are comparable


class Missing(Exception):
    """A run that the claim needs is not there."""


class Claim(NamedTuple):
    says: str
    holds_if: str
    evidence: Callable  # (Evidence) -> (whether it holds, the numbers)


class Evidence:
    """The runs of one scale: `used` are those behind a verdict.

    Of a figure in `epochs` the runs count as far as the number there. `chosen`: {(figure,
    baseline): epochs after which its rate was chosen}, where the run at that rate went on. `part`
    says what a verdict is on, networks or epochs, where it is not on all that is planned.
    """

    def __init__(self, results, epochs=None):
        self.results, self.epochs, self.used, self.chosen = results, epochs or {}, [], {}
        self.part = ""

    def grid(self, *key):
        """All runs of a (figure, panel, curve): a grid or seeds."""
        runs = self.results.of(*key)
        if not runs or len(runs) < len(self.results.planned(*key)):
            raise Missing
        return self.take(runs)

    def take(self, runs):
        """Runs of a figure, as far as they count."""
        most = self.epochs.get(runs[0].experiment.figure)
        if most and runs[0].experiment.scheduled:
            raise Missing
        if any(run.only_begun for run in runs):
            raise Missing
        runs = [run.until(most) for run in runs]
        self.used += runs
        return runs

    def agd(self, figure, panel):
        """AGD's run with the first seed."""
        return self.grid(figure, panel, "AGD")[0]

    def if_run(self, look, *args):
        """look(*args), or None where a run that it needs is not there; then none of its runs
        counts."""
        before = len(self.used)
        try:
            return look(*args)
        except Missing:
            del self.used[before:]

    def tuned(self, *key):
        """The runs, one a seed, at the tuned rate of a grid."""
        most = self.epochs.get(key[0], math.inf)
        runs = self.results.tuned_seeds(*key, most)
        if not runs:
            raise Missing
        runs = self.take(runs)
        epochs = self.results.searched_epochs(*key)
        if epochs < len(runs[0].epochs):
            self.chosen[key[0], key[-1]] = epochs
        return runs


def points(x):
    return f"{100 * x:.1f} %"


def all_less(pairs, what):
    """Whether each of `pairs`, place -> (less, more), is in order, and the places that are not."""
    odd = [place for place, (less, more) in pairs.items() if not less < more]
    words = f"{len(pairs) - len(odd)} of {len(pairs)} {what}"
    return not odd, words + (f"; not at {', '.join(odd)}" if odd else "")


def deep(runs):
    agd = runs.agd("fig1", "deep").last["train_acc"]
    best = {name: max(runs.grid("fig1", "deep", name)[0].column("train_acc"))
            for name in BASELINES}  # fmt: skip
    words = ", ".join(f"{name} {points(acc)} at best" for name, acc in best.items())
    return agd > 2 * CHANCE and max(best.values()) < 1.5 * CHANCE, f"AGD {points(agd)}, {words}"


def comparable(runs):
    agd = runs.agd("fig1", "rates")
    if agd.experiment.flag("--arch") != "resnet18":
        raise Missing
    acc = agd.last["test_acc"]
    best = max(run.last["test_acc"] for name in BASELINES
               for run in runs.grid("fig1", "rates", name))  # fmt: skip
    return acc > best - NEAR, f"AGD {points(acc)}, the best of the grids {points(best)}"


def best_rates(runs):
    holds, words = True, []
    networks = {row.flags[:6] for row in runs.results.table
                if (row.figure, row.panel) in (("fig1", "rates"), ("fig5", "fcn"))}  # fmt: skip
    # On the wider grid too, where figure 1 has the same network.
    for place in [("fig5", "fcn"), ("fig1", "rates")][: 2 if len(networks) == 1 else 1]:
        rate = {}
        for name in BASELINES:
            runs.grid(*place, name)  # the rates that did not go on count, too
            rate[name] = runs.tuned(*place, name)[0].experiment.flag("--lr")
        grid = [row.flag("--lr") for row in runs.results.planned(*place, "SGD")]
        decades = math.log10(float(rate["SGD"]) / float(rate["Adam"]))
        holds = holds and round(decades) == 3
        words.append(f"Adam {rate['Adam']}, SGD {rate['SGD']} on {grid[0]} to {grid[-1]}")
    return holds, "; ".join(words)


def smaller_objective(runs):
    loss = {"AGD": runs.agd("fig5", "fcn").loss}
    for name in BASELINES:
        loss[name] = runs.tuned("fig5", "fcn", name)[0].loss
    words = ", ".join(f"{name} {number(loss[name])}" for name in loss)
    return max(loss["AGD"], loss["Adam"]) < loss["SGD"], words


def level_on_images(runs):
    """The words give the accuracies at one train loss, from all epochs, too: a gap there is not one
    of speed."""
    holds, words = True, []
    for place in (("fig4", "fcn"), ("fig5", "fcn")):
        pair = runs.if_run(lambda *key: (runs.agd(*key), runs.tuned(*key, "Adam")[0]), *place)
        if pair is None:
            continue
        agd, adam = pair
        ours, theirs = agd.last["test_acc"], adam.last["test_acc"]
        holds = holds and ours > theirs - NEAR
        rate = adam.experiment.flag("--lr")
        network = agd.experiment.network
        words.append(f"{network}: AGD {points(ours)}, Adam at {rate} {points(theirs)}")
        where, accs = at_one_loss([[runs.results.find(x.experiment)] for x in (agd, adam)])
        words[-1] += f" ({where}, {' and '.join(map(points, accs))})" if where else ""
    if not words:
        raise Missing
    return holds, "; ".join(words)


def losses(runs, depths, least):
    """{width: {depth: AGD's last train loss}} of the widths that were run at all these depths; of
    fewer widths than `least` there is nothing to say."""

    def at(width):
        return {depth: runs.agd("fig6", f"{depth}x{width}").loss for depth in depths}

    planned = WIDTHS[runs.results.scale]
    loss = {width: each for width in planned if (each := runs.if_run(at, width))}
    if len(loss) < least:
        raise Missing
    if len(loss) < len(planned):
        runs.part = f"width{'s' * (len(loss) > 1)} {', '.join(map(str, loss))}"
    return loss


def wider(runs):
    loss = losses(runs, DEPTHS, least=2)
    pairs = {f"{depth}×{wide}": (loss[wide][depth], loss[narrow][depth])
             for depth in DEPTHS for narrow, wide in pairwise(loss)}  # fmt: skip
    return all_less(pairs, "steps in width")


def depth_32(runs):
    loss = losses(runs, (8, 16, 32), least=1)
    pairs = {f"{depth}×{width}": (each[depth], each[32])
             for width, each in loss.items() for depth in (8, 16)}  # fmt: skip
    return all_less(pairs, "comparisons")


def batches(runs):
    holds, words = True, []
    for batch in BATCHES:
        seeds = runs.grid("fig7", f"batch {batch}", "AGD")
        for run in seeds:
            loss = run.column("train_loss")
            holds = holds and loss[-1] < loss[0] and loss[-1] <= 1.02 * min(loss)
            holds = holds and run.last["train_acc"] > 2 * CHANCE
        first = seeds[0].column("train_loss")
        words.append(f"{batch}: {number(first[0], 4)} to {number(first[-1], 4)}")
    return holds, "train loss at " + ", ".join(words)


def larger_batches(runs):
    """The verdict compares accuracies after equal epochs. An epoch of a larger batch has fewer
    steps, so the words give the accuracies at one train loss, from all epochs, too."""
    mean = {batch: fmean(run.last["test_acc"] for run in runs.grid("fig7", f"batch {batch}", "AGD"))
            for batch in BATCHES}  # fmt: skip
    words = ", ".join(f"{batch}: {points(acc)}" for batch, acc in mean.items())
    where, accs = at_one_loss([runs.results.of("fig7", f"batch {batch}", "AGD")
                               for batch in BATCHES])  # fmt: skip
    if where:
        each = ", ".join(f"{batch}: {points(acc)}" for batch, acc in zip(BATCHES, accs))
        words += f"; {where}, {each}"
    return min(mean[1024], mean[4096]) > max(mean[32], mean[128]), words


def smoothed(seeds, key, width):
    """Means of a column over the seeds and over windows of so many epochs."""
    column = [fmean(values) for values in zip(*(run.column(key) for run in seeds))]
    return [fmean(column[i : i + width]) for i in range(len(column) - width + 1)]


def at_one_loss(curves):
    """(the words for the least train loss that all of some curves come to, the test accuracies of
    each there), smoothed over a hundredth of the planned epochs; a curve is the runs of its seeds.
    ("", []) where one has no loss that is finite."""
    width = max(1, curves[0][0].experiment.epochs // 100)
    pairs = [[smoothed(seeds, key, width) for key in ("train_loss", "test_acc")]
             for seeds in curves]  # fmt: skip
    least = max(min(filter(math.isfinite, losses), default=math.inf) for losses, _ in pairs)
    if not math.isfinite(least):
        return "", []
    shown = math.ceil(1000 * least) / 1000  # not rounded down: each comes to it
    words = f"at a train loss of {shown:.3f}" + (f", means over {width} epochs" * (width > 1))
    return words, [at_loss(*pair, max(shown, least)) for pair in pairs]


def at_loss(losses, accs, loss):
    """The accuracy where a run first comes to a loss, on a straight line between two epochs."""
    i = next(i for i, x in enumerate(losses) if x <= loss)
    if i == 0 or not math.isfinite(losses[i - 1]):
        return accs[i]
    part = (losses[i - 1] - loss) / (losses[i - 1] - losses[i])
    return accs[i - 1] + part * (accs[i] - accs[i - 1])


def two_phases(runs):
    places = [("phases", "fcn")] + [("fig6", f"{d}x{w}") for d in (4, 8) for w in (2048, 512)]
    places += [("fig5", "fcn")]
    for place in places:
        runs.used.clear()
        try:
            run = runs.agd(*place)
        except Missing:
            continue
        if run.last["train_acc"] >= 0.95:
            return rise_and_fall(run)
    raise Missing


def rise_and_fall(run):
    epochs = len(run.epochs)
    window = max(1, epochs // 20)
    smooth = smoothed([run], "eta_mean", window)
    top = max(range(len(smooth)), key=smooth.__getitem__)
    lowest, epoch = min(smooth[: top + 1]), top + window // 2 + 1
    acc = run.epochs[epoch - 1]["train_acc"]
    late = top > epochs / 10 and acc > 0.5
    holds = late and smooth[top] >= 1.25 * lowest and smooth[-1] <= 0.9 * smooth[top]
    return holds, (
        f"η {number(lowest, 4)} to {number(smooth[top], 4)} at epoch {epoch} (train accuracy "
        f"{points(acc)}), "
        f"then {number(smooth[-1], 4)} at the end ({points(run.last['train_acc'])})"
    )


def bound(runs):
    measured = majorisation.read(runs.results)
    states = list(measured["states"].values()) if measured else []
    if len(states) < 2:
        raise Missing
    epochs, planned = measured["run"]["epochs"], majorisation.planned(runs.results).epochs
    if epochs < BEGINNING * planned:
        raise Missing
    if epochs < planned:
        runs.part = f"{epochs:,} of {planned:,} epochs"
    points = [zip(state["t"], state["loss"], state["bound"]) for state in states]
    beyond = [loss <= bound for curve in points for t, loss, bound in curve if t > 0]
    reach = max(state["t"][-1] / state["eta"] for state in states)
    return all(beyond), f"{sum(beyond)} of {len(beyond)} points, up to t = {reach:g} η"


def validation(runs):
    """(The mean of the last validation losses of some runs, the greatest, both in words)."""
    last = [run.test_loss for run in runs]
    mean, most = sum(last) / len(last), max(last)
    return mean, most, f"{number(mean, 4)} ({number(min(last), 4)} to {number(most, 4)})"


def transformer(runs):
    bigram, (mean, most, words) = bigram_loss(), validation(runs.grid("fig10", "gpt", "AGD"))
    # A mean that is not finite has a seed that is not, of which max may know nothing.
    return math.isfinite(mean) and most < bigram, f"AGD {words}, a bigram {number(bigram, 4)}"


def level_on_text(runs):
    ours, _, words = validation(runs.grid("fig10", "gpt", SPECTRAL))
    tuned = runs.tuned("fig10", "gpt", ADAMW)
    _, most, theirs = validation(tuned)
    rate = tuned[0].experiment.flag("--lr")
    return ours <= most, f"spectral AGD {words}, AdamW at {rate} {theirs}"


CLAIMS = [
    Claim("AGD trains the 32-layer FCN where Adam's and SGD's defaults stay at 10 %.",
          "Holds if AGD's last train accuracy is over 20 % and those of Adam at 0.001 and SGD at "
          "0.1 are under 15 % in every epoch.", deep),
    Claim("On ResNet-18, AGD's accuracy is comparable to the best of Adam and SGD over their "
          "rates.", "Holds if AGD's last test accuracy is within 2.5 points of the best on the "
          "grid.", comparable),
    Claim("Adam's best rate is about three decades below SGD's.",
          "Holds if, on the grid of tens, three steps lie between the rates with the least final "
          "train loss; where figure 1 has the same network on the wider grid, there too.",
          best_rates),
    Claim("AGD and tuned Adam attain a smaller training objective than tuned SGD.",
          "Holds if both last train losses are below tuned SGD's.", smaller_objective),
    Claim("AGD and tuned Adam have comparable test accuracies on the fully connected networks.",
          "Holds if AGD's last is above Adam's less 2.5 points on FCN 16×512 and 8×256, or on the "
          "one of them that was run.",
          level_on_images),
    Claim("Wider is better in train loss.", "Holds if at every depth each width's last train loss "
          "is below that of the width before; so far, on the widths that all depths have.", wider),
    Claim("In train loss, depth 8 and depth 16 are superior to depth 32.",
          "Holds if both are below it at every width; so far, at the widths that all three have.",
          depth_32),
    Claim("AGD converges at every batch size.", "Holds if, with every seed, the last epoch's train "
          "loss is below the first's and within 2 % of the least of all epochs, and the last train "
          "accuracy is over 20 %.", batches),
    Claim("Test accuracy generally improves with the batch size.",
          "Holds if the last test accuracy at 1,024 and at 4,096 is above that at 32 and at 128, "
          "means over the seeds.", larger_batches),
    Claim("η rises slowly, then falls once the training set is fitted.",
          "Judged on a run that ends with a train accuracy of 95 % or more. Holds if η, its mean "
          "in an epoch smoothed over a twentieth of the run, comes to its top after the first "
          "tenth of the run and with more than half of the training set fitted, a quarter or more "
          "above its lowest value before, and ends a tenth or more below the top.", two_phases),
    Claim("The majorisation lies above the objective along AGD's direction.",
          "Holds if it does at every point of figure 3 beyond its start, where they touch, at "
          "initialisation and after training.", bound),
    Claim("AGD works on transformers (the authors' blog post).", "Holds if the last validation "
          "loss of a GPT on characters is below that of a bigram with every seed.", transformer),
    Claim("Spectral AGD is level with tuned AdamW on a transformer, or below it (ours).",
          "Holds if its last validation loss, a mean over the seeds, is at most the greatest of "
          "the seeds of AdamW with a warm-up and a cosine, at its best rate.", level_on_text),
]  # fmt: skip


def judge(claim, results):
    """("holds" or "does not hold", the numbers), or ("not run", "").

    Where runs of a figure are not finished, the verdict is one "so far": all its runs count up to
    the epoch that each of them has. So it is where a part of the networks was run. A run counts
    from BEGINNING of its planned length on.
    """
    try:
        runs = Evidence(results)
        claim.evidence(runs)
        begun = {run.experiment.figure: run.experiment.epochs
                 for run in runs.used if not run.finished}  # fmt: skip
        epochs = {figure: min(len(run.epochs) for run in runs.used
                              if run.experiment.figure == figure and not run.stopped)
                  for figure in begun}  # fmt: skip
        runs = Evidence(results, epochs)
        holds, words = claim.evidence(runs)
    except Missing:
        return "not run", ""
    several = len({run.experiment.figure for run in runs.used}) > 1

    def of(figure):
        return f" of {short_name(figure)}" if several else ""

    lengths = [f"{epochs[figure]:,} of {planned:,} epochs{of(figure)}"
               for figure, planned in begun.items()]  # fmt: skip
    words = ", ".join([*lengths, f"{runs.part}: {words}" if runs.part else words])
    if runs.chosen:
        words += "; chosen: " + ", ".join(f"{name}'s rate{of(figure)} after {n:,} epochs"
                                          for (figure, name), n in runs.chosen.items())
    verdict = "holds" if holds else "does not hold"
    return verdict + (" so far" if begun or runs.chosen or runs.part else ""), words
