#!/usr/bin/env bash
# Step-GRPO and DPPO on Qwen3-32B: 2 nodes of learners (tp 4, pp 4) and 2 of engines. From the repository's root:
#   sbatch slurm/train_qwen3_32b.sh [key=value …]
#SBATCH --job-name=qwen3-32b
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
ENGINES_PER_NODE=${ENGINES_PER_NODE:-2} ENGINE_NODES=${ENGINE_NODES:-2} exec bash slurm/launch.sh train slurm/configs/qwen3_32b.yaml "$@"
