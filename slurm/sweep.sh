#!/usr/bin/env bash
# A job array over a text file: one line of training flags, one run. On the login node, from the repository's root:
#
#   slurm/sweep.sh FILE [sbatch options] [-- training flags for all runs]
#   slurm/sweep.sh rates.txt --gpus-per-node=1 -- --epochs 3
#
# Lines of FILE that are empty or begin with # do not count. It checks every line, submits the array, and prints the
# command for the final table. Each task is slurm/train.sh with its own log, run directory and requeues, and with
# PROGRAM and the other settings from the environment.

# sbatch is given this file and reads these lines, not those of slurm/train.sh, which has their reasons.
#SBATCH --job-name=ddp_mnist
#SBATCH --nodes=1
#SBATCH --time=01:00:00
#SBATCH --signal=USR2@120
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail
usage="usage: slurm/sweep.sh FILE [sbatch options] [-- training flags for all runs]"

fail() {
    echo "error: $1" >&2
    exit 2
}

read_lines() { # FILE -> lines, without comments and empty ones
    [[ -r $1 ]] || fail "$1 cannot be read. $usage"
    mapfile -t lines < <(sed -E 's/^[[:space:]]+|[[:space:]]+$//g; /^(#|$)/d' "$1")
    ((${#lines[@]})) || fail "$1 has no line with flags"
}

words() { # a line -> flags, with quotes as in a shell but nothing expanded
    mapfile -d '' -t flags < <(xargs printf '%s\0' <<<"$1" 2>/dev/null)
    wait "$!" || fail "unmatched quote in $file: $1. Quote as in a shell: \"Bob's\""
}

(($#)) || fail "a file with lines of flags is missing. $usage"
file=$1
shift

if [[ -n ${SLURM_JOB_ID:-} && -n ${SLURM_ARRAY_TASK_ID:-} ]]; then # a task of the array: run one line
    cd "$SLURM_SUBMIT_DIR"
    read_lines "$file"
    ((SLURM_ARRAY_TASK_ID >= 1 && SLURM_ARRAY_TASK_ID <= ${#lines[@]})) ||
        fail "no line $SLURM_ARRAY_TASK_ID in $file: its lines are --array=1-${#lines[@]}"
    words "${lines[SLURM_ARRAY_TASK_ID - 1]}"
    [[ ${1:-} != -- ]] || shift
    exec bash slurm/train.sh "$@" "${flags[@]}"
fi

[[ -z ${SLURM_JOB_ID:-} || -z ${SLURM_NODEID:-} ]] || fail "not an array: run slurm/sweep.sh on the login node. $usage"
[[ -f slurm/train.sh ]] || fail "run it from the repository's root"
options=()
while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
done
[[ ${1:-} != -- ]] || shift
read_lines "$file"
# shellcheck source=slurm/python.sh
source slurm/python.sh

for line in "${lines[@]}"; do
    words "$line"
    "$python" -m launch.check --program="${PROGRAM:-}" -- --dataset mnist "$@" "${flags[@]}" || fail "in $file: $line"
done
# Tasks may start days later: they read a copy, so that FILE can be edited meanwhile.
mkdir -p runs
copy=$(mktemp "runs/sweep-$(date +%Y%m%d-%H%M%S)-XXXX.txt")
printf '%s\n' "${lines[@]}" >"$copy"
array=$(sbatch --parsable --array="1-${#lines[@]}" "${options[@]}" slurm/sweep.sh "$copy" "$@") || exit
array=${array%%;*}
echo "Submitted batch job $array: ${#lines[@]} runs, from $copy"
echo "log    slurm-${array}_<line>.out"
echo "table  python -m ddp_mnist.report --table runs/slurm-${array}_*"
