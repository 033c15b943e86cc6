"""The rows of the suite on disk: <folder>/WORKLOAD.jsonl, a row a run."""

import json
import math
import platform
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
                raise RowsError(f"{path} holds no rows of the suite ({error}): move it away") from None
        return rows

    def add(self, row):
        """Add a row of `train.run`, with what it was made with. Raises RowsError where the file has
        rows of another budget, or of another start at the same seed: the workload has changed."""
        path = self.folder / f"{row['workload']}.jsonl"
        for other in self.read():
            if other["workload"] == row["workload"]:
                same = other["steps"] == row["steps"] and (other["seed"] != row["seed"] or math.isclose(
                    other["curve"][0][2], row["curve"][0][2], rel_tol=SAME))
                if not same:
                    raise RowsError(f"{path} has rows of another {row['workload']}, by its steps or "
                                    "its score at the start: move it away, or give another --out")
        package = METHODS[row["method"]].package
        made = environment(torch.device("cpu")) | {"threads": 1, "numpy": metadata.version("numpy")}
        if package:
            made[package] = metadata.version(package)
        lines = path.read_text(encoding="utf-8") if path.exists() else ""
        self.folder.mkdir(parents=True, exist_ok=True)
        line = json.dumps(row | {"date": date.today().isoformat(), "made": made})
        write_whole(path, f"{lines}{line}\n")
