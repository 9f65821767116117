#!/usr/bin/env bash
# One rank: SLURM's variables become torch's, then this process becomes Python, so that signals reach it directly.
# Started by srun: in slurm/train.sh, or by hand inside an allocation, `srun slurm/rank.sh python -m ddp_mnist.doctor`.
# Never without srun: `salloc` leaves variables of the same names in interactive shells.
set -euo pipefail

: "${SLURM_STEP_ID:?is started by srun: srun slurm/rank.sh python -m ..., or sbatch slurm/train.sh}"
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_STEP_NUM_TASKS

# The numbers of the ranks on this node, such as 2,3.
IFS=, read -ra neighbours <<<"$SLURM_GTIDS"
export LOCAL_WORLD_SIZE=${#neighbours[@]}

if [[ -z ${MASTER_ADDR:-} ]]; then # started by hand; slurm/train.sh sets MASTER_ADDR
    meeting=$("${0%/*}/meet.sh" "$SLURM_STEP_NODELIST" "$((${SLURM_RESTART_COUNT:-0} + SLURM_STEP_ID))")
    export MASTER_ADDR=${meeting%:*} MASTER_PORT=${meeting##*:}
fi

# The words in front of the flags in the command that continues the run; slurm/train.sh sets its own words.
words="$*"
export DDP_MNIST_LAUNCHER=${DDP_MNIST_LAUNCHER:-"srun --ntasks=$WORLD_SIZE slurm/rank.sh ${words%% --*}"}

exec "$@"
