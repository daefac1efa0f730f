#!/usr/bin/env bash
# Held-out accuracy and lengths of a run's newest checkpoint, or of the model that a YAML file names:
#   FLAGS="--temperature 0.6 --temperature 1.0" sbatch slurm/eval.sh runs/qwen3_32b
#   RUN=runs/untrained sbatch slurm/eval.sh slurm/configs/qwen3_32b.yaml
#SBATCH --job-name=megarl-eval
#SBATCH --nodes=4
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=04:00:00
#SBATCH --output=slurm-%x-%j.out
PLACE=${1:?which run directory or YAML file? e.g. runs/qwen3_32b}
shift
ENGINES_PER_NODE=${ENGINES_PER_NODE:-2} ENGINE_NODES=${ENGINE_NODES:-2} exec bash slurm/launch.sh eval "$PLACE" "$@"
