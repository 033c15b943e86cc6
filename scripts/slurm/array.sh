#!/usr/bin/env bash
# The runs of the paper's figures, a task of an array a run: the arguments of scripts.reproduce
# follow, and its --list shows the numbers. Without --array it is one job, of all of them or --draw.
#
#   sbatch --array 0-11%4 --gpus-per-node 1 scripts/slurm/array.sh fig5 --scale full
#
# python -m scripts.reproduce ... --submit slurm does that for the runs that are not finished, and
# draws when they have ended. Without --gpus-per-node it runs on CPUs; --cpus-per-task is theirs.
#SBATCH --job-name=agd
#SBATCH --output=slurm-%A_%a.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --nodes=1

source "${AGD_REPO:-$SLURM_SUBMIT_DIR}/scripts/slurm/common.sh" || exit 1
step 1 "$AGD_PYTHON" -m scripts.reproduce "$@" \
    ${SLURM_ARRAY_TASK_ID:+--jobs 1 --runs "$SLURM_ARRAY_TASK_ID"}
