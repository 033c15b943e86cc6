"""SLURM: the nodes of a job, and the queue that has started it."""

import os
import re
import subprocess


def first_node(nodes):
    """The first node of SLURM's list: gpu003 of gpu[003-007,12],cpu1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first)


def in_a_job():
    """Whether SLURM has started this process."""
    return "SLURM_JOB_ID" in os.environ


def requeue():
    """Give this job back to SLURM, which ends it and starts it again; returns why SLURM refuses,
    or None."""
    try:
        done = subprocess.run(
            ["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, timeout=60,
            encoding="utf-8", errors="replace", start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    refusal = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    return refusal if done.returncode else None


def restarted():
    """Whether SLURM or torchrun has started this command again: it resumes then, with --fresh too.
    """
    counts = (os.environ.get(f"{name}_RESTART_COUNT", "0") for name in ("SLURM", "TORCHELASTIC"))
    return any(count.isdigit() and int(count) > 0 for count in counts)
