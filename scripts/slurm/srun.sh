#!/usr/bin/env bash
# Train on many nodes, a rank a GPU, each started by srun: the flags of main.py follow.
#
#   sbatch --nodes 4 --gpus-per-node 8 scripts/slurm/srun.sh --arch resnet50 --dataset imagenet \
#       --loss xent
#
# It takes whole nodes (--exclusive, all memory), whose CPUs the ranks share. On a cluster without GPUs:
# sbatch --gpus-per-node 0 --ntasks-per-node 2 ...
#SBATCH --job-name=agd
#SBATCH --output=slurm-%j.txt
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --exclusive
#SBATCH --mem=0

source "${AGD_REPO:-$SLURM_SUBMIT_DIR}/scripts/slurm/common.sh" || exit 1
step "$ranks" "$AGD_PYTHON" main.py --distribute "$@"
