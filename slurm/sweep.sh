#!/usr/bin/env bash
# A job array over a text file: each line has the flags of one run. On the login node, from the repository's root:
#
#   slurm/sweep.sh rates.txt --gpus-per-node=1 -- --epochs 3
#
# Lines of FILE that are empty or begin with # do not count; the others are read as a shell reads them. Each task of the
# array is slurm/train.sh, with its own log, run directory and requeues.
set -euo pipefail

fail() {
    echo "error: $1" >&2
    exit 2
}

file=${1:-}
[[ -r $file ]] || fail "'$file' cannot be read. usage: slurm/sweep.sh FILE [sbatch options] [-- training flags for all]"
options=()
while shift && (($#)) && [[ $1 != -- ]]; do
    options+=("$1")
done
(($# == 0)) || shift
mapfile -t lines < <(sed -E 's/[[:space:]]+$//; /^[[:space:]]*(#|$)/d' "$file")
((${#lines[@]})) || fail "$file has no line with flags"

# shellcheck source=slurm/python.sh
source slurm/python.sh
flags=()
for line in "${lines[@]}"; do
    eval "flags=($line"$'\n'")" || fail "in $file: $line"
    "$python" -m launch.check --program="${PROGRAM:-}" -- --dataset mnist "$@" "${flags[@]}" || fail "in $file: $line"
done

# Tasks may start days later: they read a copy, so that FILE can be edited meanwhile.
mkdir -p runs
copy=$(mktemp "runs/sweep-$(date +%Y%m%d-%H%M%S)-XXXX.txt")
printf '%s\n' "${lines[@]}" >"$copy"
array=$(sbatch --parsable --array="1-${#lines[@]}" "${options[@]}" slurm/train.sh "@$copy" "$@")
array=${array%;*} # with --clusters sbatch adds the cluster's name
echo "Submitted batch job $array: ${#lines[@]} runs, from $copy"
echo "log    slurm-${array}_<line>.out"
echo "table  python -m ddp_mnist.report --table runs/slurm-${array}_*"
