# What the batch scripts beside this one share. sbatch runs a copy of theirs in a folder of its own,
# so that they find this file in the checkout from which they were submitted.
#
# What a cluster asks for, edited here once for all of them or set in the environment:
AGD_SETUP=${AGD_SETUP:-}            # what makes Python available: "source .venv/bin/activate"
AGD_PYTHON=${AGD_PYTHON:-python}
AGD_REPO=${AGD_REPO:-$SLURM_SUBMIT_DIR}     # this checkout, on a disk that every node sees

# SLURM sends USR1 to this shell alone, two minutes before the time is up (--signal). main.py could
# take USR1 itself; torchrun and scripts.reproduce would die of it. SIGTERM to the step, which srun
# would turn into SIGKILL, has each of them save where the run is.
nearly_over() {
    again=yes
    echo "The time is nearly up: saving, to go on from there"
    scancel --signal=TERM "$SLURM_JOB_ID"
}
again=
trap nearly_over USR1

cd "$AGD_REPO" || exit 1
eval "$AGD_SETUP"

# Ranks on a node: one a GPU, and where none were asked for, one a task. A node's CPUs are shared
# out between them; the number that a task gets is told to srun outright, since newer versions of
# SLURM do not hand the job's on, and older ones only under one of its names.
gpus=${SLURM_GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-0}}
gpus=${gpus##*:}  # a100:8
ranks=$((gpus > 0 ? gpus : ${SLURM_NTASKS_PER_NODE:-1}))
cpus=$((SLURM_CPUS_ON_NODE > ranks ? SLURM_CPUS_ON_NODE / ranks : 1))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$cpus}
unset SLURM_CPUS_PER_TASK SRUN_CPUS_PER_TASK SLURM_CPUS_PER_GPU SLURM_TRES_PER_TASK

# step TASKS COMMAND...: the command TASKS times on every node; ends the job with its exit code. A
# job whose time ran out goes back to the queue; one that finished, failed or was cancelled does not.
step() {
    local tasks=$1 code
    if [ -n "$again" ]; then  # the time was up before anything began
        scontrol requeue "$SLURM_JOB_ID"
        exit 1
    fi
    srun --kill-on-bad-exit=1 --nodes="$SLURM_NNODES" --ntasks=$((SLURM_NNODES * tasks)) \
        --ntasks-per-node="$tasks" --cpus-per-task=$((cpus * ranks / tasks)) "${@:2}" &
    wait $!
    code=$?
    while kill -0 $! 2>/dev/null; do  # the signal interrupts the waiting, not the step
        wait $!
        code=$?
    done
    wait $!  # its own code, where it ended while the signal was dealt with
    code=$?
    if [ -n "$again" ] && [ "$code" != 0 ]; then
        scontrol requeue "$SLURM_JOB_ID" || echo "Not requeued; the same command goes on"
    fi
    exit "$code"
}
