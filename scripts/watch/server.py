"""The page and its data over HTTP, for the browsers of this machine alone."""

import base64
import errno
import hashlib
import json
import os
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from urllib.parse import parse_qs

from cli import UserError
from runs.files import reason

HERE = Path(__file__).parent
PORT, PORTS = 8423, 100  # the first one that is tried, and how many are


def compact(value):
    """JSON in ASCII without <, which could end the script of a page that it stands in."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def page(data=None):
    """(the page, its content security policy): to be served, or with `data` in it."""
    text, style, charts, script = (
        HERE.joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", "page.css", "charts.js", "page.js")
    )
    rules = ["default-src 'none'", "base-uri 'none'", "form-action 'none'", "img-src data:"]
    for tag, content in (("style", style), ("script", charts + script)):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
        text = text.replace(f"<{tag}></{tag}>", f"<{tag}>{content}</{tag}>")
    if data is None:
        return text, "; ".join([*rules, "connect-src 'self'", "frame-ancestors 'none'"])
    policy = "; ".join(rules)
    meta = f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    text = text.replace("<!-- policy -->", meta, 1)
    return text.replace(">null</script>", f">{compact(data)}</script>", 1), policy


class Handler(BaseHTTPRequestHandler):
    """Answers GET and HEAD of the page and its data. No part of a request names a file."""

    protocol_version, timeout = "HTTP/1.1", 30  # seconds that a client may be silent
    server_version, sys_version = "watch", ""

    def do_GET(self):
        own = [f"{name}:{self.server.server_address[1]}" for name in ("127.0.0.1", "localhost")]
        hosts = self.headers.get_all("Host", [])
        hosts = [host.lower() + ":80" * (":" not in host) for host in hosts]
        if len(hosts) != 1 or hosts[0] not in own:  # a site whose name leads here
            return self.send_error(403, f"open http://{own[0]}/")
        if "Content-Length" in self.headers or "Transfer-Encoding" in self.headers:
            return self.send_error(400)
        place, _, query = self.path.partition("?")
        query = dict.fromkeys(("since", "id"), [""]) | parse_qs(query)
        try:
            if place == "/":
                return self.answer(200, self.server.page, "text/html; charset=utf-8")
            if place == "/runs":
                data = self.server.runs.changes(query["since"][0])
                return self.answer(204) if data is None else self.answer_json(data)
            if place == "/run":
                return self.answer_json(self.server.runs.details(query["id"][0]))
        except (KeyError, FileNotFoundError, ValueError):
            pass
        return self.send_error(404)

    do_HEAD = do_GET

    def answer_json(self, data):
        self.answer(200, compact(data), "application/json")

    def answer(self, code, text="", kind="text/plain; charset=utf-8"):
        body = text.encode()
        self.send_response(code)
        headers = {"Content-Type": kind, "Content-Length": len(body)} if code != 204 else {}
        headers |= {"Cache-Control": "no-store", "Content-Security-Policy": self.server.policy,
                    "Cross-Origin-Resource-Policy": "same-origin",
                    "Referrer-Policy": "no-referrer", "X-Content-Type-Options": "nosniff"}
        headers |= {"Connection": "close"} if code >= 400 else {}  # nobody reads a body behind it
        headers |= {"Allow": "GET, HEAD"} if code == 405 else {}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def send_error(self, code, message=None, explain=None):
        """Also what the base class refuses: 501 is a method that there is no function for."""
        code = 405 if code == 501 else code
        self.close_connection = True
        self.answer(code, f"{message or self.responses[code][0]}\n")

    def log_message(self, *args):
        pass


class Server(ThreadingTCPServer):
    """http.server's own asks a name server for the name of this machine, which may take seconds."""

    daemon_threads, request_queue_size = True, 64
    allow_reuse_address = os.name == "posix"  # elsewhere two could share a port

    def __init__(self, port, runs):
        self.runs, (self.page, self.policy) = runs, page()
        super().__init__(("127.0.0.1", port), Handler)

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}/"

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], OSError):  # else the client has gone
            super().handle_error(request, client_address)


def serving(runs, port=None):
    """A Server at a port, or at the first one that is free. Raises UserError."""
    for number in range(PORT, PORT + PORTS) if port is None else [port]:
        try:
            return Server(number, runs)
        except OSError as error:
            if port is not None or error.errno != errno.EADDRINUSE:
                raise UserError(f"port {number} cannot be had: {reason(error)}; --port 0 takes any "
                                "that is free") from error  # fmt: skip
    raise UserError(f"ports {PORT} to {PORT + PORTS - 1} are taken: --port 0 takes any other")
