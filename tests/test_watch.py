"""`python -m scripts.watch`: its data over sockets, and its page in a browser."""

import contextlib
import errno
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import main as program
from cli import UserError
from scripts import plot
from scripts.watch import __main__ as watch
from scripts.watch import reading
from scripts.watch.server import Handler, page, serving
from tests.conftest import ROOT

posix = pytest.mark.skipif(os.name != "posix", reason="Windows has no such files")
EVIL = "</script><img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="session")
def log(tmp_path_factory):
    """The lines of the log of a run, with a row a step."""
    out = tmp_path_factory.mktemp("real")
    assert program.main(["--dataset", "digits", "--depth", "2", "--width", "8", "--epochs", "3",
                         "--log_steps", "--out", str(out)]) == 0  # fmt: skip
    (path,) = (out / "logs").glob("*.jsonl")
    return path.read_text().splitlines(keepends=True)


def write(path, lines, **settings):
    """A log of these lines, with other settings in its first row."""
    first = json.loads(lines[0])
    first["settings"] |= settings
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(first) + "\n" + "".join(lines[1:]))
    return path


def epoch(number, **values):
    row = {"kind": "epoch", "epoch": number, "train_loss": 1 / number, "train_acc": 0.5,
           "test_loss": 2 / number, "test_acc": 0.25, "eta_min": 0.1, "eta_mean": 0.2,
           "eta_max": 0.4, "seconds": 1.5}  # fmt: skip
    return json.dumps(row | values) + "\n"


@pytest.fixture
def at_once(monkeypatch):
    """Have the files looked at whenever they are asked for."""
    monkeypatch.setattr(reading, "LOOK", 0)
    monkeypatch.setattr(reading, "DUTY", math.inf)


