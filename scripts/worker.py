"""Runs of main.py that end with the process that started them.

    python -m scripts.worker FLAGS     one run
    python -m scripts.worker           several, each in a thread of its own, in one process: on a
                                       GPU they share what each would leave idle

The standard input is a pipe that nobody else holds; its end means that the other process is gone,
however it went. For one run, a byte asks it to stop after this step, as Ctrl-C would. For several,
a line of JSON starts a run, {"run": number, "flags": [...], "output": file}, or stops them all,
{"stop": true}; the standard output has {"run": number, "code": exit code} of each that has ended.
When one of several cannot record a CUDA graph, the process ends with UNRECORDED.
"""

import _thread
import ctypes
import json
import os
import signal
import sys
import threading
import traceback

from training.control import ANNOUNCING, Requests

UNRECORDED = 3  # torch before 2.12 replays no other graph after a recording that failed


def watch():
    while os.read(0, 1):
        _thread.interrupt_main(signal.SIGINT)
    os._exit(1)


def one():
    requests = Requests()
    requests.install()
    try:
        threading.Thread(target=watch, daemon=True).start()
        import main as program

        return program.main(sys.argv[1:], requests)
    except KeyboardInterrupt:  # while it was starting
        return 130


class PerThread:
    """A text stream that is another file in every thread that has set `here.file`."""

    here = threading.local()

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(getattr(self.here, "file", self.stream), name)


def several():
    # What a library prints by itself must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    alive, requests, unfinished, lock = {}, {}, set(), threading.Lock()
    sys.stdout, sys.stderr = PerThread(sys.stderr), PerThread(sys.stderr)
    import main as program  # once, before threads would do so at the same time
    import training.cuda_graph as replay

    def run(order):
        code = 1
        try:
            with open(order["output"], "a", encoding="utf-8", errors="backslashreplace") as file:
                PerThread.here.file = file
                try:
                    code = program.main(order["flags"], requests[order["run"]])
                except SystemExit as end:  # flags that make no sense
                    code = end.code if isinstance(end.code, int) else 1
                except KeyboardInterrupt:  # while it was starting
                    code = 130
                except Exception:
                    traceback.print_exc()
            if replay.FAILURES:  # of this run or of another, which has made this one fail
                os._exit(UNRECORDED)
        finally:
            try:
                ended(order["run"], code)
            except KeyboardInterrupt:  # asked in its last moment, and never again
                ended(order["run"], code)

    def announced(signum, frame):
        for each in list(requests.values()):
            each.announce()

    def ended(number, code):
        with lock:  # from here on it cannot be asked to stop
            alive.pop(number, None)
        with lock:
            print(json.dumps({"run": number, "code": code}), file=answers, flush=True)
            unfinished.discard(number)

    for number in ANNOUNCING:
        signal.signal(number, announced)
    for line in sys.stdin:
        order = json.loads(line)
        if "stop" in order:
            with lock:  # each is asked once
                for number in list(alive):
                    if requests[number].listening:
                        requests[number].stop()
                        continue
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(
                        ctypes.c_ulong(alive.pop(number).ident), ctypes.py_object(KeyboardInterrupt)
                    )
            continue
        # A daemon: it ends with the process.
        thread = threading.Thread(target=run, args=(order,), daemon=True)
        with lock:
            alive[order["run"]], requests[order["run"]] = thread, Requests(shared=True)
            unfinished.add(order["run"])
            thread.start()
    os._exit(1 if unfinished else 0)


def main():
    for ending in (signal.SIGINT, signal.SIGTERM):  # whatever they were inherited as
        signal.signal(ending, signal.default_int_handler)
    return one() if len(sys.argv) > 1 else several()


if __name__ == "__main__":
    sys.exit(main())
