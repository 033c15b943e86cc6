"""What a run prints: tables, the progress of its epochs, its end."""

import sys

from tqdm import tqdm


def table(title, rows):
    """Columns that are as wide as they have to be."""
    print(columns(title, rows) + "\n", flush=True)


def columns(title, rows):
    widths = [max(map(len, map(str, column))) for column in list(zip(title, *rows))[:-1]]
    rows = [title, [*("-" * width for width in widths), "-" * 20], *rows]
    lines = ["  ".join(f"{x!s:<{width}}" for x, width in zip(row, [*widths, 0])) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


class Progress:
    """What a person sees of the epochs: a bar on a terminal, else a line an epoch; or nothing."""

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
        self.bar.update(done - self.bar.n)

    def epoch(self, row):
        eta, turn = row["eta_mean"], row.get("turn")
        rate = row["images_per_second"]
        if self.terminal:
            parts = [f"{row['epoch']}/{self.epochs}", f"loss {row['train_loss']:.3f}"]
            parts += [f"train {row['train_acc']:.1%}", f"test {row['test_acc']:.1%}"]
            parts += [] if eta is None else [f"{self.eta} {eta:.3f}"]
            if turn is not None:  # in the place of the rate, for which there is no room
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
        """A line of its own, above the bar where there is one."""
        if not self.quiet:
            if self.bar is not None and self.terminal:
                self.bar.write(text, file=sys.stdout)
            else:
                print(text, flush=True)

    def profile(self, profile):
        """Where the time of a Profile goes, and the traces that show more."""
        rows = [(part, f"{share}  {time}") for part, share, time in profile.shares()]
        traces = [f"Trace    {path}" for path in profile.paths]
        self.note("\n".join(["", columns(("Part", "Share of an epoch"), rows), "", *traces, ""]))

    def close(self):
        if self.bar is not None:
            self.bar.close()


def already(run, epochs, test_acc, stopped):
    """The words for a run that has nothing left to do."""
    if stopped is None:
        print(f"Already finished: {epochs} epochs, test accuracy {figure(test_acc, '.2%')}.")
    else:
        print(f"Already ended: {stopped}.")
    print(f"{run.log_path} has it; --fresh starts over.")


def further(run, epoch, epochs):
    """The words for a run whose checkpoint is in an epoch past those that are asked for."""
    print(f"The checkpoint is in epoch {epoch} already, past --epochs {epochs}.")
    print(f"{run.log_path} has the epochs before; --fresh starts over.")


def figure(x, form):
    """A number, or a dash where the log has none."""
    return "-" if x is None else format(x, form)


def summary(run, rows, done, stopped, seconds, skipped, bad_images, where, told=False):
    """The last lines of a run: its epoch rows, of which `done` were there before; `where`: (step,
    steps) of the epoch under way, if any; `told`: why it stopped has been said already."""
    print()
    whole = f"{len(rows)} whole epochs" + ("" if not where else ", in step {} of {}".format(*where))
    if stopped == "interrupted":
        then = "goes on from the last checkpoint" if run.saved else "starts again"
        print(f"Interrupted after {whole};\nthe same command {then}.")
    elif stopped == "requeued":
        print(f"The job is back in the queue after {whole}, and goes on from there.")
    elif stopped is not None:
        print(f"Stopped after {whole}." if told else f"Stopped: {stopped.rstrip('.')}.")
    else:
        now = f", {len(rows) - done} of them now," if done else ""
        print(f"Finished {len(rows)} epoch{'s' if len(rows) > 1 else ''}{now} in {seconds:.1f} s.")
    if rows and all(row["test_acc"] is not None for row in rows):
        last, best = rows[-1], max(rows, key=lambda row: row["test_acc"])
        print(f"Train loss {figure(last['train_loss'], '.4f')}, "
              f"train accuracy {last['train_acc']:.2%}, test accuracy {last['test_acc']:.2%}\n"
              f"(best {best['test_acc']:.2%}, epoch {best['epoch']})")
    if skipped:
        print(f"{skipped} steps were skipped for a gradient that was not finite")
    if bad_images:
        more = ", ..." if len(bad_images) > 5 else ""
        print(f"{len(bad_images)} images could not be decoded and were left out: "
              f"{', '.join(bad_images[:5])}{more}")
    print(f"Log      {run.log_path}")
    if run.checkpoint_path.exists():
        of = ""
        if stopped is not None and run.saved:
            of = f" of epoch {run.saved[0] + 1}, step {run.saved[1]}"
            of = of if run.saved[1] else f" after epoch {run.saved[0]}"
        print(f"Weights{of}  {run.checkpoint_path}")
    if run.record_path.exists():
        print(f"Record   {run.record_path}")
    if rows:
        print(f"Curves   python -m scripts.plot {run.log_path} -o curves.png")
