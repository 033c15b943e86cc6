"""The rows of the suite on disk: <folder>/WORKLOAD.jsonl, a row a run."""

import json
import math
from datetime import date
from importlib import metadata

import torch

from cli import UserError
from runs.files import write_whole
from runs.provenance import environment
from scripts.suite.methods import METHODS

SAME = 0.01  # relative: the scores of one start on two machines


class RowsError(UserError):
    """Rows that are not of this suite."""


def alike(a, b):
    """Whether two rows can be of the same workload: their budget, and their start at one seed."""
    start, other = a["curve"][0][2], b["curve"][0][2]
    same_start = a["seed"] != b["seed"] or math.isclose(start, other, rel_tol=SAME)
    return a["steps"] == b["steps"] and same_start


class Rows:
    """`steps` instead of a workload's own budget, or None."""

    def __init__(self, folder, steps=None):
        self.folder, self.steps = folder, steps

    def read(self):
        """All rows. Raises RowsError for a file that has none."""
        rows = []
        for path in sorted(self.folder.glob("*.jsonl")):
            try:
                rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            except ValueError as error:
                reason = f"{path} holds no rows of the suite ({error}): move it away"
                raise RowsError(reason) from None
        return rows

    def add(self, row):
        """Add a row of `train.run`, with what it was made with. Raises RowsError where the file has
        rows of another budget, or of another start at the same seed: the workload has changed."""
        path = self.folder / f"{row['workload']}.jsonl"
        others = [x for x in self.read() if x["workload"] == row["workload"]]
        if not all(alike(x, row) for x in others):
            raise RowsError(f"{path} has rows of another {row['workload']}, by its steps or its "
                            "score at the start: move it away, or give another --out")  # fmt: skip
        package = METHODS[row["method"]].package
        made = environment(torch.device("cpu")) | {"threads": 1, "numpy": metadata.version("numpy")}
        if package not in (None, "torch"):
            made[package] = metadata.version(package)
        lines = path.read_text(encoding="utf-8") if path.exists() else ""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row | {"date": date.today().isoformat(), "made": made})
        write_whole(path, f"{lines}{line}\n")
