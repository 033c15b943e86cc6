"""What a run prints: tables, the progress of its epochs, its end."""

import math
import os
import sys
import time

from tqdm import tqdm

from cli import command
from data import is_text
from training.metrics import least

LAYERS = 12  # of a network that is printed whole
SECOND, MINUTE, TENTH = 1.0, 60.0, 0.1
BAR = 8  # columns of the bar, at least, and of the space before it
CTRL_C = 3  # columns right of it, for the terminal's own ^C


def table(title, rows):
    """Print columns as wide as their contents."""
    print(columns(title, rows) + "\n", flush=True)


def columns(title, rows):
    """The lines of a table; the last column is as wide as it comes."""
    widths = [max(map(len, map(str, column))) for column in list(zip(title, *rows))[:-1]]
    rows = [title, [*("-" * width for width in widths), "-" * 20], *rows]
    lines = ["  ".join(f"{x!s:<{width}}" for x, width in zip(row, [*widths, 0])) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def alone(words):
    """Print what a command without flags stands for, `words`."""
    print(f"Without flags: {command('main', *words)}\n")


def next_steps(words, out):
    """Print what to try after the run of `words`, a command each."""
    steps = {
        "Faster": command("main", *words, "--optimizer", "spectral"),
        "Watch": command("scripts.watch", out),
        "Text": command("main", "--arch", "gpt", "--dataset", "shakespeare"),
        "Images": command("main", "--arch", "resnet18", "--dataset", "cifar10"),
        "Library": command("examples.plain_digits"),
        "All": command("main", "--help"),
    }
    print("\nTo try next")
    print(*(f"{name:<8} {step}" for name, step in steps.items()), sep="\n")


def settings(rows):
    """Print the settings of a run that are not at their defaults, rows (flag, value)."""
    print(columns(("Setting", "Value"), rows))
    print("The others are at their defaults (--help); the log's first row has them all.\n",
          flush=True)  # fmt: skip


def network(net, facts, notes):
    """Print the layers of a network, of many the first and the last ones, their number, and
    sentences about its start."""
    rows = [
        (name, f"{tuple(p.shape)}{'' if p.requires_grad else '  frozen'}")
        for name, p in net.named_parameters()
    ]
    if len(rows) > LAYERS:
        rows = [*rows[:6], (f"... {len(rows) - 9} more", ""), *rows[-3:]]
    table(("Layer", "Shape"), rows)
    frozen, paths, shape = map(facts.get, ("frozen_weights", "paths", "shape"))
    text = shape is not None and len(shape) == 1
    print("{weights:,} weights in {layers} layers".format(**facts)
          + (f", {frozen:,} of them frozen" if frozen else "")
          + (f", {paths:.4g} layers on a path" if paths is not None else "")
          + (";\n" if text else "; ")  # a line of a terminal each
          + "{train_examples:,} training and {test_examples:,} ".format(**facts)
          + (f"validation windows of {shape[0]:,} tokens" if text else "test images"))
    print(*notes, "", sep="\n")


def width():
    """The columns of the terminal."""
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def fitting(parts, room):
    """As many of the parts as fit into `room` columns, joined; the first one in any case."""
    while len(parts) > 1 and len("  ".join(parts)) > room:
        parts = parts[:-1]
    return "  ".join(parts)


def tokens_a_second(rate):
    """A rate in words."""
    return f"{rate / 1000:.3g}k tok/s"


class Progress:
    """The progress of the epochs, nothing if `quiet`. On a terminal: a line an epoch, and below
    them a bar with the step, the loss and eta so far. Elsewhere: a line an epoch, and one every
    minute of a longer epoch."""

    def __init__(self, epochs, steps, quiet, tokens=None):
        self.epochs, self.steps, self.quiet = epochs, steps, quiet
        self.terminal, self.bar = sys.stdout.isatty(), None
        self.every = SECOND if self.terminal else MINUTE  # between two looks at loss and eta
        self.figures, self.place = None, None  # (loss, eta) so far, of the epoch of `place`
        self.tokens, self.phase = tokens, (0.0, 0)  # when `place` was first shown, and its step
        encoding = sys.stdout.encoding or "ascii"
        self.eta = "η" if "η".encode(encoding, "ignore") else "eta"

    def begin(self, epoch, step):
        """Begin at this place: completed epochs, and steps of the next one."""
        self.first, self.began = epoch * self.steps + step, time.monotonic()
        self.due, self.shown = self.began + (0 if self.terminal else self.every), self.began
        if self.terminal and not self.quiet:
            parts = self._parts(min(epoch + 1, self.epochs), "step", step, self.steps)
            self.bar = tqdm(
                total=self.epochs * self.steps, initial=self.first,
                desc=fitting(parts, width() - CTRL_C - BAR),
                bar_format="{desc}  {bar}", ncols=width() - CTRL_C, file=sys.stdout, leave=False,
                ascii=None if self.eta == "η" else " #",
            )  # fmt: skip

    def asks(self):
        """Whether the loss and eta so far are wanted: once a second at most, once a minute where
        there is no terminal."""
        if self.quiet or time.monotonic() < self.due:
            return False
        self.due = time.monotonic() + self.every
        return True

    def step(self, epoch, step, figures=None):
        """Show a step of an epoch. `figures`: (loss, eta) so far, where there are new ones."""
        self._show(figures is not None, epoch, "step", step, self.steps, figures)

    def testing(self, epoch, batch, batches):
        """Show a batch of the test after an epoch."""
        due = not self.terminal and self.asks()
        self._show(due, epoch, "testing", batch, batches, self.figures)

    def _show(self, due, epoch, doing, i, of, figures):
        """Show the place now if it is `due`, is another phase, or was last shown a while ago."""
        if self.quiet:
            return
        place, now = (epoch, doing), time.monotonic()
        if place != self.place:
            self.place, self.phase, due = place, (now, i), due or self.terminal
        self.figures = figures or self.figures
        if not due and not (self.terminal and now > self.shown + TENTH):
            return
        done = (epoch - 1) * self.steps + (i if doing == "step" else self.steps)
        parts, self.shown = self._parts(epoch, doing, i, of), now
        if done > self.first:
            left = (now - self.began) / (done - self.first) * (self.epochs * self.steps - done)
            parts.append(f"{tqdm.format_interval(left)} left")
        began, first = self.phase
        if self.tokens and doing == "step" and i > first:
            parts.append(tokens_a_second((i - first) * self.tokens / (now - began)))
        if self.terminal:
            self.bar.n, self.bar.ncols = done, width() - CTRL_C
            self.bar.set_description_str(fitting(parts, self.bar.ncols - BAR))
        else:
            print("  ".join(["in " + parts[0], *parts[1:]]), flush=True)

    def _parts(self, epoch, doing, i, of):
        parts = [f"epoch {epoch}/{self.epochs}", f"{doing} {i}/{of}", *self._figures()]
        if self.terminal and len("  ".join(parts)) > width() - CTRL_C - BAR:
            head, doing, *figures = parts  # the figures first, where there is no room for all
            parts = [head.removeprefix("epoch ") if figures else head, *figures, doing]
        return parts

    def _figures(self):
        """The words of the figures; eta is NaN where there is none."""
        digits = 3 if self.terminal else 4
        names = zip(("loss", self.eta), self.figures or ())
        return [f"{name} {x:.{digits}f}" for name, x in names if name == "loss" or x == x]

    def epoch(self, row):
        """Print the row of an epoch."""
        eta, turn, rate = row["eta_mean"], row.get("turn"), row.get("tokens_per_second")
        digits = 3 if self.terminal else 4
        parts = [f"epoch {row['epoch']}/{self.epochs}", f"loss {row['train_loss']:.{digits}f}"]
        if rate is None:
            parts += [f"{part} {row[f'{part}_acc']:.{digits - 2}%}" for part in ("train", "test")]
            rate = f"{row['images_per_second']:,.0f} img/s"
        else:  # of a text the loss is what counts
            parts += [f"val {row['test_loss']:.{digits}f}", f"{row['test_acc']:.{digits - 2}%}"]
            parts += [f"{row['test_bits']:.3f} bpb"] if "test_bits" in row else []
            rate, turn = tokens_a_second(rate), None
        parts += [] if eta is None else [f"{self.eta} {eta:.{digits}f}"]
        parts += [f"lr {row['lr']:.2g}"] if "lr" in row else []
        # Instead of the rate, for which there is no room.
        parts += [rate if turn is None else f"turn {turn:.2g}"]
        parts += [f"{row['seconds']:.2f} s"]
        self.note(fitting(parts, width()) if self.terminal else "  ".join(parts))
        if self.terminal:  # until there are new ones: an epoch may be shorter than a second
            self.figures = row["train_loss"], math.nan if eta is None else eta
        else:
            self.figures, self.due = None, time.monotonic() + self.every

    def note(self, text):
        """Print a line, above the bar where there is one."""
        if not self.quiet:
            if self.bar is not None and self.terminal:
                self.bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def profile(self, profile):
        """Print where the time of a Profile goes, and its traces."""
        rows = [(part, f"{share}  {time}") for part, share, time in profile.shares()]
        traces = [f"Trace    {path}" for path in profile.paths]
        self.note("\n".join(["", columns(("Part", "Share of an epoch"), rows), "", *traces, ""]))

    def close(self):
        if self.bar is not None:
            self.bar.close()


def error(reason, trace=None):
    """Print why a run came to nothing, to the standard error."""
    if reason == "interrupted":
        print("interrupted", file=sys.stderr, flush=True)
    elif reason:
        print(f"{trace or ''}error: {reason}", file=sys.stderr, flush=True)


def resumed(progress, log, trainer):
    """Print from where a run resumes, and how its environment differs from its first."""
    step = f", step {trainer.step} of {trainer.batches}" if trainer.step else ""
    progress.note(f"Going on after epoch {len(trainer.rows)}{step}, of {log.log_path}")
    odd = ", ".join(key.replace("_", " ") for key in log.changed if key != "image_files")
    if odd:
        progress.note(f"Note: not as it began ({odd}): the last digits may differ")
    if log.other_images:
        progress.note(other_images(log))
    progress.note("")


def other_images(log):
    """How the images, or the text, differ from those that a run began with, as a line."""
    noun, own = ("text", "its") if is_text(log.settings["dataset"]) else ("images", "their")
    what = (f"the times of {own} files differ, and may be those of a copy"
            if log.other_images == "times" else f"{own} {log.other_images} differ")  # fmt: skip
    return f"Note: not the {noun} that {log.log_path} began with: {what}"


def already(log, epochs, row, stopped):
    """Print that a run has nothing left to do; `row`: of its last epoch, or None."""
    if stopped is None:
        result = "no test" if row is None else (
            of_text(row) if "tokens_per_second" in row else
            f"test accuracy {figure(row['test_acc'], '.2%')}")  # fmt: skip
        print(f"Already finished: {epochs} epochs, {result}.")
    else:
        print(f"Already ended: {stopped}.")
    print(f"{log.log_path} has it; another --out keeps it, --fresh starts over.")
    if log.other_images:
        print(other_images(log))


def further(log, epoch, epochs):
    """Print that the checkpoint of a run is in an epoch past the last one of the command."""
    print(f"The checkpoint is in epoch {epoch} already, past --epochs {epochs}.")
    print(f"{log.log_path} has the epochs before; another --out keeps it, --fresh starts over.")


def figure(x, form):
    """A number, or a dash where the log has none."""
    return "-" if x is None else format(x, form)


def of_text(row, best=None):
    """The validation of a text, in words; on two lines with the row of the `best` epoch."""
    bits = f"{row['test_bits']:.4f} bits a byte, " if "test_bits" in row else ""
    loss = f"validation loss {figure(row['test_loss'], '.4f')}"
    loss += "," if best is None else (
        f" (best {figure(best['test_loss'], '.4f')}, epoch {best['epoch']})")  # fmt: skip
    return f"{loss}{' ' if best is None else chr(10)}{bits}{row['test_acc']:.2%} of the tokens"


def best_checkpoint(checkpoints, epoch):
    """Where the best checkpoint is and of which epoch; `epoch` has the least test loss."""
    kept = checkpoints.epoch_of_best()
    if kept == epoch:
        return f"{checkpoints.best}, of epoch {epoch}"
    lost = f"epoch {epoch} has the least test loss, and its checkpoint was not kept"
    return f"none: {lost}" if kept is None else f"{checkpoints.best}, of epoch {kept}; {lost}"


def evaluated(saved, row, text):
    """Print the evaluation of a Saved run."""
    epoch, step = saved.checkpoint["epoch"], saved.checkpoint["step"]
    place = f"in epoch {epoch + 1}, after step {step}" if step else f"after epoch {epoch}"
    words = of_text(row) if text else (
        f"test loss {row['test_loss']:.4f}, test accuracy {row['test_acc']:.2%}")  # fmt: skip
    print(f"{words[0].upper()}{words[1:]}\n{place[0].upper()}{place[1:]} of {saved.log.stem}\n"
          f"Weights  {saved.path}")


def summary(trainer, ending, seconds, skipped):
    """Print the Ending of a run. `seconds`: of this command; `skipped`: steps without a finite
    gradient."""
    print()
    log, rows, reason = trainer.log, trainer.rows, ending.reason
    whole = f"{len(rows)} whole epochs"
    if trainer.step:
        whole += f", in step {trainer.step} of {trainer.batches}"
    if reason == "interrupted":
        then = "goes on from the last checkpoint" if log.saved else "starts again"
        print(f"Interrupted after {whole};\nthe same command {then}.")
    elif reason == "requeued":
        print(f"The job is back in the queue after {whole}, and goes on from there.")
    elif reason is not None:
        print(f"Stopped after {whole}." if ending.told else f"Stopped: {reason.rstrip('.')}.")
    else:
        now = f", {len(rows) - trainer.done} of them now," if trainer.done else ""
        print(f"Finished {len(rows)} epoch{'s' if len(rows) > 1 else ''}{now} in {seconds:.1f} s.")
    if rows and all(row["test_acc"] is not None for row in rows):
        last, best = rows[-1], max(rows, key=lambda row: row["test_acc"])
        loss = f"Train loss {figure(last['train_loss'], '.4f')}, "
        if "tokens_per_second" in last:
            best = least(rows) or last
            print(f"{loss}{of_text(last, best)}")
        else:
            print(f"{loss}train accuracy {last['train_acc']:.2%}, "
                  f"test accuracy {last['test_acc']:.2%}\n"
                  f"(best {best['test_acc']:.2%}, epoch {best['epoch']})")
    if skipped:
        print(f"{skipped} steps were skipped for a gradient that was not finite")
    if ending.bad_images:
        more = ", ..." if len(ending.bad_images) > 5 else ""
        print(f"{len(ending.bad_images)} images could not be decoded and were left out: "
              f"{', '.join(ending.bad_images[:5])}{more}")
    print(f"Log      {log.log_path}")
    if log.checkpoint_path.exists():
        of = ""
        if reason is not None and log.saved:
            epoch, step = log.saved
            of = f" of epoch {epoch + 1}, step {step}" if step else f" after epoch {epoch}"
        print(f"Weights{of}  {log.checkpoint_path}")
    if trainer.keep_best and (best := least(rows)):
        print(f"Best     {best_checkpoint(log.checkpoints, best['epoch'])}")
    if log.record_path.exists():
        print(f"Record   {log.record_path}")
    if rows:
        print(f"Curves   {command('scripts.plot', log.log_path, '-o', 'curves.png')}")
