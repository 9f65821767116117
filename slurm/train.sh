#!/usr/bin/env bash
# Train on a cluster. From the repository's root, with SLURM's options in front and the training's behind:
#
#   sbatch slurm/train.sh                                                      one process on a CPU
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-gpu=4 slurm/train.sh --epochs 20
#
# docs/cluster.md has more, such as the settings from the environment of sbatch: ENV_SETUP, MAX_REQUEUES, PROGRAM.
# Each #SBATCH line is a default: an option of the sbatch command and SBATCH_* variables beat it.

# The name that squeue shows.
#SBATCH --job-name=ddp_mnist
# One machine.
#SBATCH --nodes=1
# One hour: short jobs start earlier, and a longer run goes on in the requeued job.
#SBATCH --time=01:00:00
# Two minutes before the time limit all ranks are told to save and exit. Not B:, which would tell this shell only.
#SBATCH --signal=USR2@120
# The job may run again after a dead node, preemption or its own request, even if the cluster's default is no requeue.
#SBATCH --requeue
# A restarted job adds to its log instead of emptying it.
#SBATCH --open-mode=append

set -euo pipefail

fail() { # code, message
    echo "error: $2" >&2
    exit "$1"
}

[[ -n ${SLURM_JOB_ID:-} ]] || fail 2 "this is a batch script: submit it with  sbatch slurm/train.sh [training flags]"
# SLURM runs a copy of this file from its spool directory: the repository is where sbatch was called.
cd "$SLURM_SUBMIT_DIR"
[[ -f slurm/rank.sh && -d ddp_mnist ]] || fail 2 "$SLURM_SUBMIT_DIR is not the repository's root: submit from there"
# shellcheck source=slurm/python.sh
source slurm/python.sh

# slurm/sweep.sh puts @FILE in front of the flags: each task of the array adds its own line of FILE.
if [[ ${1:-} == @* ]]; then
    line=$(sed -n "${SLURM_ARRAY_TASK_ID:-0}p" "${1#@}") || fail 2 "$1 is for an array: sbatch --array=2 slurm/train.sh $1"
    [[ -n $line ]] || fail 2 "${1#@} has no line $SLURM_ARRAY_TASK_ID"
    eval "set -- \"\${@:2}\" $line"
fi

# Ask SLURM, not the environment: a job that is submitted from inside another job inherits that job's variables.
shown=$(scontrol --oneliner show job "$SLURM_JOB_ID" | grep "^JobId=$SLURM_JOB_ID ")
field() { sed -nE "s/.* $1=([^ ]+).*/\1/p" <<<"$shown"; }
job=$SLURM_JOB_ID array=$(field ArrayJobId)
# With the bare job id of one of its tasks, scontrol would requeue the whole array.
[[ -z $array ]] || job=${array}_$(field ArrayTaskId)
restarts=$(field Restarts)
max_requeues=${MAX_REQUEUES:-20}
[[ $max_requeues =~ ^[0-9]+$ ]] || fail 2 "MAX_REQUEUES is $max_requeues; expected a whole number"

# Tasks: one per GPU; without GPUs as many as were asked for, else one per node. `layout` is for srun below; `shape` has
# the options of sbatch for the same, to print the command that continues the run.
nodes=$SLURM_JOB_NUM_NODES
gpus=${SLURM_GPUS_ON_NODE:-0}
layout=() shape="" cpus_option=--cpus-per-task
# With --gpus-per-task each rank would see one GPU and call it 0: NCCL wants to see its neighbours' too. Newer SLURMs
# put it into the second variable; the third and --ntasks-per-node exclude each other.
unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK SLURM_NTASKS_PER_GPU
if ((gpus)); then
    tasks=$((gpus * nodes))
    asked=${SLURM_GPUS:-$tasks} # may have a type in front: a100:8
    ((tasks == ${asked##*:})) ||
        fail 2 "the $asked GPUs are spread unevenly over $nodes nodes: ask with --gpus-per-node instead of --gpus"
    layout+=(--ntasks-per-node="$gpus")
    shape=" --gpus-per-node=$gpus" cpus_option=--cpus-per-gpu
else
    tasks=$(field NumTasks)
    ((tasks == nodes)) || shape=" --ntasks=$tasks"
fi
((nodes == 1)) || shape=" --nodes=$nodes$shape"
on_node=$(((tasks + nodes - 1) / nodes))

# srun does not take --cpus-per-task over from sbatch (SLURM 22.05 and later), and without it pins a rank to one CPU.
share=$((SLURM_CPUS_ON_NODE / on_node))
cpus=${SLURM_CPUS_PER_TASK:-$share}
((cpus <= share)) || cpus=$share
if ((cpus == 0)); then
    cpus=1
    layout+=(--overcommit)
    echo "hint: $on_node ranks share $SLURM_CPUS_ON_NODE CPU on each node; give each its own with --cpus-per-gpu=4"
fi
((cpus == 1)) || shape+=" $cpus_option=$cpus"
layout+=(--nodes="$nodes" --ntasks="$tasks" --cpus-per-task="$cpus")

meeting=$(slurm/meet.sh "$SLURM_JOB_NODELIST" "$restarts")
export MASTER_ADDR=${meeting%:*} MASTER_PORT=${meeting##*:}
# The user's flags come last, so they beat these three.
flags=(--dataset mnist --output-dir "runs/slurm-$job" --threads "$cpus" "$@")
# The words in front of the flags in the command that continues the run.
export DDP_MNIST_LAUNCHER="sbatch$shape slurm/train.sh"
[[ -z ${PROGRAM:-} ]] || DDP_MNIST_LAUNCHER="PROGRAM=$(printf %q "$PROGRAM") $DDP_MNIST_LAUNCHER"
program=("${PROGRAM:-}")
[[ -f ${PROGRAM:-} ]] || read -ra program <<<"${PROGRAM:--m ddp_mnist.train}"
# --fresh is for the first start only: a requeued job would not continue the run but start over, every time.
((restarts == 0)) || flags+=(--no-fresh)
export DDP_MNIST_JOB_ID=$job DDP_MNIST_RESTARTS=$restarts

echo "job $job, start $((restarts + 1)): $tasks ranks on $SLURM_JOB_NODELIST, CPUs per rank: $cpus," \
    "GPUs per node: $gpus, meeting at $meeting"
# Check the flags here: one error message after a second, not one per rank after the imports.
"$python" -m launch.check --world-size "$tasks" --program="${PROGRAM:-}" -- "${flags[@]}"

code=0
# --kill-on-bad-exit: else the ranks wait for a dead rank until the time limit. --wait: rank 0 draws the pictures when
# the others are done, maybe for longer than a cluster's WaitTime. --export: else sbatch --export=NONE applies to srun.
srun "${layout[@]}" --export=ALL --kill-on-bad-exit=1 --wait=0 --label \
    slurm/rank.sh "$python" "${program[@]}" "${flags[@]}" || code=$?

if ((code > 128)); then # rank 0 says how to go on, but it may be the one that was killed
    echo "to continue from the last checkpoint, if there is one, type"
    echo "  $DDP_MNIST_LAUNCHER$(printf ' %q' "${flags[@]}") --no-fresh"
fi
((code == 75)) || exit "$code"
((restarts < max_requeues)) ||
    fail "$code" "stopped with a checkpoint, but not requeued: MAX_REQUEUES=$max_requeues is reached"
echo "stopped with a checkpoint: back into the queue (requeue $((restarts + 1)) of at most $max_requeues)"
scontrol requeue "$job" || fail "$code" "SLURM does not requeue this job"
exit "$code" # SLURM ignores this code after it has accepted the requeue
