"""When one rank fails, the others hear why, and end within seconds.

A thread of each rank holds a connection to rank 0. The system closes a process's connections
however it ends, so that a rank that was killed is noticed at once, and one that is only slow is
not taken for dead.
"""

import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time

GRACE = 10  # seconds that the main thread has to end by itself once another rank has failed
HELLO = 60  # seconds in which every rank has to connect


class Watch:
    """`failure`: None, or (reason, traceback or None) of the rank that failed first."""

    def __init__(self, store, rank, size, address, local_rank=0):
        self.rank, self.size, self.failure = rank, size, None
        self.told = False  # whether the failure is this rank's own
        # Who speaks where rank 0 has gone: its neighbour, and the first on every other node.
        self.second = rank == 1 or (rank > 0 and local_rank == 0)
        self.heard, self.closing = threading.Event(), threading.Event()
        self.peers = {}  # rank -> connection; every rank's for rank 0, else rank 0's
        self.left = set()  # ranks that have said goodbye
        self.orphaned = False  # whether rank 0 has gone without a word
        self.sending = threading.Lock()
        if rank == 0:
            self._listen(store, size)
        else:
            port, token = store.get("watch").decode().split()
            peer = socket.create_connection((address, int(port)), HELLO)
            peer.sendall(f"{token} {rank}\n".encode())
            self.peers[0] = peer
        for peer in self.peers.values():
            _keep_alive(peer)
        self.thread = threading.Thread(target=self._follow, name="watch", daemon=True)
        self.thread.start()

    def _listen(self, store, size):
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        token = secrets.token_hex(8)
        with socket.create_server(
            ("", 0), family=family, dualstack_ipv6=both, backlog=size
        ) as server:
            store.set("watch", f"{server.getsockname()[1]} {token}")
            end = time.monotonic() + HELLO
            while len(self.peers) < size - 1:
                server.settimeout(max(0.1, end - time.monotonic()))
                peer, _ = server.accept()
                peer.settimeout(5)
                try:
                    said, rank = _line(peer).split()
                    if said != token:
                        raise ValueError("a stranger")
                    self.peers[int(rank)] = peer
                except (OSError, ValueError):
                    peer.close()

    def tell(self, reason, trace=None):
        """Tell every rank that this one has failed."""
        if self.failure is None:
            self.failure, self.told = (reason, trace), True
            self._send({"failed": [reason, trace]})
            threading.Thread(target=self._end, name="end", daemon=True).start()

    def wait(self, seconds):
        """What another rank failed of, if it is heard within `seconds`, else None."""
        self.heard.wait(seconds)
        return self.failure

    def stop(self):
        """Leave without alarm; rank 0 waits a little for the others, so that it hears of them."""
        self._send({"left": self.rank})
        self.closing.set()
        if self.rank == 0 and self.failure is None:
            end = time.monotonic() + GRACE
            while len(self.left) < self.size - 1 and self.failure is None:
                if time.monotonic() > end:
                    break
                time.sleep(0.01)
        for peer in self.peers.values():
            try:
                peer.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _send(self, message, but=None):
        line = (json.dumps(message) + "\n").encode()
        with self.sending:
            for rank, peer in self.peers.items():
                if rank != but:
                    try:
                        peer.sendall(line)
                    except OSError:  # it has ended
                        pass

    def _follow(self):
        """The thread: read what the peers say until they have left."""
        selector, pending = selectors.DefaultSelector(), {}
        for rank, peer in self.peers.items():
            peer.settimeout(HELLO)
            selector.register(peer, selectors.EVENT_READ, rank)
            pending[rank] = b""
        while selector.get_map():
            for key, _ in selector.select(1):
                rank = key.data
                try:
                    data = key.fileobj.recv(1 << 16)
                except OSError:
                    data = b""
                *lines, pending[rank] = (pending[rank] + data).split(b"\n")
                for line in lines:
                    self._hear(rank, json.loads(line))
                if not data:
                    selector.unregister(key.fileobj)
                    if rank not in self.left and not self.closing.is_set():
                        self.orphaned = rank == 0
                        self._failed(f"rank {rank} is gone: it was killed (for want of memory?) or "
                                     "its node is down; the same command goes on")  # fmt: skip

    def _hear(self, rank, message):
        if "left" in message:
            self.left.add(rank)
            return
        reason, trace = message["failed"]
        self.left.add(rank)  # what it says is why it ends
        if self.rank == 0 and reason != "interrupted":
            reason = f"rank {rank}: {reason}"
        self._failed(reason, trace, but=rank)

    def _failed(self, reason, trace=None, but=None):
        if self.failure is not None:
            return
        self.failure = (reason, trace)
        self.heard.set()
        if self.rank == 0:
            self._send({"failed": [reason, trace]}, but)
        threading.Thread(target=self._end, name="end", daemon=True).start()

    def _end(self):
        """End this process if its main thread is stuck, as in a collective that never returns."""
        if self.closing.wait(GRACE):
            return
        if self.rank == 0 or (self.second and self.orphaned):
            reason, trace = self.failure
            print(f"{trace or ''}error: {reason}", file=sys.stderr, flush=True)
        os._exit(1)


def _line(peer, longest=64):
    """The first line of a connection, and nothing that comes after it."""
    line = b""
    while not line.endswith(b"\n") and len(line) < longest:
        byte = peer.recv(1)
        if not byte:
            break
        line += byte
    return line.decode("ascii")


def _keep_alive(peer):
    """A node that vanishes without a word is noticed after half a minute."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, seconds in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), seconds)
