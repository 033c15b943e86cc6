"""The metrics of an epoch: sums and counts, divided once at its end; the rows of the log."""

import math

import torch


def hits(outputs, labels):
    """Whether each output (..., C) is largest at its label (...), bool; see losses.py for the
    shapes. All that the sums need of the outputs, which of a text may take gigabytes."""
    return outputs.detach().argmax(-1) == labels


class Totals:
    """Sums and counts of an epoch, a column a step, on the device until `read`.

    `columns`: (sum of losses, number correct, number of examples) of each step. `extras`: "eta" and
    "update", scalars of each step that are the same on every rank. `state`: what another Totals
    returned from `state`; its columns come first, on `device`.
    """

    def __init__(self, state=None, device=None):
        self.columns, self.extras = [], {"eta": [], "update": []}
        self.added, self.sums, self.examples = 0, 0.0, 0  # what `means` has added up
        if state is not None:
            losses, correct = state["losses"].to(device), state["correct"].to(device)
            self.columns = list(zip(losses.unbind(), correct.unbind(), state["counts"]))
            for key in self.extras:
                # float32, as `read` has it: not every device has float64.
                self.extras[key] = list(state[key].to(losses).unbind()) if key in state else []

    def add(self, losses, correct, **extras):
        """Add a batch: losses (B,) and its hits, (B,) or of a text (B, T); of `extras`, those not
        None."""
        self.columns.append((losses.detach().sum(), correct.sum(), losses.shape[0]))
        for key, value in extras.items():
            if value is not None:
                self.extras[key].append(value)

    def state(self, reduce=None):
        """The columns as tensors on the CPU, for a checkpoint, or None; `reduce` as in `read`."""
        if not self.columns:
            return None
        losses, correct, counts = zip(*self.columns)
        losses, correct = torch.stack(losses), torch.stack(correct)
        counts = torch.tensor(counts, dtype=torch.int64, device=correct.device)
        for tensor in (losses, correct, counts) if reduce is not None else ():
            reduce(tensor)
        extras = {key: torch.stack(values).cpu() for key, values in self.extras.items() if values}
        return {"losses": losses.cpu(), "correct": correct.cpu(), "counts": counts.tolist(),
                **extras}  # fmt: skip

    def means(self):
        """(The mean loss, the mean eta) of this rank's steps so far, (2,) on the device; NaN where
        there is none. Adds up the steps since the last call, and reads nothing."""
        losses, _, counts = zip(*self.columns[self.added :])
        losses, etas = torch.stack(losses), self.extras["eta"][self.added :]
        etas = torch.stack(etas).to(losses) if etas else losses.new_zeros(0)
        self.sums = self.sums + torch.stack([losses.sum(), etas.nansum(), etas.isfinite().sum()])
        self.added, self.examples = len(self.columns), self.examples + sum(counts)
        loss, eta, count = self.sums.unbind()
        return torch.stack([loss / self.examples, eta / count])

    def read(self, reduce=None, positions=1):
        """The metrics of the epoch, in two transfers from the device.

        `reduce` adds up a tensor over ranks, in place; `positions`: the labels of an example.
        Returns a dict: "loss" and "acc", the means over all examples; "examples", their number;
        "steps", a dict of lists with "loss", "acc", "eta" and "update" of each step (None where
        they were not measured).
        """
        losses, correct, counts = zip(*self.columns)
        losses, correct = torch.stack(losses), torch.stack(correct)
        counts = torch.stack([correct, torch.tensor(counts).to(correct)])  # integers all the way
        if reduce is not None:
            reduce(losses)
            reduce(counts)
        measured = [key for key, values in self.extras.items() if values]
        columns = [torch.stack(self.extras[key]).to(losses) for key in measured]
        loss, *extras = torch.stack([losses, *columns]).cpu().double().tolist()
        correct, counts = counts.tolist()
        extras, examples = dict(zip(measured, extras)), sum(counts)
        return {
            "loss": sum(loss) / max(examples, 1),
            "acc": sum(correct) / max(examples * positions, 1),
            "examples": examples,
            "steps": {
                "loss": [x / max(n, 1) for x, n in zip(loss, counts)],
                "acc": [x / max(n * positions, 1) for x, n in zip(correct, counts)],
                "eta": extras.get("eta"),
                "update": extras.get("update"),
            },
        }


def relative_update(before, after):
    """The mean over layers of |dW|_F / |W|_F, a 0-dim tensor. Overwrites `before`, the weights W.

    Lists of weights of one device. A layer of zeros that has moved makes it infinite.
    """
    sizes = torch._foreach_norm(before)
    torch._foreach_sub_(before, after)
    return torch.stack(torch._foreach_div(torch._foreach_norm(before), sizes)).mean()


def epoch_row(epoch, train, test, seconds, training_seconds, clock, text=None):
    """The log's row of an epoch. `train`, `test`: what Totals.read returned, of the weights that
    train and of the weights that the optimiser shows in eval mode. `clock`: {"length", "turn"} of
    SpectralAGD, |Z| over its start's and the angle of the last step, means over hidden layers.
    `text`: (the tokens of an example, the bytes of a token in training and in validation or None)
    of a text whose loss is in nats."""
    steps = train["steps"]
    skipped = sum(math.isnan(eta) for eta in steps["eta"] or [])
    tokens, sizes = text or (None, None)
    rate = train["examples"] / training_seconds
    parts = zip(("train_bits", "test_bits"), (train, test), sizes or ())
    bits = {key: bits_a_byte(part["loss"], size) for key, part, size in parts}
    return {
        "kind": "epoch",
        "epoch": epoch,
        "train_loss": train["loss"],
        "train_acc": train["acc"],
        "test_loss": test["loss"],
        "test_acc": test["acc"],
        **bits,
        **spread("eta", steps["eta"]),
        **clock,
        **(spread("update", steps["update"]) if steps["update"] else {}),
        **({"skipped_steps": skipped} if skipped else {}),
        "seconds": seconds,
        **({"tokens_per_second": tokens * rate} if text else {"images_per_second": rate}),
    }


def bits_a_byte(loss, size):
    """A loss in nats a token, of tokens of `size` bytes, in bits a byte."""
    return loss / math.log(2) / size


def least(rows):
    """The first row of an epoch with the least finite test loss, or None."""
    finite = [row for row in rows if row["test_loss"] is not None
              and math.isfinite(row["test_loss"])]  # fmt: skip
    return min(finite, key=lambda row: row["test_loss"], default=None)


def spread(key, values):
    """The least, the mean and the greatest finite value, or None for each."""
    values = [x for x in values or [] if math.isfinite(x)]
    three = (min(values), sum(values) / len(values), max(values)) if values else (None,) * 3
    return dict(zip((f"{key}_min", f"{key}_mean", f"{key}_max"), three))


def step_rows(epoch, steps):
    """The log's rows of the steps of an epoch."""
    columns = {key: values for key, values in steps.items() if values or key == "eta"}
    columns["eta"] = steps["eta"] or [None] * len(steps["loss"])
    return [
        {"kind": "step", "epoch": epoch, "step": i, **dict(zip(columns, values))}
        for i, values in enumerate(zip(*columns.values()), 1)
    ]
