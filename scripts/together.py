"""Several runs of main.py in one process, on a GPU each in a stream of its own.

    with Host() as start:                         starts `python -m scripts.together`
        run = start(words, output, environment)   with the methods of a runner.Process

Processes of their own take turns on a GPU; the runs of one process share what each would leave
idle. This process gets a line of JSON a run, {"run": number, "flags": [...], "output": file}, or
{"stop": true} for all of them, and answers {"run": number, "code": exit code} at each end. The end
of its input means that the other process is gone, however it went: it ends with it.

Where one run cannot record a CUDA graph, the process ends with UNRECORDED, and Host starts its runs
again without graphs.
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
    """A process that has several runs at once. It starts with the first run, and again after it
    died."""

    def __init__(self):
        self.process, self.runs, self.graphs = None, [], True

    def __enter__(self):
        return self.start

    def __exit__(self, *_):
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()

    def start(self, words, output, environment):
        """A run of main.py in a thread of the process."""
        if self.process is None or self.process.poll() is not None:
            self._launch(output.with_name("worker.txt"), environment)
        run = Thread(self, words, output, environment)
        self._order(run)
        return run

    def _launch(self, log, environment):
        # A hardware queue for each stream: with the default of 8 streams wait for one another.
        environment = {"CUDA_DEVICE_MAX_CONNECTIONS": str(STREAMS), "PYTHONIOENCODING": "utf-8",
                       **environment, "PYTHONUNBUFFERED": "1"}  # fmt: skip
        with open(log, "a", encoding="utf-8") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "scripts.together"], stdin=subprocess.PIPE,
                stdout=subprocess.PIPE, stderr=file, start_new_session=True, env=environment,
            )  # fmt: skip
        self.runs, self.stopping = [], False
        arguments = self.process, self.runs
        self.listener = threading.Thread(target=self._listen, args=arguments, daemon=True)
        self.listener.start()

    def _order(self, run):
        words = run.words if self.graphs else [*run.words, "--cuda_graph", "off"]
        self.runs.append(run)
        self.tell({"run": len(self.runs) - 1, "flags": words, "output": str(run.output)})

    def tell(self, order):
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except OSError:  # the process has ended by itself
            pass

    @staticmethod
    def _listen(process, runs):
        for line in process.stdout:
            answer = json.loads(line)
            runs[answer["run"]].code = answer["code"]

    def look(self):
        """Where the process has ended: its unfinished runs start again, or have ended with it."""
        code = self.process.poll()
        if code is None:
            return
        self.listener.join()  # all answers are read
        unfinished = [run for run in self.runs if run.code is None]
        if code == UNRECORDED and self.graphs and not self.stopping:
            self.graphs = False
            self._launch(unfinished[0].output.with_name("worker.txt"), unfinished[0].environment)
            for run in unfinished:
                run.words = [word for word in run.words if word != "--fresh"]
                self._order(run)
        else:
            for run in unfinished:
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
    """A run of main.py in a thread of a Host."""

    def __init__(self, host, words, output, environment):
        self.host, self.words, self.output, self.environment = host, words, output, environment
        self.code, self.stop, self.kill = None, host.stop, host.kill  # of all the others, too

    def poll(self):
        """The exit code, or None while it runs."""
        if self.code is None:
            self.host.look()
        return self.code

    def wait(self, seconds):
        """Whether it ends within that time."""
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


class Worker:
    """The process of a Host."""

    def __init__(self):
        # What a library prints by itself must not come between the answers.
        self.answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        sys.stdout, sys.stderr = PerThread(sys.stderr), PerThread(sys.stderr)
        self.alive, self.requests, self.unfinished = {}, {}, set()
        self.lock = threading.Lock()

    def serve(self):
        import main  # noqa: F401 (once, before threads would do so at the same time)
        from training.control import ANNOUNCING, Requests

        for number in ANNOUNCING:
            signal.signal(number, lambda *_: [x.announce() for x in list(self.requests.values())])
        for line in sys.stdin:
            order = json.loads(line)
            with self.lock:
                if "stop" in order:
                    self.stop()
                    continue
                number = order["run"]
                # A daemon: it ends with the process.
                self.alive[number] = threading.Thread(target=self.run, args=(order,), daemon=True)
                self.requests[number] = Requests(shared=True)
                self.unfinished.add(number)
                self.alive[number].start()
        os._exit(1 if self.unfinished else 0)

    def stop(self):
        """Ask each run to stop, once: one that is still starting gets a KeyboardInterrupt."""
        for number in list(self.alive):
            if self.requests[number].listening:
                self.requests[number].stop()
            else:
                thread = ctypes.c_ulong(self.alive.pop(number).ident)
                error = ctypes.py_object(KeyboardInterrupt)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(thread, error)

    def run(self, order):
        import main
        import training.cuda_graph

        code = 1
        try:
            with open(order["output"], "a", encoding="utf-8", errors="backslashreplace") as file:
                PerThread.here.file = file
                try:
                    code = main.main(order["flags"], self.requests[order["run"]])
                except SystemExit as end:  # flags that make no sense
                    code = end.code if isinstance(end.code, int) else 1
                except KeyboardInterrupt:  # while it was starting
                    code = 130
                except Exception:
                    traceback.print_exc()
            if training.cuda_graph.FAILURES:  # of this run or of another, which made this one fail
                os._exit(UNRECORDED)
        finally:
            try:
                self.ended(order["run"], code)
            except KeyboardInterrupt:  # asked in its last moment, and never again
                self.ended(order["run"], code)

    def ended(self, number, code):
        with self.lock:  # from here on it cannot be asked to stop
            self.alive.pop(number, None)
        with self.lock:
            print(json.dumps({"run": number, "code": code}), file=self.answers, flush=True)
            self.unfinished.discard(number)


if __name__ == "__main__":
    for ending in (signal.SIGINT, signal.SIGTERM):  # whatever they were inherited as
        signal.signal(ending, signal.default_int_handler)
    Worker().serve()
