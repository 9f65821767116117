#!/usr/bin/env bash
# Sets $python: runs ENV_SETUP if it is set; else takes the active environment or, without one, .venv in this folder.
# The other scripts run  source slurm/python.sh  in the repository's root.
set -euo pipefail

if [[ -n ${ENV_SETUP:-} ]]; then
    set +eu # activation scripts are not written for strict shells
    given=("$@")
    set -- # or conda's script would read the job's flags as its own
    eval "$ENV_SETUP"
    set -- "${given[@]}"
    set -eu
elif [[ -z ${VIRTUAL_ENV:-} && ${CONDA_DEFAULT_ENV:-base} == base && -f .venv/bin/activate ]]; then
    # shellcheck disable=SC1091 # exists on the user's machine only
    source .venv/bin/activate
fi
python=$(command -v python || command -v python3 || echo python)
modules=$("$python" -c 'from importlib.util import find_spec
print(*(name for name in ("ddp_mnist", "torch", "accelerate", "tyro") if find_spec(name) is None))')
if [[ -n $modules ]]; then
    echo "error: not importable on $(hostname) with $python: $modules. Set ENV_SETUP, see docs/cluster.md" >&2
    exit 1
fi