@contextlib.contextmanager
def served(folder):
    with serving(reading.Runs(folder), 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server(at_once, tmp_path):
    (tmp_path / "runs").mkdir()
    with served(tmp_path / "runs") as server:
        yield server


def raw(server, text):
    """(code, headers, body) of the answer to the bytes of a request."""
    with socket.create_connection(server.server_address, timeout=10) as client:
        client.sendall(text.encode())
        client.shutdown(socket.SHUT_WR)
        answer = b"".join(iter(lambda: client.recv(65536), b""))
    head, _, body = answer.partition(b"\r\n\r\n")
    code, *headers = head.decode().split("\r\n")
    return int(code.split()[1]), dict(x.split(": ", 1) for x in headers), body.decode()


def get(server, place="/runs", method="GET", host=None):
    host = host or f"127.0.0.1:{server.server_address[1]}"
    return raw(server, f"{method} {place} HTTP/1.1\r\nHost: {host}\r\n\r\n")


def data(server, since=""):
    """What has changed since a version, strict JSON, or None."""
    code, _, body = get(server, f"/runs?since={since}")
    assert code in (200, 204)

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    return json.loads(body, parse_constant=refuse) if code == 200 else None


def only(answer):
    (run,) = answer["runs"].values()
    return run


def test_a_log_is_followed_row_by_row(server, tmp_path, log, monkeypatch):
    path = write(tmp_path / "runs" / "a" / "logs" / "x.jsonl", log[:1])
    answer = data(server)
    run = only(answer)
    assert (run["folder"], run["name"], run["done"], run["total"]) == ("a", "x", 0, 3)
    assert run["words"]["network"] == ["FCN 2×8", False] and run["rows"]["epoch"] == []
    assert data(server, answer["version"]) is None  # 204: nothing has changed

    rows = [json.loads(line) for line in log]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    path.write_text("".join(log))
    answer = data(server, answer["version"])
    run = only(answer)
    assert run["end"] == {"stopped": None, "final": True} and run["done"] == 3
    for key in ("train_loss", "test_acc", "eta_mean", "eta_max"):
        assert run["rows"][key] == pytest.approx([row[key] for row in epochs], rel=1e-4)
    seconds = [sum(row["seconds"] for row in epochs[: i + 1]) for i in range(3)]
    assert run["rows"]["seconds"] == pytest.approx(seconds, rel=1e-3)
    steps = [row for row in rows if row["kind"] == "step"]
    assert run["steps"]["loss"] == pytest.approx([row["loss"] for row in steps], rel=1e-4)
    assert run["steps"]["epoch"][-1] == 3 and run["steps"]["epoch"][0] == pytest.approx(1 / 12)

    # What was read is not read again: were it, this would be no log.
    with open(path, "r+b") as file:
        file.seek(len(log[0]))
        file.write(b"#" * 20)
        file.seek(0, os.SEEK_END)
        file.write((epoch(4) + epoch(5)[:30]).encode())
    answer = data(server, answer["version"])
    run = only(answer)
    assert run["rows"]["from"] == 3 and run["rows"]["epoch"] == [4] and run["end"] is None
    assert run["steps"]["from"] == len(steps) and "ids" not in answer
    with open(path, "a") as file:
        file.write(epoch(5)[30:].rstrip())  # the line is whole, its end is not there
    answer = data(server, answer["version"])
    assert only(answer)["rows"]["epoch"] == [5]

    def refuse(*args):
        raise AssertionError("a file was opened")

    monkeypatch.setattr(reading, "opened", refuse)
    assert data(server, answer["version"]) is None


@pytest.mark.parametrize("how", ["cut", "in place", "replaced", "of the same size"])
def test_a_log_that_is_written_anew_is_read_anew(how, server, tmp_path, log):
    path = write(tmp_path / "runs" / "x.jsonl", [log[0], epoch(1), epoch(2), epoch(3)])
    version = data(server)["version"]
    text = path.read_text()
    if how == "cut":
        os.truncate(path, len(text) - len(epoch(3)))
        epochs = [1, 2]
    elif how == "in place":  # longer than before, and other rows
        path.write_text(text.replace("0.25", "0.75") + epoch(4))
        epochs = [1, 2, 3, 4]
    else:  # as a run that goes on does it
        epochs = [1, 2] if how == "replaced" else [1, 2, 3]
        text = "".join(text.splitlines(keepends=True)[: len(epochs) + 1])
        other = tmp_path / "other"
        other.write_text(text.replace("0.25", "0.75", 1).replace('"epochs": 3', '"epochs": 9'))
        os.replace(other, path)
    run = only(data(server, version))
    assert run["total"] == (3 if how in ("cut", "in place") else 9)
    assert run["rows"]["from"] == 0 and run["rows"]["epoch"] == epochs
    assert run["rows"]["seconds"] == [1.5 * i for i in epochs]
    assert run["rows"]["test_acc"][0] == (0.25 if how == "cut" else 0.75)


def test_runs_come_and_go(server, tmp_path, log):
    first = data(server)
    assert first["ids"] == [] and "--dataset digits" in first["begin"]
    a = write(tmp_path / "runs" / "a.jsonl", log)
    write(tmp_path / "runs" / "deep" / "er" / "logs" / "b.jsonl", log)
    second = data(server, first["version"])
    assert len(second["ids"]) == 2
    assert {run["folder"] for run in second["runs"].values()} == {"", "deep/er"}
    a.unlink()
    third = data(server, second["version"])
    assert len(third["ids"]) == 1 and third["runs"] == {}
    # A page of an earlier server has another version, and gets all.
    assert data(server, "00000000-1")["runs"].keys() == {*third["ids"]}
    assert data(server, "x" * 5000)["runs"].keys() == {*third["ids"]}


@posix
def test_a_folder_that_becomes_a_link_is_not_followed(server, tmp_path, log):
    """Between two searches for new files, too, which are far apart in a large folder."""
    path = write(tmp_path / "runs" / "a" / "x.jsonl", log[:1])
    write(tmp_path / "outside" / "x.jsonl", log, arch="secret")
    answer = data(server)
    server.runs.next_walk = math.inf
    path.parent.rename(tmp_path / "runs" / "b")
    path.parent.symlink_to(tmp_path / "outside")
    (name,) = answer["ids"]
    assert get(server, f"/run?id={name}")[0] == 404
    answer = data(server, answer["version"])
    assert answer["runs"] == {} and answer["notes"] == ["a/x.jsonl: it is a link, or no file"]


@posix
def test_the_folder_itself_may_be_a_link(at_once, tmp_path, log):
    write(tmp_path / "real" / "x.jsonl", log)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with served(tmp_path / "link") as server:
        assert only(data(server))["done"] == 3


@posix
def test_what_is_no_log_is_left_out_and_named(server, tmp_path, log, monkeypatch):
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    write(runs / "good.jsonl", log)
    write(outside / "secret.jsonl", log)
    (runs / "link.jsonl").symlink_to(outside / "secret.jsonl")
    (runs / "folder").symlink_to(outside)
    (runs / "loop").symlink_to(runs)
    (runs / "ring.jsonl").symlink_to(runs / "ring.jsonl")
    write(runs / ".hidden" / "x.jsonl", log)
    os.mkfifo(runs / "pipe.jsonl")
    (runs / "directory.jsonl").mkdir()
    for name, content in {
        "empty": "", "text": "text\n", "list": "[1]\n", "zeros": "\0" * 99, "deep": "[" * 99999,
        "other": '{"workload": "gpt"}\n', "odd": f"{log[0]}{{\n{log[2]}",
        "long": "x" * (reading.LONGEST + 1), "bytes": "\udcff\n",
    }.items():  # fmt: skip
        (runs / f"{name}.jsonl").write_text(content, errors="surrogateescape")
    monkeypatch.setattr(reading, "LARGEST", 2**21)
    write(runs / "large.jsonl", [log[0], *map(epoch, range(1, 12000))])
    with open(runs / "huge.jsonl", "w") as file:
        file.truncate(2**40)  # a file of holes
    answer = data(server)
    assert only(answer)["name"] == "good"
    links, notes = answer["notes"][:2], answer["notes"][2:]
    assert links == ["folder/: it is a link", "loop/: it is a link"]
    notes = dict(note.split(".jsonl: ", 1) for note in notes)
    assert notes.keys() == {"link", "pipe", "empty", "text", "list", "zeros", "deep", "other",
                            "odd", "long", "bytes", "huge", "large", "ring"}  # fmt: skip
    assert notes["link"] == notes["ring"] == notes["pipe"] == "it is a link, or no file"
    assert notes["large"] == notes["huge"] == "it has over 2 MiB"
    assert notes["long"] == "line 1 is too long" and "line 2" in notes["odd"]
    assert "secret" not in json.dumps(answer)
    # One that becomes a log is shown.
    write(runs / "text.jsonl", log)
    assert len(data(server, answer["version"])["ids"]) == 2


def test_any_values_are_a_page(server, tmp_path, log):
    """What JSON can hold, in settings and rows; no name or value is markup."""
    runs = tmp_path / "runs"
    odd = "NaN", "Infinity", "1e999", "-1e999", "1" + "0" * 400, "null"
    rows = [epoch(i).replace("0.2,", f"{value},").replace("1.5", value if value != "null" else "0")
            for i, value in enumerate(odd, 1)]  # fmt: skip
    write(runs / "numbers.jsonl", [log[0], *rows])
    name = "run<img src=x onerror=alert(1)>.jsonl" if os.name == "posix" else "run.jsonl"
    write(runs / name, log, arch=EVIL, optimizer="\ud800", seed=EVIL, later={"a": [EVIL]})
    write(runs / "types.jsonl", log, arch=[1], gain="much", train_bs=[], loss={}, dataset=7)
    answer = data(server)
    numbers, evil, types = sorted(answer["runs"].values(), key=lambda run: run["name"])
    assert numbers["rows"]["eta_mean"] == [None] * 6 and numbers["done"] == 6
    assert EVIL[:40] in json.dumps(evil["words"]) and types["words"] == {"name": ["types", False]}
    target = tmp_path / "page.html"
    assert watch.main([str(runs), "--html", str(target)]) == 0
    text = target.read_text()
    assert text.count("<script") == page()[0].count("<script")
    content = re.search(r'<script id="data"[^>]*>(.*?)</script>', text, re.S)[1]
    assert len(json.loads(content)["runs"]) == 3 and "<" not in content
    details = json.loads(content)["details"]
    assert any(x["first"]["settings"].get("seed") == EVIL for x in details.values())


def test_no_number_of_a_log_takes_the_page_from_others(server, tmp_path, log):
    runs = tmp_path / "runs"
    largest = sys.float_info.max  # to five digits it is more than a number can be
    for key in ("train_loss", "eta_max", "seconds"):
        for i, huge in enumerate((10**400, largest, -largest)):
            write(runs / f"{key}{i}.jsonl", [log[0], *(epoch(n, **{key: huge}) for n in (1, 2))])
    for key in ("epoch", "step"):
        row = {"kind": "step", "epoch": 1, "step": 1, "loss": 0.5, key: 10**400}
        write(runs / f"{key}.jsonl", [log[0], json.dumps(row)])
    settings = log[0].replace('"settings": {', '"settings": {"later": 1e999, ')
    (runs / "settings.jsonl").write_text(settings + epoch(1))
    write(runs / "good.jsonl", log)
    answer = data(server)
    ids = {run["name"]: name for name, run in answer["runs"].items()}
    assert {"good", "settings"} <= ids.keys() and len(ids) + len(answer["notes"]) == 13
    details = json.loads(get(server, f"/run?id={ids['settings']}")[2])
    assert details["first"]["settings"]["later"] is None
    assert watch.main([str(runs), "--html", str(tmp_path / "page.html")]) == 0


def test_seconds_never_fall(server, tmp_path, log):
    rows = [epoch(1), epoch(2, seconds=-9), epoch(3, seconds=1e308), epoch(4, seconds=1e308)]
    write(tmp_path / "runs" / "x.jsonl", [log[0], *rows])
    run = only(data(server))
    assert run["rows"]["seconds"] == sorted(run["rows"]["seconds"]) and run["patience"] < 1e12


def test_a_file_that_could_not_be_read_is_tried_again(server, tmp_path, log, monkeypatch):
    """A finished run changes no more; a network file system may fail for a moment."""
    write(tmp_path / "runs" / "x.jsonl", log)
    own = reading.opened

    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(reading, "opened", fail)
    answer = data(server)
    assert answer["runs"] == {} and answer["notes"] == ["x.jsonl: Input/output error"]
    assert data(server, answer["version"]) is None  # no news
    monkeypatch.setattr(reading, "opened", own)
    assert only(data(server, answer["version"]))["done"] == 3


def test_a_run_that_takes_the_place_of_another_comes_whole(server, tmp_path, log, monkeypatch):
    monkeypatch.setattr(reading, "RUNS", 1)
    a, b = (write(tmp_path / "runs" / f"{name}.jsonl", [log[0], epoch(1)]) for name in "ab")
    answer = data(server)
    assert only(answer)["name"] == "a"
    a.unlink()
    with open(b, "a") as file:
        file.write(epoch(2))
    run = only(data(server, answer["version"]))
    assert (run["name"], run["rows"]["from"], run["rows"]["epoch"]) == ("b", 0, [1, 2])


def test_a_run_of_any_length_takes_bounded_memory(server, tmp_path, log, monkeypatch):
    monkeypatch.setattr(reading, "POINTS", 64)
    path = write(tmp_path / "runs" / "x.jsonl", [log[0], *map(epoch, range(1, 1001))])
    run = only(answer := data(server))
    assert run["done"] == 1000 and run["last"]["epoch"] == 1000
    shown = run["rows"]["epoch"]
    assert 32 <= len(shown) <= 64 and {b - a for a, b in zip(shown, shown[1:])} == {16}
    with open(path, "a") as file:
        file.writelines(map(epoch, range(1001, 1100)))
    run = only(data(server, answer["version"]))  # halved: all rows anew
    assert run["rows"]["from"] == 0 and run["rows"]["epoch"][1] == 33
    monkeypatch.setattr(reading, "RUNS", 3)
    for i in range(5):
        write(tmp_path / "runs" / f"{i}.jsonl", log)
    answer = data(server)
    assert len(answer["ids"]) == 3 and answer["notes"] == ["3 runs beyond 3"]


def test_details_are_the_first_row_and_a_command(server, tmp_path, log):
    write(tmp_path / "runs" / "x.jsonl", log)
    (name,) = data(server)["ids"]
    details = json.loads(get(server, f"/run?id={name}")[2])
    assert details["first"] == json.loads(log[0])
    words = details["command"].split()
    assert {"--dataset=digits", "--depth=2", "--epochs=3", "--log_steps=all", "--out"} <= {*words}
    (tmp_path / "runs" / "x.jsonl").unlink()
    assert get(server, f"/run?id={name}")[0] == 404


def test_only_this_machine_is_answered_under_its_own_names(server):
    assert server.server_address[0] == "127.0.0.1"
    port = server.server_address[1]
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"LOCALHOST:{port}"):
        assert get(server, "/", host=host)[0] == 200
    for host in ("127.0.0.1", "evil.example", f"evil.example:{port}", f"127.0.0.1:{port + 1}",
                 f"127.0.0.1:{port}.evil.example", "", f"[::1]:{port}"):  # fmt: skip
        assert raw(server, f"GET /runs HTTP/1.1\r\nHost: {host}\r\n\r\n")[0] == 403, host
    own = f"Host: 127.0.0.1:{port}\r\n"
    assert raw(server, "GET /runs HTTP/1.1\r\n\r\n")[0] == 403
    assert raw(server, f"GET /runs HTTP/1.1\r\n{own}Host: evil.example\r\n\r\n")[0] == 403
    body = f"GET /runs HTTP/1.1\r\n{own}\r\n"
    for head in (f"POST / HTTP/1.1\r\n{own}", f"GET / HTTP/1.1\r\n{own}"):
        code, headers, _ = raw(server, f"{head}Content-Length: {len(body)}\r\n\r\n{body}")
        assert code in (400, 405) and headers["Connection"] == "close"


