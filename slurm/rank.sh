#!/usr/bin/env bash
# One rank: SLURM's variables become torch's, then this process becomes Python, so that signals reach it directly.
# Started by srun: in slurm/train.sh, or by hand inside an allocation, `srun slurm/rank.sh python -m ddp_mnist.doctor`.
# Never without srun: `salloc` leaves variables of the same names in interactive shells.
set -euo pipefail

: "${SLURM_STEP_ID:?is started by srun: srun slurm/rank.sh python -m ..., or sbatch slurm/train.sh}"
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS

# Ranks on this node, from a list such as 2(x3),1: three nodes with two tasks each, then one with one.
node=$SLURM_NODEID
IFS=, read -ra groups <<<"$SLURM_STEP_TASKS_PER_NODE"
for group in "${groups[@]}"; do
    count=${group%%(*} repeat=1
    [[ $group != *x* ]] || repeat=${group##*x} repeat=${repeat%)}
    ((node >= repeat)) || break
    node=$((node - repeat))
done
export LOCAL_WORLD_SIZE=$count

if [[ -z ${MASTER_ADDR:-} ]]; then # by hand; slurm/train.sh sets it
    meeting=$("${0%/*}/meet.sh" "$SLURM_STEP_NODELIST" "$((${SLURM_RESTART_COUNT:-0} + SLURM_STEP_ID))")
    export MASTER_ADDR=${meeting%:*} MASTER_PORT=${meeting##*:}
fi

# The words in front of the flags in the command that continues the run; slurm/train.sh has its own.
program=()
for word in "$@"; do # up to a script, or to the module behind -m
    program+=("$(printf %q "$word")")
    [[ $word != *.py && ${before:-} != -m ]] || break
    before=$word
done
export DDP_MNIST_LAUNCHER=${DDP_MNIST_LAUNCHER:-"srun --ntasks=$WORLD_SIZE slurm/rank.sh ${program[*]}"}

exec "$@"
