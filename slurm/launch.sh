#!/usr/bin/env bash
# Runs one job on the nodes that Slurm gave: `exec slurm/launch.sh train|eval CONFIG|RUN [key=value …]`, as the last line
# of a script with #SBATCH lines. The settings are environment variables; slurm/README.md lists them.
#
#   the first nodes: learner ranks, one task a GPU; rank 0, on the first of them, is the controller
#   the last nodes:  engine servers (`megarl serve`), which the controller reaches by HTTP
#
# The first task that fails ends the job. A run that saved and left before its end (exit code 75: its time limit is
# near, or a job of higher priority wants the nodes) is put back into the queue, and goes on from there.
set -euo pipefail
COMMAND=$1 CONFIG=$2
shift 2
source slurm/environment.sh

say() { echo "$(date +%T) launch: $*"; }
fail() { say "$*"; exit 1; }

# ---- what runs where --------------------------------------------------------------------------------------------------

MUST_HAVE=() KEY_FILE=''
if [[ -d "$CONFIG" ]]; then # a run directory: its newest checkpoint is meant
    RUN=$CONFIG CONFIG=$CONFIG/config.yaml
elif [[ "${SIZE:-full}" == tiny ]]; then
    CONFIG=slurm/configs/tiny.yaml
fi
if [[ "${SIZE:-full}" == tiny ]]; then # the same job with the quick start's reasoner, on CPUs
    : "${TASKS_PER_NODE:=1}"
    ENGINES_PER_NODE=1 ENGINE_NODES=${TINY_ENGINE_NODES:-1}
elif [[ -n "${SLURM_GPUS_ON_NODE:-}" ]]; then
    MUST_HAVE=(--gpus "$SLURM_GPUS_ON_NODE")
fi
: "${RUN:=runs/$(basename "$CONFIG" .yaml)}" "${GPU:=h100}" "${ENGINE_NODES:=1}" "${SAVE_DEADLINE:=540}"
GPUS=${SLURM_GPUS_ON_NODE:-0} DEVICES=''
if [[ "$ENGINE_NODES" == colocated && "$GPUS" != 0 ]]; then # no device does both: NCCL cannot send within one
    : "${TASKS_PER_NODE:=$((GPUS / 2))}"
    ((TASKS_PER_NODE < GPUS)) || fail "ENGINE_NODES=colocated: TASKS_PER_NODE=$TASKS_PER_NODE leaves no GPU of $GPUS to the" \
        "engines; at most $((GPUS - 1))"
    DEVICES=$(seq -s, "$TASKS_PER_NODE" $((GPUS - 1)))
fi
: "${TASKS_PER_NODE:=${SLURM_GPUS_ON_NODE:-8}}" "${ENGINES_PER_NODE:=1}" "${IDLE_DEADLINE:=3600}"
PORT=$((20000 + SLURM_JOB_ID % 10000)) # the rendezvous; the engines' ports follow it
ATTEMPT=${SLURM_RESTART_COUNT:-0}
LOGS=$RUN/logs/job-$SLURM_JOB_ID-$ATTEMPT
mkdir -p "$LOGS"

