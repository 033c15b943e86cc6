"""How the ranks of a run find one another: a store that all of them can reach."""

import time
from datetime import timedelta

import torch.distributed as dist

from distributed.launch import LaunchError


def meet(launch, seconds):
    """A torch store that all the ranks of `launch` share, once all of them are there.

    Raises LaunchError after `seconds`, with the ranks that are missing where that is known.
    """
    end = time.monotonic() + seconds
    try:
        if launch.agent:
            found = dist.rendezvous(
                "env://", launch.rank, launch.size, timeout=timedelta(seconds=seconds)
            )
            store = next(iter(found))[0]
        else:
            store = _serve(launch) if launch.rank == 0 else _find(launch, end)
    except (dist.DistError, RuntimeError) as error:  # torch raises several kinds
        if isinstance(error, LaunchError):
            raise
        where = f"{launch.address} port {launch.ports[0]}"
        raise LaunchError(f"the ranks cannot meet at {where}: {_first_line(error)}") from error
    store = dist.PrefixStore("agd", store)
    _wait_for_all(store, launch, end)
    return store


def _serve(launch):
    """The store, served by this process at the first port that is free."""
    for port in launch.ports:
        try:
            return dist.TCPStore(
                launch.address, port, launch.size, True, timedelta(seconds=15),
                wait_for_workers=False,
            )  # fmt: skip
        except (dist.DistError, RuntimeError) as error:
            taken = error
    if len(launch.ports) == 1:
        raise LaunchError(
            f"rank 0 cannot listen at MASTER_ADDR {launch.address}, MASTER_PORT "
            f"{launch.ports[0]}: {_first_line(taken)}; choose another port, or leave it out under "
            "srun and mpirun"
        )
    raise LaunchError(
        f"rank 0 cannot listen at {launch.address}, at none of {len(launch.ports)} ports from "
        f"{launch.ports[0]} on: {_first_line(taken)}; export MASTER_ADDR and MASTER_PORT"
    )


def _find(launch, end):
    """The store that rank 0 serves; another program may have one of the ports."""
    while time.monotonic() < end:
        for port in launch.ports:
            try:
                store = dist.TCPStore(
                    launch.address, port, launch.size, False, timedelta(seconds=3),
                    wait_for_workers=False,
                )  # fmt: skip
                # Those of another job that meets there are another number, or come first.
                store.wait(["agd/ports"], timedelta(seconds=3))
                if store.get("agd/ports").decode() == _mark(launch):
                    return store
            except (dist.DistError, RuntimeError):
                continue
        time.sleep(0.2)
    raise LaunchError(
        f"rank {launch.rank} finds no rank 0 at {launch.address}, port {launch.ports[0]}"
        f"{' and the next' if len(launch.ports) > 1 else ''}: is it running, and is that its "
        "address? Export MASTER_ADDR and MASTER_PORT if not"
    )


def _mark(launch):
    """What tells the store of this job from another's."""
    return f"{launch.launcher} {launch.size} {launch.ports}"


def _wait_for_all(store, launch, end):
    if launch.rank == 0:
        store.set("ports", _mark(launch))
    store.set(f"here/{launch.rank}", "")
    left = max(1.0, end - time.monotonic())
    try:
        store.wait([f"here/{rank}" for rank in range(launch.size)], timedelta(seconds=left))
    except (dist.DistError, RuntimeError) as error:
        try:
            gone = [r for r in range(launch.size) if not store.check([f"here/{r}"])]
        except (dist.DistError, RuntimeError):
            gone = [0]
        raise LaunchError(
            f"{len(gone)} of {launch.size} ranks did not come: {', '.join(map(str, gone[:8]))}"
            f"{', ...' if len(gone) > 8 else ''}; the number of processes that were started and "
            "that which the launcher tells them differ, or some ended before"
        ) from error


def _first_line(error):
    return str(error).strip().splitlines()[0].rstrip(".")
