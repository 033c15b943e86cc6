"""The figures of docs/reliability.md, from what was run:

    python -m scripts.crashtest --out results/reliability/kill.json          and with other flags
    python -m scripts.fuzz --out results/reliability/fuzz.json               and atheris.json
    python -m scripts.reliability                                            writes the page
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER, PAGE = ROOT / "results" / "reliability", ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: python -m scripts.reliability -->", "<!-- end of the figures -->"


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def crash(told):
    """The table of one crash test, its command above it."""
    flags = [
        f"--{key}" if value is True else f"--{key} {' '.join(map(str, value))}"
        if isinstance(value, list) else f"--{key} {value}"
        for key, value in told["flags"].items() if value not in (None, False)
    ]  # fmt: skip
    rows = [(r["case"], r["how"], r["hits"], f"{r['equal']} of {r['rounds']}")
            for r in told["reports"]]  # fmt: skip
    moments = {}
    for report in told["reports"]:
        for kind, hits in report["kinds"].items():
            moments[kind] = moments.get(kind, 0) + hits
    hits, equal, rounds = (sum(r[key] for r in told["reports"])
                           for key in ("hits", "equal", "rounds"))  # fmt: skip
    where = ", ".join(f"{kind} {n}" for kind, n in sorted(moments.items()))
    return "\n".join([
        f"`{told['command']} {' '.join(flags)}`: **{hits} hits, {equal} of {rounds} ends equal**, "
        f"torch {told['environment']['torch']}, {told['date'][:10]}. Where they hit: {where}.",
        "", table(("case", "by", "hits", "ends that equal the unbroken run"), rows),
    ])  # fmt: skip


def fuzz(told):
    """The table of the fuzzing."""
    rows = [(r["target"], r["engine"], f"{r['inputs']:,}", f"{r['refused']:,}",
             f"{r['accepted']:,}", len(r["findings"]), f"{r['seconds']:.0f}")
            for r in told["rows"]]  # fmt: skip
    header = ("reader", "engine", "inputs", "refused", "accepted", "findings", "seconds")
    versions = ", ".join(f"{name} {x}" for name, x in told["versions"].items())
    return f"`{told['command']}`, with {versions}:\n\n{table(header, rows)}"


def figures(folder=FOLDER):
    """The text between BEGIN and END."""
    def read(name):
        return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))

    parts = ["### The crash test", *(crash(read(name)) for name in ("kill", "term", "disk")),
             "### The fuzzing", fuzz(read("fuzz")), fuzz(read("atheris"))]  # fmt: skip
    return "\n\n".join(parts)


def main():
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    PAGE.write_text(
        f"{before}{BEGIN}\n\n{figures()}\n\n{END}{rest.split(END)[1]}", encoding="utf-8"
    )


if __name__ == "__main__":
    sys.exit(main())
