#!/usr/bin/env bash
# Held-out accuracy and lengths of a run's newest checkpoint, or of the model that a YAML file names. Set RUN to the run:
#   RUN=runs/qwen3_32b FLAGS="--temperature 0.6 --temperature 1.0" sbatch slurm/eval.sh slurm/configs/qwen3_32b.yaml
#SBATCH --job-name=megarl-eval
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%x-%j.out
CONFIG=${1:?which YAML file? e.g. slurm/configs/qwen3_32b.yaml}
shift
ENGINES_PER_NODE=${ENGINES_PER_NODE:-2} ENGINE_NODES=${ENGINE_NODES:-2} exec bash slurm/launch.sh eval "$CONFIG" "$@"
