"""Sums and counts of an epoch, divided once at its end; the size of an update."""

import torch


def sums(losses, outputs, labels):
    """(The sum of the losses, the number of outputs that are right), 0-dim tensors."""
    return losses.detach().sum(), (outputs.argmax(1) == labels).sum()


class Totals:
    """Sums and counts of an epoch, a column a step, on the device until `read`.

    They begin with those of `state`, which then are on `device`.
    """

    def __init__(self, state=None, device=None):
        self.columns, self.extras = [], {"eta": [], "update": []}
        if state is not None:
            losses, correct = state["losses"].to(device), state["correct"].to(device)
            self.columns = list(zip(losses.unbind(), correct.unbind(), state["counts"]))
            for key in self.extras:
                self.extras[key] = list(state[key].to(device).unbind()) if key in state else []

    def add(self, losses, outputs, labels, **extras):
        """One batch: its losses (B,), outputs (B, C) and labels (B,); of `extras`, scalars that
        are the same on every rank, "eta" and "update", those that are not None."""
        self.columns.append((*sums(losses, outputs, labels), labels.shape[0]))
        for key, value in extras.items():
            if value is not None:
                self.extras[key].append(value)

    def state(self, reduce=None):
        """What other Totals can begin with, on the CPU; `reduce` as in `read`."""
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

    def read(self, reduce=None):
        """The figures of the epoch, in two transfers from the device.

        `reduce` adds up a tensor over ranks, in place. Returns a dict: "loss" and "acc", the means
        over all examples; "examples", their number; "steps", a dict of lists with "loss", "acc",
        "eta" and "update" of each step (the last two None where they were not measured).
        """
        losses, correct, counts = zip(*self.columns)
        # One row a step; counts are integers all the way.
        sums, correct = torch.stack(losses), torch.stack(correct)
        counts = torch.stack([correct, torch.tensor(counts).to(correct)])
        if reduce is not None:
            reduce(sums)
            reduce(counts)
        measured = [key for key, values in self.extras.items() if values]
        columns = [torch.stack(self.extras[key]).to(sums) for key in measured]
        loss, *extras = torch.stack([sums, *columns]).cpu().double().tolist()
        correct, counts = counts.tolist()
        extras, examples = dict(zip(measured, extras)), sum(counts)
        return {
            "loss": sum(loss) / max(examples, 1),
            "acc": sum(correct) / max(examples, 1),
            "examples": examples,
            "steps": {
                "loss": [x / max(n, 1) for x, n in zip(loss, counts)],
                "acc": [x / max(n, 1) for x, n in zip(correct, counts)],
                "eta": extras.get("eta"),
                "update": extras.get("update"),
            },
        }


def relative_update(before, after):
    """The mean over layers of |dW|_F / |W|_F, a 0-dim tensor; W is `before`, which is overwritten.

    Lists of weights of one device. A layer of zeros that has moved makes it infinite.
    """
    sizes = torch._foreach_norm(before)
    torch._foreach_sub_(before, after)
    return torch.stack(torch._foreach_div(torch._foreach_norm(before), sizes)).mean()
