"""How the ranks of a run find one another: a store that all of them can reach."""

import socket
import sys
import threading
import time
import zlib
from datetime import timedelta

import torch.distributed as dist

from distributed.launch import LaunchError

WAIT = 60  # seconds for a value of another rank: those before this one may still start CUDA
UNKNOWN = 20  # seconds after which a name that no server knows is taken for wrong


def meet(launch, seconds):
    """A torch store that all the ranks of `launch` share, once all of them are there.

    Raises LaunchError after `seconds`, with the ranks that are missing where that is known.
    """
    end, lobby = time.monotonic() + seconds, None
    try:
        if launch.agent:
            found = dist.rendezvous(
                "env://", launch.rank, launch.size, timeout=timedelta(seconds=seconds)
            )
            store = next(iter(found))[0]
        elif launch.rank == 0:
            store, lobby = _serve(launch)
        else:
            store = _find(launch, end)
        store = dist.PrefixStore("agd", store)
        _wait_for_all(store, launch, end)
        return store
    except (dist.DistError, RuntimeError, OSError) as error:  # torch raises several kinds
        if isinstance(error, LaunchError):
            raise
        where = f"{launch.address} port {launch.ports[0]}"
        raise LaunchError(f"the ranks cannot meet at {where}: {_first_line(error)}") from error
    finally:
        if lobby is not None:
            lobby.shutdown(socket.SHUT_RDWR)  # wakes the thread
            lobby.close()


def _serve(launch):
    """(the store, served by this process, the listening socket at which the others are told its
    port: the first of the launch's ports that is free)."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    for port in launch.ports:
        try:
            lobby = socket.create_server(
                ("", port), family=family, dualstack_ipv6=both, backlog=launch.size
            )
            break
        except OSError as error:
            taken = error
    else:
        if len(launch.ports) == 1:
            raise LaunchError(
                f"rank 0 cannot listen at MASTER_PORT {launch.ports[0]}: {taken.strerror}; choose "
                "another port, or leave it out under srun and mpirun"
            )
        raise LaunchError(
            f"rank 0 cannot listen at any of {len(launch.ports)} ports from {launch.ports[0]} on: "
            f"{taken.strerror}; export MASTER_ADDR and MASTER_PORT"
        )
    store = dist.TCPStore(
        launch.address, 0, launch.size, True, timedelta(seconds=WAIT), wait_for_workers=False
    )
    answer = f"{_mark(launch)} {store.port}\n".encode()
    threading.Thread(target=_answer, args=(lobby, answer), name="lobby", daemon=True).start()
    return store, lobby


def _answer(lobby, answer):
    """The thread of rank 0 that tells whoever asks where the store is."""
    while lobby.fileno() != -1:
        try:
            guest, _ = lobby.accept()
            with guest:
                guest.sendall(answer)
        except OSError:  # it went away before it heard, or too many came at once, or all are there
            time.sleep(0.01)


def _find(launch, end):
    """The store that rank 0 serves; another program may have one of the ports, and be mute."""
    began = time.monotonic()
    while time.monotonic() < end:
        for port in launch.ports:
            try:
                with socket.create_connection((launch.address, port), 3) as asked:
                    asked.settimeout(3)
                    mark, _, store = asked.makefile().readline(200).partition(" ")
                if mark == _mark(launch):
                    return dist.TCPStore(
                        launch.address, int(store), launch.size, False, timedelta(seconds=WAIT),
                        wait_for_workers=False,
                    )  # fmt: skip
            except (OSError, ValueError) as error:
                unknown = isinstance(error, socket.gaierror)
                if unknown and time.monotonic() - began > UNKNOWN:
                    raise LaunchError(
                        f"MASTER_ADDR {launch.address} is no address: {error.strerror}"
                    ) from error
        time.sleep(0.2)
    raise LaunchError(
        f"rank {launch.rank} finds no rank 0 at {launch.address}, port {launch.ports[0]}"
        f"{' and the next' if len(launch.ports) > 1 else ''}: is it running, by the same command, "
        "and is that its address? Export MASTER_ADDR and MASTER_PORT if not"
    )


def _mark(launch):
    """What tells this job from another that meets at the same port."""
    command = zlib.crc32(repr(sys.argv[1:]).encode())
    return f"agd/{launch.launcher}/{launch.size}/{launch.job}/{command:08x}"


def _wait_for_all(store, launch, end):
    """Until every rank is there, or `end`; in short looks, so that Ctrl-C is heard."""
    store.set(f"here/{launch.rank}", "")
    try:
        store.add("here", 1)
        while not store.check(["all"]):
            if launch.rank == 0 and store.add("here", 0) == launch.size:
                store.set("all", "")
            elif time.monotonic() > end:
                break
            else:
                time.sleep(0.05)
        else:
            return
        gone = [rank for rank in range(launch.size) if not store.check([f"here/{rank}"])]
    except (dist.DistError, RuntimeError):
        gone = [0]
    if launch.rank and 0 not in gone:  # which says it
        raise LaunchError("")
    raise LaunchError(
        f"{len(gone)} of {launch.size} ranks did not come: {', '.join(map(str, gone[:8]))}"
        f"{', ...' if len(gone) > 8 else ''}; the number of processes that were started and that "
        "which the launcher tells them differ, or some ended before"
    )


def _first_line(error):
    return str(error).strip().splitlines()[0].rstrip(".")
