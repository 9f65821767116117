#!/usr/bin/env bash
# A job array over a text file: one line of training flags, one run. On the login node, from the repository's root:
#
#   slurm/sweep.sh rates.txt --gpus-per-node=1 -- --epochs 3
#
# Lines of FILE that are empty or begin with # do not count. Each task of the array is slurm/train.sh, with its own log,
# run directory and requeues.

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

words() { # a line -> flags, with quotes as in a shell but nothing expanded
    mapfile -d '' -t flags < <(xargs printf '%s\0' <<<"$1" 2>/dev/null)
    wait "$!" || fail "unmatched quote in $file: $1. Quote as in a shell: \"Bob's\""
}

(($#)) || fail "a file with lines of flags is missing. $usage"
task=${SLURM_ARRAY_TASK_ID:-}
[[ -z $task ]] || cd "$SLURM_SUBMIT_DIR"
file=$1
shift
options=()
while (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
    shift
done
[[ ${1:-} != -- ]] || shift
[[ -r $file ]] || fail "$file cannot be read. $usage"
mapfile -t lines < <(sed -E 's/^[[:space:]]+|[[:space:]]+$//g; /^(#|$)/d' "$file")
((${#lines[@]})) || fail "$file has no line with flags"

if [[ -n $task ]]; then # run one line
    ((0 < task && task <= ${#lines[@]})) || fail "no line $task in $file: its lines are --array=1-${#lines[@]}"
    words "${lines[task - 1]}"
    exec bash slurm/train.sh "${options[@]}" "$@" "${flags[@]}"
fi

[[ -f slurm/train.sh ]] || fail "run it from the repository's root"
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
array=$(sbatch --parsable --array="1-${#lines[@]}" "${options[@]}" slurm/sweep.sh "$copy" -- "$@") || exit
echo "Submitted batch job $array: ${#lines[@]} runs, from $copy"
echo "log    slurm-${array}_<line>.out"
echo "table  python -m ddp_mnist.report --table runs/slurm-${array}_*"
