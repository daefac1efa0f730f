#!/usr/bin/env bash
# Step-GRPO and DPPO on Qwen3-4B: a node of learners (cp 4, dp 2) and one of engines. From the repository's root:
#   sbatch slurm/train_qwen3_4b.sh [key=value …]
#SBATCH --job-name=qwen3-4b
#SBATCH --nodes=2
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
ENGINES_PER_NODE=${ENGINES_PER_NODE:-8} ENGINE_NODES=${ENGINE_NODES:-1} exec bash slurm/launch.sh train slurm/configs/qwen3_4b.yaml "$@"
