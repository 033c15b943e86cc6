"""Copy logs of runs that have ended to the published ones: `python -m scripts.publish FROM`.

FROM is the --out of scripts.reproduce. Numbers of epochs are rounded to six digits, paths of this
machine become main.py's defaults. A log of as many epochs stays as it is.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json

from cli import Parser, a_path, command
from runs.files import write_whole
from runs.log import read_rows
from scripts.experiments import SCALES
from scripts.results import epochs_done


def published(rows, out):
    """The rows of a log as they are published under the folder `out`."""
    run, *rest = rows
    run = {**run, "flags": {**run["flags"], "data_dir": "~/.cache/agd", "out": out}}
    return [run, *({key: float(f"{x:.6g}") if isinstance(x, float) else x
                    for key, x in row.items()} for row in rest)]  # fmt: skip


def publish(source, target):
    """Copy from one --out to another; yields the paths of the new logs."""
    for path in sorted(path for scale in SCALES for path in source.glob(f"{scale}/logs/*.jsonl")):
        there, rows = target / path.relative_to(source), read_rows(path)
        if rows[-1]["kind"] == "end" and epochs_done(there) < epochs_done(path):
            lines = [json.dumps(row, ensure_ascii=False)
                     for row in published(rows, there.parent.parent.as_posix())]  # fmt: skip
            there.parent.mkdir(parents=True, exist_ok=True)
            write_whole(there, "\n".join([*lines, ""]))
            yield there


def main(argv=None):
    parser = Parser(prog=command("scripts.publish"), description=__doc__)
    parser.add_argument("source", type=a_path, metavar="FROM", help="as in reproduced")
    parser.add_argument("--out", type=a_path, default="results", help="(default: %(default)s)")
    args = parser.parse_args(argv)
    if not Path(args.source).is_dir():
        parser.error(f"there is no folder {args.source}")
    for path in publish(Path(args.source), Path(args.out)):
        print(path)


if __name__ == "__main__":
    sys.exit(main())
