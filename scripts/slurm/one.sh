#!/usr/bin/env bash
# Train on one GPU: the flags of main.py follow on the command line.
#
#   sbatch --time 8:00:00 scripts/slurm/one.sh --arch resnet18 --dataset cifar10
#
# On a cluster without GPUs: sbatch --gpus-per-node 0 ...
#SBATCH --job-name=agd
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --cpus-per-task=8

source "${AGD_REPO:-$SLURM_SUBMIT_DIR}/scripts/slurm/common.sh" || exit 1
step 1 "$AGD_PYTHON" main.py "$@"
