"""Where a result comes from: versions, git commit and how the attempt was launched."""

from __future__ import annotations

import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ddp_mnist.distributed.launcher import local_world_size_from_environment


def facts(world_size: int) -> dict[str, Any]:
    """JSON types: `versions`, `git` (None outside a checkout), and the `launch`, of `world_size` ranks."""
    packages = ("ddp_mnist", "torch", "torchvision", "accelerate", "numpy", "safetensors", "wandb")
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "git": _git(),
        "launch": {
            "command": without_secrets(sys.argv),
            "host": socket.gethostname(),
            "world_size": world_size,
            "nodes": world_size // local_world_size_from_environment(),
            # What starts the job on a cluster says so.
            "job_id": os.environ.get("DDP_MNIST_JOB_ID"),
            "restart_count": int(os.environ.get("DDP_MNIST_RESTARTS", "0")),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    }


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line less what follows words such as --token: a script's own arguments may hold anything."""
    kept: list[str] = []
    hide = False
    for word in words:
        name, equals, _ = word.partition("=")
        secret = re.search("key|token|secret|passw", name, re.IGNORECASE) is not None and name.startswith("-")
        kept.append("***" if hide else f"{name}=***" if secret and equals else word)
        hide = secret and not equals
    return kept


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git() -> dict[str, Any] | None:
    """Commit and dirtiness of the checkout this file is tracked in; None for an installed package."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", "-C", str(here.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None
