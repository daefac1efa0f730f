#!/usr/bin/env bash
# Step-GRPO and DPPO on Qwen3-30B-A3B: 2 nodes of learners (pp 2, cp 4, ep 8) and 2 of engines. From the repository's root:
#   sbatch slurm/train_qwen3_30b_a3b.sh [key=value …]
#SBATCH --job-name=qwen3-30b-a3b
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
ENGINES_PER_NODE=${ENGINES_PER_NODE:-2} ENGINE_NODES=${ENGINE_NODES:-2} exec bash slurm/launch.sh train slurm/configs/qwen3_30b_a3b.yaml "$@"
