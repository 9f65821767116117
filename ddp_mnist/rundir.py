"""The run directory: its file names, and writes that are whole or not there."""

from __future__ import annotations

import json
import os
import platform
import secrets
import socket
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from ddp_mnist.config import TrainConfig
from ddp_mnist.errors import JobError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
WEIGHTS = "model.safetensors"


def create(config: TrainConfig) -> Path:
    """The run directory, made if it is not there. One rank calls this. Raises: JobError."""
    if config.output_dir is not None:
        path = config.output_dir
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".writable-{secrets.token_hex(4)}"
            probe.touch()
            probe.unlink()
        except FileExistsError as error:
            raise JobError(f"--output-dir {path} is a file; expected a directory. Choose another path.") from error
        except NotADirectoryError as error:
            raise JobError(f"--output-dir {path} lies below a file, not a directory. Choose another path.") from error
        except OSError as error:
            raise JobError(f"--output-dir {path} cannot be written: {error.strerror}. Choose another path.") from error
        return path
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{config.recipe}"
    for attempt in range(1, 1000):  # two jobs may start in one second
        path = Path("runs") / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            continue
        except OSError as error:
            raise JobError(f"{path} cannot be made: {error.strerror}. Choose a place with --output-dir.") from error
    raise JobError(f"runs/{name} and 998 more are taken. Choose a place with --output-dir.")


def write_atomic(path: Path, content: bytes) -> None:
    """`path` holds its old content or all of `content`, also after a crash or on a full disk. Raises: OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make renames in it survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())


def facts(world_size: int) -> dict[str, Any]:
    """Versions, git commit and how this attempt was launched, for config.json."""
    packages = ("ddp_mnist", "torch", "torchvision", "accelerate", "numpy", "safetensors")
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in packages},
        "git": _git(),
        "launch": {
            "command": sys.argv,
            "host": socket.gethostname(),
            "world_size": world_size,
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        },
    }


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
