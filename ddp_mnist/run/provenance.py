"""Collect what a result came from: versions, commit and launch."""

import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from ddp_mnist.distributed.launcher import local_world_size_from_environment


def facts(world_size: int) -> dict[str, Any]:
    """Return `versions`, `git` (None outside a checkout) and `launch` of a job of `world_size` ranks."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("ddp_mnist", "torch", "torchvision", "accelerate", "numpy", "safetensors", "wandb"):
        versions[name] = None
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    launch = {
        "command": without_secrets(sys.argv),
        "host": socket.gethostname(),
        "world_size": world_size,
        "nodes": world_size // local_world_size_from_environment(),
        # What starts the job on a cluster says so.
        "job_id": os.environ.get("DDP_MNIST_JOB_ID"),
        "restart_count": int(os.environ.get("DDP_MNIST_RESTARTS", "0")),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return {"versions": versions, "git": _git(), "launch": launch}


def without_secrets(words: Sequence[str]) -> list[str]:
    """Return the command line with *** for the values of --...key, --token=... and the like."""
    pattern = r"(?i)((?:^|\0)-[^\0=]*(?:key|token|secret|passw)[^\0=]*[\0=])[^\0]*"
    return re.sub(pattern, r"\1***", "\0".join(words)).split("\0")


def _git() -> dict[str, Any] | None:
    """Return commit and dirtiness of the checkout that tracks this file; None for an installed package."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
