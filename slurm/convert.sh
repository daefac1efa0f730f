#!/usr/bin/env bash
# Converts a checkpoint on a CPU node; the arguments are those of `megarl convert`:
#   sbatch slurm/convert.sh hf-to-megatron models/Qwen3-32B converted/Qwen3-32B tp=4 pp=4
#   sbatch slurm/convert.sh megatron-to-hf runs/qwen3_32b/checkpoints/step_000100 exported/Qwen3-32B
#SBATCH --job-name=megarl-convert
#SBATCH --nodes=1
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%x-%j.out
set -euo pipefail
source slurm/environment.sh
in_place "${CONTAINER:-}"
exec srun --ntasks=1 "${SRUN[@]}" "${PROGRAM[@]}" convert "$@"
