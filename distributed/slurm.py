"""The queue that has started a job, as far as a run speaks with it."""

import os
import subprocess


def in_a_job(environ=None):
    """Whether SLURM has started this process."""
    return "SLURM_JOB_ID" in (os.environ if environ is None else environ)


def requeue(environ=None):
    """Give SLURM this job back, to be started again; returns why it is not taken, or None. SLURM
    then ends what is left of it."""
    job = (os.environ if environ is None else environ)["SLURM_JOB_ID"]
    try:
        done = subprocess.run(
            ["scontrol", "requeue", job], capture_output=True, text=True, timeout=60,
            errors="replace", start_new_session=True,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    said = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
    return said if done.returncode else None


def restarted(environ=None):
    """Whether this is not the first time that SLURM or torchrun has started this command: it goes
    on then, whether or not the first time started over."""
    environ = os.environ if environ is None else environ
    counts = (environ.get(f"{name}_RESTART_COUNT", "0") for name in ("SLURM", "TORCHELASTIC"))
    return any(count.isdigit() and int(count) > 0 for count in counts)