def test_a_browser_leaves_out_port_80(at_once, tmp_path):
    try:
        server = serving(reading.Runs(tmp_path), 80)
    except UserError:
        pytest.skip("port 80 is taken, or for administrators")
    with server:
        threading.Thread(target=server.handle_request).start()
        assert get(server, host="localhost")[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "TRACE", "PATCH", "X"])
def test_other_methods_are_refused(method, server):
    code, headers, body = get(server, "/runs", method)
    assert code == 405 and headers["Allow"] == "GET, HEAD" and "version" not in body


@pytest.mark.parametrize("place", [
    "/../secret", "/%2e%2e/secret", "/..%2fsecret", "//etc/passwd", "/etc/passwd", "/page.html",
    "/./runs", "/runs/../secret", "/run?id=../secret", "/run?id=/etc/passwd", "/run?id=%00",
    "/run", "/run?id=", "/favicon.ico", "file:///etc/passwd", "http://127.0.0.1/etc/passwd", "*",
    "../secret", "/run?" + "&".join(f"a{i}=1" for i in range(3000)), "/\xff",
])  # fmt: skip
def test_no_part_of_a_request_names_a_file(place, server, tmp_path):
    (tmp_path / "secret").write_text("secret")
    code, _, body = get(server, place)
    assert code == 404 and "secret" not in body and "root:" not in body


