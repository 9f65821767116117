#!/usr/bin/env bash
# Prints ADDRESS:PORT where the ranks of a job meet, the same wherever in the job it is called.
#   slurm/meet.sh NODES NUMBER     the nodes as SLURM lists them, n[0-3]; the number of this start or step of the job
set -euo pipefail

: "${SLURM_JOB_ID:?is not set; usage: slurm/meet.sh NODES NUMBER, in a job}"
first=$(scontrol show hostnames "$1" | sed -n 1p)
# The address by which SLURM itself reaches the node: the node's name may not be in DNS.
address=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2) || true
# Another port for every job, start and step: jobs may share a node, and a closed port stays taken for a while. All are
# below 32768, since the kernel assigns ports from 32768 on by itself.
echo "${address:-$first}:$((10000 + (SLURM_JOB_ID * 21 + $2 % 21) % 22000))"
