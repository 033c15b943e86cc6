"""Serve a page with the curves of all runs below a folder: `python -m scripts.watch output`.

It follows runs while they train: losses, accuracies and eta over epochs or seconds, their settings,
and which are training, finished, stopped or stalled (no row for two minutes and three epochs). New
logs of main.py appear by themselves. The page is served to this machine alone, which means to all
who have an account on it; `ssh -L 8423:127.0.0.1:8423 HOST` brings that of another machine here,
under the same address. With --html it is a file to keep or send, with its data, and nothing runs.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import argparse
import threading
import webbrowser

from cli import Parser, UserError, a_path, command, interruptible, number, printable
from runs.files import cannot, write_whole
from scripts.watch.reading import Runs
from scripts.watch.server import PORT, page, serving


def parse(argv=None):
    """(the parser, the arguments)."""
    parser = Parser(prog=command("scripts.watch"), description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    add = parser.add_argument
    add("folder", nargs="?", type=a_path, default="output", metavar="FOLDER",
        help="main.py's --out, or a folder above it (default: %(default)s)")
    add("--port", type=number(int, 0, 65535), metavar="N",
        help=f"0: any that is free (default: the first free one from {PORT} on)")
    add("--open", action="store_true", help="open the page in this machine's browser")
    add("--html", type=a_path, metavar="FILE", help="write the page there, and serve nothing")
    args = parser.parse_args(argv)
    if args.html is not None:
        parser.refuse(argv, dict.fromkeys(("port", "open"), "is for a page that is served"))
    return parser, args


def main(argv=None):
    """Run the command line; returns the exit code."""
    parser, args = parse(argv)
    if not Path(args.folder).is_dir():
        begin = command("main", "--dataset", "digits", "--out", args.folder)
        parser.error(f"there is no folder {args.folder}: `{begin}` makes one, with a run in it")
    try:
        interruptible()
        return serve(args) if args.html is None else write(args)
    except KeyboardInterrupt:
        return 0 if args.html is None else 130
    except UserError as error:
        parser.error(str(error))


def serve(args):
    """Serve the page until a signal ends it."""
    with serving(Runs(args.folder), args.port) as server:
        print(f"{server.address} shows the runs in {printable(args.folder)}; Ctrl-C ends it")
        threading.Thread(target=server.runs.changes, daemon=True).start()  # read before it is asked
        if args.open:
            webbrowser.open(server.address)
        server.serve_forever()


def write(args):
    """Write the page as one file; returns the exit code."""
    runs = Runs(args.folder)
    data = runs.changes()
    if not data["ids"]:
        raise UserError(f"there is no log of a run in {args.folder}, nor below it")
    try:
        data["details"] = {name: runs.details(name) for name in data["ids"]}
        write_whole(args.html, page(data)[0])
    except OSError as error:
        raise UserError(cannot(args.html, "written", error)) from error
    print(f"Written: {printable(args.html)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
