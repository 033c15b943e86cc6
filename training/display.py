"""What a run prints: tables, the progress of its epochs, its end."""

import sys

from tqdm import tqdm


def table(title, rows):
    """Print columns as wide as their contents."""
    print(columns(title, rows) + "\n", flush=True)


def columns(title, rows):
    """The lines of a table; the last column is as wide as it comes."""
    widths = [max(map(len, map(str, column))) for column in list(zip(title, *rows))[:-1]]
    rows = [title, [*("-" * width for width in widths), "-" * 20], *rows]
    lines = ["  ".join(f"{x!s:<{width}}" for x, width in zip(row, [*widths, 0])) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def network(net, facts, notes):
    """Print the layers of a network, their number, and sentences about its start."""
    table(("Layer", "Shape"), [
        (name, f"{tuple(p.shape)}{'' if p.requires_grad else '  frozen'}")
        for name, p in net.named_parameters()
    ])  # fmt: skip
    frozen, paths = facts.get("frozen_weights"), facts.get("paths")
    print("{weights:,} weights in {layers} layers".format(**facts)
          + (f", {frozen:,} of them frozen" if frozen else "")
          + (f", {paths:.4g} layers on a path" if paths is not None else "")
          + "; {train_examples:,} training and {test_examples:,} test images".format(**facts))
    print(*notes, "", sep="\n")


class Progress:
    """The progress of the epochs: a bar on a terminal, else a line an epoch; nothing if `quiet`."""

    def __init__(self, epochs, steps, quiet):
        self.epochs, self.steps, self.terminal = epochs, steps, sys.stdout.isatty()
        self.quiet, self.bar = quiet, None
        encoding = sys.stdout.encoding or "ascii"
        self.eta = "η" if "η".encode(encoding, "ignore") else "eta"

    def begin(self, done):
        """Show that `done` steps have been taken."""
        self.bar = tqdm(
            total=self.epochs * self.steps, initial=done, disable=self.quiet or not self.terminal,
            file=sys.stdout, bar_format="{desc} {remaining} left {bar}", dynamic_ncols=True,
            desc=f"{done // self.steps}/{self.epochs}", ascii=None if self.eta == "η" else " #",
        )  # fmt: skip

    def step(self, done):
        """Show that `done` steps have been taken."""
        self.bar.update(done - self.bar.n)

    def epoch(self, row):
        """Show the row of an epoch."""
        eta, turn = row["eta_mean"], row.get("turn")
        rate = row["images_per_second"]
        if self.terminal:
            parts = [f"{row['epoch']}/{self.epochs}", f"loss {row['train_loss']:.3f}"]
            parts += [f"train {row['train_acc']:.1%}", f"test {row['test_acc']:.1%}"]
            parts += [] if eta is None else [f"{self.eta} {eta:.3f}"]
            if turn is not None:  # instead of the rate, for which there is no room
                parts += [f"turn {turn:.2g}"]
            else:
                parts += [f"{rate:.0f} img/s" if rate < 1e4 else f"{rate / 1e3:.0f}k img/s"]
            self.bar.set_description_str(" ".join(parts))
        elif not self.quiet:
            parts = [f"epoch {row['epoch']}/{self.epochs}", f"loss {row['train_loss']:.4f}"]
            parts += [f"train {row['train_acc']:.2%}", f"test {row['test_acc']:.2%}"]
            parts += [] if eta is None else [f"{self.eta} {eta:.4f}"]
            parts += [f"{rate:,.0f} img/s"] if turn is None else [f"turn {turn:.2g}"]
            parts += [f"{row['seconds']:.2f} s"]
            print("  ".join(parts), flush=True)

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
    """How the images differ from those that a run began with, as a line."""
    what = ("the times of their files differ, and may be those of a copy"
            if log.other_images == "times" else f"their {log.other_images} differ")  # fmt: skip
    return f"Note: not the images that {log.log_path} began with: {what}"


def already(log, epochs, test_acc, stopped):
    """Print that a run has nothing left to do."""
    if stopped is None:
        print(f"Already finished: {epochs} epochs, test accuracy {figure(test_acc, '.2%')}.")
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
        print(f"Train loss {figure(last['train_loss'], '.4f')}, "
              f"train accuracy {last['train_acc']:.2%}, test accuracy {last['test_acc']:.2%}\n"
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
    if log.record_path.exists():
        print(f"Record   {log.record_path}")
    if rows:
        print(f"Curves   python -m scripts.plot {log.log_path} -o curves.png")
