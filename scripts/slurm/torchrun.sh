#!/usr/bin/env bash
# Train on many nodes, a rank a GPU, started by one torchrun a node: the flags of main.py follow.
#
#   sbatch --nodes 4 --gpus-per-node 8 scripts/slurm/torchrun.sh --arch resnet50 \
#       --dataset imagenet --loss xent
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
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
port=$((30000 + SLURM_JOB_ID % 2000))
step 1 "$AGD_PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc_per_node "$ranks" \
    --rdzv_backend c10d --rdzv_endpoint "$first:$port" --rdzv_id "$SLURM_JOB_ID" \
    main.py --distribute "$@"