def test_every_answer_has_the_headers(server, tmp_path, log):
    write(tmp_path / "runs" / "x.jsonl", log)
    answers = [get(server, place) for place in ("/", "/runs", "/no")] + [get(server, host="x")]
    version = data(server)["version"]
    answers += [get(server, f"/runs?since={version}"), get(server, "/", "HEAD")]
    answers += [get(server, "/", "X")]
    assert [code for code, *_ in answers] == [200, 200, 404, 403, 204, 200, 405]
    for _, headers, _ in answers:
        assert headers["Cache-Control"] == "no-store" and not any("Allow-" in x for x in headers)
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert headers["Referrer-Policy"] == "no-referrer"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy
    head = answers[5]
    assert head[2] == "" and int(head[1]["Content-Length"]) == len(page()[0].encode())


def test_clients_that_hang_or_leave_hold_nobody_up(server, monkeypatch, capfd):
    assert 10 < Handler.timeout < 60  # longer than between two questions of a page
    monkeypatch.setattr(Handler, "timeout", 0.3)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(socket.create_connection(server.server_address, timeout=10))
                  for _ in range(20)]  # fmt: skip
        for client in silent[::2]:
            client.sendall(b"GET /runs HTT")
        assert get(server)[0] == 200
        assert {client.recv(100) for client in silent} == {b""}  # they are let go
    gone = socket.create_connection(server.server_address)
    gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    gone.sendall(f"GET / HTTP/1.1\r\nHost: localhost:{server.server_address[1]}\r\n\r\n".encode())
    gone.close()
    assert get(server)[0] == 200 and capfd.readouterr().err == ""


