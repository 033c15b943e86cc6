"""Several runs of main.py in one process, on a GPU each in a stream of its own.

    with Host() as start:                         starts `python -m scripts.together`
        run = start(words, output, environment)   with the methods of a runner.Process

Processes of their own take turns on a GPU; runs in one process share what each would leave idle.
The process reads a line of JSON a run, {"run": number, "flags": [...], "output": file}, or
{"stop": true} for all, and answers {"run": number, "code": exit code}. The end of its input means
that the other process is gone, however it went: it ends with it. Where a run cannot record a CUDA
graph, it ends with UNRECORDED, and Host starts its runs again without graphs.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback

STREAMS = 32  # the most runs in a process: torch has as many streams
UNRECORDED = 3  # torch before 2.12 replays no other graph after a recording that failed


class Host:
    """A process that has several runs at once. The first run starts it, and the next one after it
    died."""

    def __init__(self):
        self.process, self.runs, self.no_graphs = None, [], []

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
        return self.order(Thread(self, words, output, environment))

    def launch(self, log, environment):
        # A hardware queue for each stream: with the default of 8 streams wait for one another.
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": str(STREAMS), **environment}
        environment |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
        with open(log, "a", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scripts.together"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=file, start_new_session=True, env=environment,
            )  # fmt: skip
        self.runs, self.stopping = [], False
        answers = self.process.stdout, self.runs
        self.listener = threading.Thread(target=self.listen, args=answers, daemon=True)
        self.listener.start()

    def order(self, run):
        self.runs.append(run)
        self.tell({"run": len(self.runs) - 1, "flags": [*run.words, *self.no_graphs],
                   "output": str(run.output)})  # fmt: skip
        return run

    def tell(self, order):
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:  # the process has ended by itself
            pass

    @staticmethod
    def listen(answers, runs):
        for line in answers:
            answer = json.loads(line)
            runs[answer["run"]].code = answer["code"]

    def look(self):
        """After the end of the process: start its unfinished runs again, or fail them."""
        code = self.process.poll()
        if code is None:
            return
        self.listener.join()  # all answers are read
        unfinished = [run for run in self.runs if run.code is None]
        again = code == UNRECORDED and not self.no_graphs and not self.stopping
        if again:
            self.no_graphs = ["--cuda_graph", "off"]
            self.launch(unfinished[0].output.with_name("worker.txt"), unfinished[0].environment)
        for run in unfinished:
            if again:
                run.words = [word for word in run.words if word != "--fresh"]
                self.order(run)
            else:
                run.code = code

    def stop(self):
        """Ask all runs to stop after this step; once is enough."""
        if not self.stopping:
            self.tell({"stop": True})
        self.stopping = True

    def kill(self):
        self.process.kill()
        self.process.wait()


class Thread:
    """A run of main.py in a thread of a Host, with the methods of a runner.Process."""

    def __init__(self, host, words, output, environment):
        self.host, self.words, self.output, self.environment = host, words, output, environment
        self.code, self.stop, self.kill = None, host.stop, host.kill  # which concern all of them

    def poll(self):
        if self.code is None:
            self.host.look()
        return self.code

    def wait(self, seconds):
        end = time.monotonic() + seconds
        while self.poll() is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.poll() is not None


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
    alive, requests, unfinished, lock = {}, {}, set(), threading.Lock()
    sys.stdout, sys.stderr = PerThread(sys.stderr), PerThread(sys.stderr)
    import main  # once, before threads would do so at the same time
    from training.control import ANNOUNCING, Requests
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
                except KeyboardInterrupt:  # while it was starting
                    code = 130
                except Exception:
                    traceback.print_exc()
            if FAILURES:  # of this run or of another, which made this one fail
                os._exit(UNRECORDED)
        finally:
            try:
                ended(order["run"], code)
            except KeyboardInterrupt:  # asked in its last moment, and never again
                ended(order["run"], code)

    def ended(number, code):
        with lock:  # from here on it cannot be asked to stop
            alive.pop(number, None)
        with lock:
            print(json.dumps({"run": number, "code": code}), file=answers, flush=True)
            unfinished.discard(number)

    def stop():
        """Ask each run to stop, once; one that is still starting gets a KeyboardInterrupt."""
        for number in list(alive):
            if requests[number].listening:
                requests[number].stop()
            else:
                thread, error = alive.pop(number).ident, ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), error)

    for number in ANNOUNCING:
        signal.signal(number, lambda *_: [each.announce() for each in list(requests.values())])
    for line in sys.stdin:
        order = json.loads(line)
        with lock:
            if "stop" in order:
                stop()
                continue
            # A daemon: it ends with the process.
            thread = threading.Thread(target=run, args=(order,), daemon=True)
            alive[order["run"]], requests[order["run"]] = thread, Requests(shared=True)
            unfinished.add(order["run"])
            thread.start()
    os._exit(1 if unfinished else 0)


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):  # whatever they were inherited as
        signal.signal(ending, signal.default_int_handler)
    serve()
