#!/usr/bin/env bash
# Strong scaling: submits the first steps of one training script on several numbers of nodes, with a table at the end.
#   slurm/scaling.sh slurm/train_qwen3_32b.sh 4 6 8 [key=value …]
# Every run has the script's number of engine nodes (ENGINE_NODES sets another); the others are learners.
set -euo pipefail
SCRIPT=${1:?which training script?}
shift
FOLDER=${FOLDER:-runs/scaling/$(basename "$SCRIPT" .sh)}
mkdir -p "$FOLDER"
NODES=() JOBS=()
while [[ "${1:-}" =~ ^[0-9]+$ ]]; do NODES+=("$1"); shift; done
((${#NODES[@]})) || { echo "scaling: name the numbers of nodes, e.g. $0 $SCRIPT 4 6 8" >&2; exit 2; }
for n in "${NODES[@]}"; do
    JOBS+=("$(RUN=$FOLDER/nodes-$n sbatch --parsable --nodes="$n" --job-name="scaling-$n" --time="${TIME:-60}" "$SCRIPT" \
        steps="${STEPS:-6}" evaluation.every=0 'data.eval=[]' checkpoint.every=0 "$@")")
done
sbatch --nodes=1 --job-name=scaling-table --dependency="afterany:$(IFS=:; echo "${JOBS[*]}")" \
    --output="$FOLDER/table.out" --wrap "source slurm/environment.sh && in_place '' && exec \"\${PROGRAM[@]}\" \
    bench scaling $FOLDER --json $FOLDER/table.json"
echo "the table will be in $FOLDER/table.out"
