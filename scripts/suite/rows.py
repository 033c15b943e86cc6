"""The suite on disk: <folder>/WORKLOAD.jsonl, a row a run, and <folder>/seconds.json."""

import json
import math
from datetime import date
from importlib import metadata

import torch

from cli import UserError
from runs.files import write_whole
from runs.provenance import environment
from scripts.suite.methods import METHODS
from scripts.suite.protocol import task_of
from scripts.suite.train import workload
from scripts.suite.workloads import NAMES

TIMED = "seconds.json"
SAME = 0.01  # relative: the scores of one start on two machines
KEYS = {"workload", "method", "seed", "setting", "steps", "curve", "failed", "date", "made"}


class RowsError(UserError):
    """Rows that are not of this suite."""


class Rows:
    """The rows below a folder. `steps`: the budget of every workload instead of its own."""

    def __init__(self, folder, steps=None):
        self.folder, self.steps = folder, steps
        made = environment(torch.device("cpu"))  # the commit of the code that has been imported
        self.made = made | {"threads": 1, "numpy": metadata.version("numpy")}

    def path(self, name):
        return self.folder / f"{name}.jsonl"

    def read(self, names=NAMES):
        """The rows of these workloads, one of a task. Raises RowsError for a line that is no row,
        and for rows of another budget."""
        rows = {}
        for name in names:
            path = self.path(name)
            lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
            for number, line in enumerate(lines, 1):
                try:
                    row = json.loads(line)
                    fits = row.keys() >= KEYS and row["workload"] == name
                    fits = fits and row["method"] in METHODS
                except (ValueError, AttributeError):
                    fits = False
                if not fits:
                    raise RowsError(f"{path}: line {number} is no row of the suite: delete it")
                if row["steps"] != (self.steps or workload(name).STEPS):
                    raise RowsError(f"{path}: line {number} is a run of {row['steps']} steps, and "
                                    f"the budget of {name} is another: move the file away, or give "
                                    "another --out")  # fmt: skip
                rows.setdefault(task_of(row), row)
        return [*rows.values()]

    def timed(self):
        """{workload: {"seconds": {method: of a step}, "date", "made"}}. Raises RowsError for a file
        that has no such."""
        try:
            timed = json.loads((self.folder / TIMED).read_text(encoding="utf-8"))
            if all(x.keys() == {"seconds", "date", "made"} and
                   all(s > 0 for s in x["seconds"].values()) for x in timed.values()):  # fmt: skip
                return timed
        except FileNotFoundError:
            return {}
        except (ValueError, AttributeError, TypeError):
            pass
        raise RowsError(f"{self.folder / TIMED} has no seconds of steps: delete it")

    def add_timed(self, name, seconds):
        """Keep the seconds of `timing.measure`, and how they were made."""
        seconds = {method: float(f"{x:.4g}") for method, x in seconds.items()}
        new = {"seconds": seconds, "date": date.today().isoformat(), "made": self.made}
        self.folder.mkdir(parents=True, exist_ok=True)
        timed = dict(sorted({**self.timed(), name: new}.items()))
        write_whole(self.folder / TIMED, json.dumps(timed, indent=1) + "\n")

    def add(self, row):
        """Add a row of `train.run`, and how it was made. Raises RowsError where the file has
        another start at the same seed: the workload has changed."""
        path, start = self.path(row["workload"]), row["curve"][0][2]
        others = [x for x in self.read([row["workload"]]) if x["seed"] == row["seed"]]
        if not all(math.isclose(start, x["curve"][0][2], rel_tol=SAME) for x in others):
            raise RowsError(f"{path} has rows of another {row['workload']}, by its score at the "
                            "start: move the file away, or give another --out")  # fmt: skip
        package = METHODS[row["method"]].package
        versions = {package: metadata.version(package)} if package else {}
        row = json.loads(json.dumps(row), parse_float=lambda x: float(f"{float(x):.6g}"))
        row |= {"date": date.today().isoformat(), "made": self.made | versions}
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:  # other commands may add to it, too
            file.write(json.dumps(row) + "\n")