mapfile -t NODES < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
case "$ENGINE_NODES" in
    0) LEARNERS=("${NODES[@]}") ENGINES=() ;;
    colocated) LEARNERS=("${NODES[@]}") ENGINES=("${NODES[@]}") ;;
    *) ((ENGINE_NODES < ${#NODES[@]})) || fail "ENGINE_NODES=$ENGINE_NODES leaves no learner among ${#NODES[@]} nodes"
       LEARNERS=("${NODES[@]:0:${#NODES[@]}-ENGINE_NODES}") ENGINES=("${NODES[@]: -ENGINE_NODES}") ;;
esac
RANKS=$((${#LEARNERS[@]} * TASKS_PER_NODE))

SETTINGS=("run=$RUN" "$@")
if [[ ${#ENGINES[@]} == 0 ]]; then
    SETTINGS+=("rollout.engine=local")
else
    ADDRESSES=()
    for i in $(seq 0 $((${#ENGINES[@]} * ENGINES_PER_NODE - 1))); do
        ADDRESSES+=("http://${ENGINES[i / ENGINES_PER_NODE]}:$((PORT + 1 + i))")
    done
    [[ -z "$DEVICES" ]] || SETTINGS+=("rollout.servers.devices=[$DEVICES]")
    SETTINGS+=("rollout.servers.addresses=[$(IFS=,; echo "${ADDRESSES[*]}")]")
    # The engines listen on the cluster's network and take new weights from whoever has the job's key. It is in a file
    # that only this user can read: command lines and logs are for everybody.
    KEY_FILE=$RUN/.engine-key-$SLURM_JOB_ID
    rm -f "$KEY_FILE"
    (umask 077 && set -o noclobber && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' >"$KEY_FILE")
    SETTINGS+=("rollout.servers.api_key_file=$KEY_FILE")
fi

# tasks NODES-ARRAY PER-NODE LOG ARGUMENTS…: `megarl ARGUMENTS` on these nodes; the first task that fails ends them all.
tasks() {
    local -n nodes=$1
    local each=$2 log=$3
    shift 3
    exec srun --nodes=${#nodes[@]} --nodelist="$(IFS=,; echo "${nodes[*]}")" --ntasks=$((${#nodes[@]} * each)) \
        --ntasks-per-node="$each" --overlap --kill-on-bad-exit=1 --output="$log" --error="$log" --open-mode=append \
        "${SRUN[@]}" "${PROGRAM[@]}" "$@"
}

# ---- how it ends --------------------------------------------------------------------------------------------------------

LEARNER='' SERVERS='' ASKED=''
# The time limit is near (USR1, this shell alone: #SBATCH --signal=B:USR1@…): pass it on. At pre-emption Slurm sends TERM
# to every task itself, but not to this shell (`asked` asks). Either way the learner saves after the step in hand and
# leaves; what it cannot save in time is done again.
trap 'ASKED=USR1; say "the time limit is near: asking the run to save"; [[ -z "$LEARNER" ]] || kill -USR1 "$LEARNER"' USR1
trap 'ASKED=TERM; say "Slurm asks the job to leave"' TERM
trap 'kill $(jobs -p) 2>/dev/null || true; forget_key' EXIT

forget_key() { [[ -z "$KEY_FILE" ]] || rm -f "$KEY_FILE"; }

complain() { # the last words of every task that has some
    grep -H --text '^megarl: ' "$LOGS"/*.log | sort -u | tail -n 20 || true
}

progress() { ls "$RUN"/checkpoints/step_*/manifest.json 2>/dev/null | tail -n 1 || true; }

dismiss() { # the engines end when they are told to, which srun passes on; what does not end is killed at our exit
    [[ -n "$SERVERS" ]] && kill -USR2 "$SERVERS" 2>/dev/null || return 0
    for _ in {1..30}; do kill -0 "$SERVERS" 2>/dev/null || return 0; sleep 1; done
}

asked() { # whether the job has been asked to leave: told to us, or a pre-emption
    [[ -n "$ASKED" ]] && return
    [[ "$(scontrol show job "$SLURM_JOB_ID")" =~ PreemptTime=[0-9] ]] || return
    ASKED=TERM
    say "Slurm asks the job to leave: another one needs its nodes"
}

requeue() {
    # Slurm itself requeues or ends a job that it is taking down; ours is to requeue one that left by itself.
    if [[ "$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T)" == RUNNING ]]; then
        [[ "$ASKED" == TERM || "$(progress)" != "$BEFORE" ]] ||
            fail "no checkpoint was made in this attempt; not requeued, for it would be so again: a longer --time?"
        say "requeueing; the run goes on from its newest checkpoint"
        forget_key # Slurm may end this shell before it can
        scontrol requeue "$SLURM_JOB_ID" || { say "cannot requeue: submit again to go on"; exit 75; }
        sleep 60 & wait $! # until Slurm ends this shell
    fi
    exit 75
}

# check NAME PID: wait for a task that looks before anything is loaded; refuse with its words.
check() {
    wait "$2" && return
    if asked; then requeue; fi
    complain
    fail "megarl $1 refuses"
}

# ---- before anything is loaded ------------------------------------------------------------------------------------------

BEFORE=$(progress)
say "job $SLURM_JOB_ID attempt $ATTEMPT: ${#LEARNERS[@]} x $TASKS_PER_NODE learner ranks on ${LEARNERS[*]};" \
    "engines on ${ENGINES[*]:-no other}; logs in $LOGS"
in_place "${CONTAINER:-}"
(MASTER_ADDR=${NODES[0]} MASTER_PORT=$PORT tasks NODES 1 "$LOGS/doctor-%t.log" doctor "$CONFIG" "${SETTINGS[@]}" \
    "${MUST_HAVE[@]}") & DOCTOR=$!
if [[ "$ATTEMPT" == 0 && -z "${SKIP_PLAN:-}" ]]; then # what cannot fit is refused before a GPU is touched
    (tasks LEARNERS 1 "$LOGS/plan.log" plan "$CONFIG" "${SETTINGS[@]}" --gpus "$RANKS" --gpu "$GPU") & PLAN=$!
    check plan "$PLAN"
fi
check doctor "$DOCTOR"

# ---- the run ------------------------------------------------------------------------------------------------------------

if [[ ${#ENGINES[@]} != 0 ]]; then
    in_place "${ENGINE_CONTAINER:-${CONTAINER:-}}"
    (tasks ENGINES "$ENGINES_PER_NODE" "$LOGS/engine-%t.log" serve "$CONFIG" "${SETTINGS[@]}" \
        --host 0.0.0.0 --port $((PORT + 1)) --idle-timeout "$IDLE_DEADLINE") & SERVERS=$!
    in_place "${CONTAINER:-}"
fi
case "$COMMAND" in
    eval) [[ "$CONFIG" == "$RUN/config.yaml" ]] && WHAT=("$RUN") || WHAT=("$CONFIG") ;;
    *) WHAT=("$CONFIG" --resume) ;;
esac
(MASTER_ADDR=${LEARNERS[0]} MASTER_PORT=$PORT tasks LEARNERS "$TASKS_PER_NODE" "$LOGS/rank-%t.log" \
    "$COMMAND" "${WHAT[@]}" "${SETTINGS[@]}" ${FLAGS:-}) & LEARNER=$!
tail --follow=name --retry --quiet --lines=+1 --pid=$LEARNER "$LOGS/rank-0.log" 2>/dev/null &

LIMIT=''
while true; do
    CODE=0
    wait -n "$LEARNER" $SERVERS || CODE=$? # a signal also ends it, once its trap has run
    if ! kill -0 "$LEARNER" 2>/dev/null; then
        OWN=0
        wait "$LEARNER" 2>/dev/null || OWN=$?
        ((OWN == 127)) || CODE=$OWN # 127: it is the one that has just been waited for
        break
    fi
    if [[ -n "$SERVERS" ]] && ! kill -0 "$SERVERS" 2>/dev/null; then
        SERVERS=''
        asked || { complain; fail "the engines have ended, see $LOGS/engine-*.log; the job ends"; }
    fi
    if [[ "$ASKED" == USR1 && -z "$LIMIT" ]]; then # a step that takes too long is done again in the next attempt
        (sleep "$SAVE_DEADLINE" && kill -KILL "$LEARNER") & LIMIT=$!
    fi
done

if [[ "$CODE" == 0 && "$ASKED" != TERM ]]; then # srun's code tells nothing where Slurm ended its tasks
    dismiss
    say "done: $RUN"
elif asked || [[ "$CODE" == 75 ]]; then
    requeue
else
    complain
    fail "a learner task failed (exit code $CODE), see $LOGS/rank-*.log; the job ends"
fi
