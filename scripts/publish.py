"""Copy logs of the table's runs, and figure 3's measurement, to the published ones:
`python -m scripts.publish FROM`.

FROM is the --out of scripts.reproduce. A run counts that came to its end or to --epochs, from a
commit alone. What is published of as many epochs stays. Numbers of a log are rounded to six digits;
what no figure reads is left out, and so is where data and output lay.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json

from cli import Parser, a_path, command
from runs.files import write_whole
from runs.log import read_rows
from scripts import majorisation
from scripts.experiments import SCALES
from scripts.results import Results, epochs_done, log_name


def published(rows, scale):
    """The rows of a log as they are published."""
    run, *rest = rows
    places = {"data_dir": "~/.cache/agd", "out": f"results/{scale}"}
    yield {**run, "flags": run["flags"] | places}
    for row in rest:
        yield {key: float(f"{x:.6g}") if isinstance(x, float) else x
               for key, x in row.items() if key != "images_per_second"}  # fmt: skip


def measured_epochs(results):
    """The epochs after which figure 3 was measured, or 0."""
    measured = majorisation.read(results)
    return measured["run"]["epochs"] if measured else 0


def publish(source, target):
    """Copy from one --out to another; yields the paths of what is new."""
    for scale in SCALES:
        here, there = Results(source, scale), Results(target, scale)
        if measured_epochs(here) > measured_epochs(there):
            path = there.folder / majorisation.FILE
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, (here.folder / majorisation.FILE).read_bytes())
            yield path
        for name in sorted({log_name(row) for row in here.table}):
            log, path = here.log(name), there.log(name)
            if epochs_done(log) <= epochs_done(path):
                continue
            rows = read_rows(log)
            sittings = [{"commit": None, **rows[0]}, *rows[0].get("resumed", [])]
            commits = [x["commit"] or "-modified" for x in sittings if "commit" in x]
            if not rows[-1].get("final") or any(x.endswith("-modified") for x in commits):
                continue
            lines = [json.dumps(row, ensure_ascii=False) for row in published(rows, scale)]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "\n".join([*lines, ""]))
            yield path


def main(argv=None):
    parser = Parser(prog=command("scripts.publish"), description=__doc__)
    parser.add_argument("source", type=a_path, metavar="FROM", help="a folder, such as reproduced")
    parser.add_argument("--out", type=a_path, default="results", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not Path(args.source).is_dir():
        parser.error(f"there is no folder {args.source}")
    for path in publish(Path(args.source), Path(args.out)):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
