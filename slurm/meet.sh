#!/usr/bin/env bash
# Where the ranks of a job meet: prints ADDRESS:PORT, the same wherever in the job it is called.
#
#   slurm/meet.sh NODES NUMBER     the nodes as SLURM lists them, n[0-3]; which start or which step of the job this is
set -euo pipefail

if (($# != 2)) || [[ -z ${SLURM_JOB_ID:-} ]]; then
    echo "usage: slurm/meet.sh NODES NUMBER, in a job; slurm/train.sh and slurm/rank.sh call it" >&2
    exit 2
fi
first=$(scontrol show hostnames "$1" | sed -n 1p)
# The address by which SLURM itself reaches the node; its name need not resolve.
address=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2) || true
# Another port for every job, and for its next start or step: two jobs may share a node, a closed port stays taken;
# below 32768, where the kernel deals out ports by itself.
echo "${address:-$first}:$((10000 + (SLURM_JOB_ID * 21 + $2 % 21) % 22000))"
