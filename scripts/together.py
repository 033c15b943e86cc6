"""Several runs of main.py in one process, on a GPU each in a stream of its own.

    with Host() as start:                         starts scripts/together.py
        run = start(words, output, environment)   with the methods of a runner.Process

Processes of their own take turns on a GPU; runs in one process share what each would leave idle.
The process reads a line of JSON a run, {"run": number, "flags": [...], "output": file}, or
{"stop": true} for all, and answers {"run": number, "code": exit code}. The end of its input means
that the other process is gone, however it went: it ends with it. Where a run cannot record a CUDA
graph, it ends with UNRECORDED: torch before 2.12 replays no other graph after that.
"""

import sys
from pathlib import Path

if not __package__:  # started by its path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import json
import os
import signal
import subprocess
import threading
import traceback

from scripts.runner import UNRECORDED

STREAMS = 32  # the most runs in a process: torch has as many streams


class Host:
    """A process that has several runs at once. The first run starts it, and the next one after it
    died."""

    def __init__(self):
        self.process = None

    def __enter__(self):
        return self.start

    def __exit__(self, *_):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()

    def start(self, words, output, environment):
        """A run of main.py in a thread of the process."""
        if self.process is None or self.process.poll() is not None:
            self.launch(output.with_name("worker.txt"), environment)
        run = Thread(self.process, self.listener)
        run.tell({"run": len(self.runs), "flags": words, "output": str(output)})
        self.runs.append(run)
        return run

    def launch(self, log, environment):
        # A hardware queue for each stream: with the default of 8 streams wait for one another.
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": str(STREAMS), **environment}
        with open(log, "a", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=file, start_new_session=True, env=environment,
            )  # fmt: skip
        self.runs = []
        answers = self.process.stdout, self.runs
        self.listener = threading.Thread(target=self.listen, args=answers, daemon=True)
        self.listener.start()

    @staticmethod
    def listen(answers, runs):
        for line in answers:
            answer = json.loads(line)
            runs[answer["run"]].code = answer["code"]


class Thread:
    """A run of main.py in a thread of a Host's process, with the methods of a runner.Process; to
    stop and to kill concern all runs of the process."""

    def __init__(self, process, listener):
        self.process, self.listener, self.code = process, listener, None

    def tell(self, order):
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:  # the process has ended by itself
            pass

    def poll(self):
        if self.code is None and self.process.poll() is not None:
            self.listener.join()  # all answers are read
            if self.code is None:
                self.code = self.process.returncode
        return self.code

    def stop(self):
        self.tell({"stop": True})

    def kill(self):
        self.process.kill()
        self.process.wait()


class PerThread:
    """A text stream that is another file in every thread that has set `here.file`."""

    here = threading.local()

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(getattr(self.here, "file", self.stream), name)


def serve():
    """The process of a Host."""
    # What a library prints by itself must not come between the answers.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    requests, lock = {}, threading.Lock()  # of the runs that have not ended
    sys.stdout = sys.stderr = PerThread(sys.stderr)
    import main  # once, before threads would do so at the same time
    from training.control import ANNOUNCING, ENDING, Requests
    from training.cuda_graph import FAILURES

    def run(order):
        code = 1
        try:
            with open(order["output"], "a", encoding="utf-8", errors="backslashreplace") as file:
                PerThread.here.file = file
                try:
                    code = main.main(order["flags"], requests[order["run"]])
                except SystemExit as end:  # flags that make no sense
                    code = end.code if isinstance(end.code, int) else 1
                except Exception:
                    traceback.print_exc()
        finally:
            if FAILURES:  # of this run or of another, which made this one fail
                os._exit(UNRECORDED)
            with lock:
                print(json.dumps({"run": order["run"], "code": code}), file=answers, flush=True)
                del requests[order["run"]]

    def stop(*_):
        for each in list(requests.values()):
            each.stop()

    for number in ENDING:
        if number in ENDING[:2] or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)
    for number in ANNOUNCING:
        signal.signal(number, lambda *_: [each.announce() for each in list(requests.values())])
    for line in sys.stdin:
        order = json.loads(line)
        if "stop" in order:
            stop()
            continue
        requests[order["run"]] = Requests(shared=True)
        threading.Thread(target=run, args=(order,), daemon=True).start()  # ends with the process
    os._exit(1 if requests else 0)


if __name__ == "__main__":
    serve()
