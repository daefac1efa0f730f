#!/usr/bin/env bash
# Step-GRPO and DPPO on Qwen3-235B-A22B: 16 nodes of learners (tp 2, pp 2, cp 4, ep 32) and 8 of engines. From the repository's root:
#   sbatch slurm/train_qwen3_235b_a22b.sh [key=value …]
#SBATCH --job-name=qwen3-235b-a22b
#SBATCH --nodes=24
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.out
ENGINES_PER_NODE=${ENGINES_PER_NODE:-1} ENGINE_NODES=${ENGINE_NODES:-8} exec bash slurm/launch.sh train slurm/configs/qwen3_235b_a22b.yaml "$@"