@pytest.fixture
def start():
    """f(*words) -> the command as a process, and the address that it prints."""
    started = []

    def start(*words):
        line = [sys.executable, "-m", "scripts.watch", *map(str, words)]
        process = subprocess.Popen(line, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                   stderr=subprocess.PIPE)  # fmt: skip
        started.append(process)
        line = process.stdout.readline()
        return process, re.fullmatch(r"(http://127[.0-9:]+/) shows .*; Ctrl-C ends it\n", line)[1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@posix
def test_the_command_serves_until_ctrl_c(start, tmp_path):
    """Two of them share the machine; a folder may be empty."""
    commands = [start(tmp_path), start(tmp_path), start(tmp_path, "--port", 0)]
    assert len({address for _, address in commands}) == 3
    for number, (process, _) in zip((signal.SIGINT, signal.SIGTERM, signal.SIGINT), commands):
        process.send_signal(number)
        assert process.communicate(timeout=30) == ("", "") and process.returncode == 0


def test_the_command_does_without_torch():
    code = ("import sys, scripts.watch.__main__\n"
            "assert not {'torch', 'numpy', 'matplotlib'} & sys.modules.keys()")  # fmt: skip
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_mistake_is_a_sentence(tmp_path, server, log, capsys):
    write(tmp_path / "runs" / "x.jsonl", log)
    runs, taken = tmp_path / "runs", server.server_address[1]
    for words, noun in {
        (tmp_path / "no",): "there is no folder", (runs / "x.jsonl",): "there is no folder",
        (runs, "--port", taken): f"port {taken} cannot be had", (runs, "--port", "65536"): "65535",
        (runs, "--html", "x", "--port", 1): "--port is for a page that is served",
        (runs, "--html", "x", "--open"): "--open is for a page that is served",
        (runs, "--html", runs / "no" / "x.html"): "cannot be written: No such file",
        (tmp_path / "empty", "--html", "x"): "there is no log",
    }.items():  # fmt: skip
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(SystemExit, match="2"):
            watch.main([*map(str, words)])
        assert noun in capsys.readouterr().err, words
    with pytest.raises(UserError, match=f"port {taken} cannot be had"):
        serving(reading.Runs(runs), taken)


def test_the_page_loads_nothing_from_elsewhere_and_has_the_colours_of_the_pictures():
    text = page()[0]
    assert not re.search("https?:|//[a-z]|url[(]|@import", text)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
    light = re.findall(r"--c\d: (#\w+);", text)[:7]
    assert light == plot.COLOURS
    assert page()[1].count("sha256-") == 2


# ---- in a browser


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium, its window 1280 pixels wide."""
    webdriver = pytest.importorskip("selenium.webdriver")
    from shutil import which

    names = "chromium", "chromium-browser", "google-chrome", "chrome"
    binary, driver = next(filter(None, map(which, names)), None), which("chromedriver")
    if not binary or not driver:
        pytest.skip("there is no Chromium with its driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    root = getattr(os, "getuid", lambda: 1)() == 0  # for whom Chromium has no sandbox
    for flag in ("--headless=new", "--disable-dev-shm-usage", "--window-size=1280,860",
                 *["--no-sandbox"] * root):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


@pytest.fixture
def browser(chromium):
    """It, whose console stays empty, and which asks nobody but the server of the test."""
    chromium.get("about:blank")
    chromium.get_log("browser"), chromium.get_log("performance")
    yield chromium
    chromium.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert chromium.get_log("browser") == []
    asked = [json.loads(x["message"])["message"] for x in chromium.get_log("performance")]
    places = {x["params"]["request"]["url"] for x in asked
              if x["method"] == "Network.requestWillBeSent"}  # fmt: skip
    assert all(re.match(r"http://127\.0\.0\.1:\d+/|file:|data:|about:", x) for x in places), places


def until(browser, script, seconds=15):
    """Wait until an expression of JavaScript is true; returns it."""
    end = time.monotonic() + seconds
    while not (value := browser.execute_script(f"return {script}")):
        assert time.monotonic() < end, (script, browser.find_element("tag name", "body").text)
        time.sleep(0.05)
    return value


def drawn(browser, count):
    until(browser, f"document.body.dataset.drawn === '{count}'")
    return browser.execute_script("return document.querySelector('#loss .plot').ariaLabel")


def shown(browser, place, words):
    """Wait until the first element of a place shows these words."""
    text = f"(document.querySelector({place!r})?.innerText ?? '').replaceAll('\\u00a0', ' ')"
    until(browser, f"{text}.includes({words!r})")


def boxes(browser):
    return browser.find_elements("css selector", "#list li input")


@pytest.mark.slow
def test_ticks_choose_the_curves_and_stay_in_the_address(browser, server, tmp_path, log):
    for seed in range(9):
        lines = [log[0], epoch(1), epoch(2, test_loss=seed + 0.5), log[-1]]
        write(tmp_path / "runs" / "logs" / f"x{seed}.jsonl", lines, seed=seed)
    browser.get(server.address)
    assert "of 7 runs" in drawn(browser, 7)  # the newest, of none that trains
    assert [x.text for x in browser.find_elements("css selector", "#list .name")] == [
        f"seed {i}" for i in range(9)]  # fmt: skip
    assert "FCN 2×8, digits, batch 128, AGD" in browser.find_element("id", "title").text
    browser.find_element("id", "none").click()
    shown(browser, "#empty", "Tick runs")
    assert not browser.find_element("id", "charts").is_displayed()
    boxes(browser)[2].click()
    assert "of 1 run: " in drawn(browser, 1) and "0.5000, 2.500" in drawn(browser, 1)
    before = until(browser, "document.querySelector('#loss canvas').toDataURL()")
    boxes(browser)[5].send_keys(" ")  # by the keyboard
    label = drawn(browser, 2)
    assert "seed 2: 0.5000, 2.500; seed 5: 0.5000, 5.500" in label
    assert before != until(browser, "document.querySelector('#loss canvas').toDataURL()")
    browser.find_element("css selector", "input[value=seconds]").click()
    address = browser.current_url
    browser.get("about:blank")
    browser.get(address)
    assert drawn(browser, 2) == label and "x=seconds" in address
    assert browser.find_element("css selector", "input[value=seconds]").is_selected()
    search = browser.find_element("id", "search")
    search.send_keys("seed 7")
    until(browser, "document.querySelectorAll('#list li:not([hidden])').length === 1")
    browser.find_element("id", "all").click()
    assert "of 3 runs" in drawn(browser, 3)
    browser.execute_script("document.querySelectorAll('.acts')[7].firstChild.click()")
    assert "of 1 run: " in drawn(browser, 1)
    search.clear()
    search.send_keys(" ")
    browser.find_element("css selector", "#list h2 input").click()
    drawn(browser, 9)


@pytest.mark.slow
def test_the_page_follows_the_runs(browser, server, tmp_path, log):
    folder = tmp_path / "runs"
    browser.get(server.address)
    shown(browser, "#empty", "--dataset digits")
    path = write(folder / "logs" / "a.jsonl", log[:1])
    shown(browser, "#list .meta", "training · epoch 0 of 3")
    shown(browser, "#empty", "first epoch")
    with open(path, "a") as file:
        file.write(epoch(1, test_loss=1.25))
    assert "1.250" in drawn(browser, 1)
    write(folder / "logs" / "b.jsonl", [log[0], epoch(1)], seed=1)
    drawn(browser, 2)  # another that trains is shown at once
    until(browser, "document.title.startsWith('2 training')")
    os.utime(path, (1, 1))
    shown(browser, "#list .meta", "stalled")
    assert "2 min" in browser.find_element("css selector", "#list .state").get_property("title")
    with open(path, "a") as file:
        file.write(epoch(2) + json.dumps({"kind": "end", "stopped": "interrupted", "final": False}))
    shown(browser, "#list .meta", "stopped · epoch 2 of 3")
    path.unlink()
    drawn(browser, 1)


@pytest.mark.slow
def test_a_run_has_its_colour_when_the_page_is_loaded_again(browser, server, tmp_path, log):
    paths = [write(tmp_path / "runs" / f"{i}.jsonl", [log[0], epoch(1)], seed=i) for i in range(3)]
    for path in paths:  # each in turn is the newest
        os.utime(path)
        time.sleep(0.01)
        browser.get(server.address)
        drawn(browser, 3)
        assert browser.find_element("id", "legend").text.split("\n") == [
            f"seed {i}" for i in range(3)]  # fmt: skip
    shown(browser, "#list .meta", "test 25.0 %")
    shown(browser, "#list .age", " s ago")


@pytest.mark.slow
@posix
def test_the_server_may_go_and_come_back(start, browser, tmp_path, log):
    path = write(tmp_path / "x.jsonl", [log[0], epoch(1)])
    process, address = start(tmp_path, "--port", 0)
    browser.get(address)
    drawn(browser, 1)
    process.terminate()
    process.wait()
    shown(browser, "#link", "no connection")
    assert drawn(browser, 1)
    with open(path, "a") as file:
        file.write(epoch(2, test_loss=0.125))
    start(tmp_path, "--port", address.split(":")[2][:-1])
    shown(browser, "#link", "live")
    until(browser, "document.querySelector('#loss .plot').ariaLabel.includes('0.1250')")
    browser.get_log("browser")  # Chromium reports that it had no connection


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_page_fits_and_follows_the_colours_of_the_system(width, dark, browser, server, tmp_path,
                                                             log):  # fmt: skip
    for seed in range(20):
        name = "torchvision:" + "a_very_long_name_of_a_network" * (seed % 3)
        write(tmp_path / "runs" / ("very_long" * 9) / f"{seed}.jsonl", log, seed=seed, arch=name)
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
        "width": width, "height": 740, "deviceScaleFactor": 2, "mobile": width < 500})  # fmt: skip
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
    browser.get(server.address)
    drawn(browser, 7)
    browser.find_element("id", "all").click()
    drawn(browser, 20)
    for place in ("body", "main", "aside"):
        node = browser.find_element("css selector", place)
        assert node.get_property("scrollWidth") == node.get_property("clientWidth"), place
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    colour = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", colour)[:3])) > 384
    assert light != dark


@pytest.mark.slow
def test_the_cursor_shows_values_and_a_name_is_never_markup(browser, server, tmp_path, log):
    from selenium.webdriver import ActionChains

    for name, seed in (("a", EVIL), ("b", "b")):
        write(tmp_path / "runs" / f"{name}.jsonl", log, seed=seed, arch=EVIL)
    file = tmp_path / "page.html"
    assert watch.main([str(tmp_path / "runs"), "--html", str(file)]) == 0
    for address in (server.address, file.as_uri()):
        browser.get(address)
        drawn(browser, 2)
        plot = browser.find_element("css selector", "#loss .plot")
        ActionChains(browser).move_to_element(plot).perform()
        tip = until(browser, "document.querySelector('#loss .tip:not([hidden])')?.innerText")
        (value,) = [row["test_loss"] for row in map(json.loads, log)
                    if (row["kind"], row.get("epoch")) == ("epoch", 2)]  # fmt: skip
        shown(browser, "#loss figcaption", "test   thin: each step")
        assert "epoch 2" in tip and f"{value:.4g}" in tip and "<img" in tip
        ActionChains(browser).move_to_element(browser.find_element("id", "folder")).perform()
        browser.execute_script("document.querySelector('#eta .plot').focus()")
        ActionChains(browser).send_keys("\ue014").perform()  # the right arrow
        until(browser, "document.querySelector('#eta .tip').innerText.includes('epoch 1')")
        browser.execute_script("document.querySelectorAll('.acts button')[1].click()")
        text = until(browser, "document.querySelector('dialog[open] #sheet')?.innerText")
        assert "python main.py" in text and "train_examples" in text and "<img" in text
        browser.find_element("id", "shut").click()
        assert browser.find_elements("css selector", "img") == []
        assert "owned" not in browser.title
    assert "as of" in browser.find_element("id", "link").text
