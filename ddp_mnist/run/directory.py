"""The run directory: its file names, and writes that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from ddp_mnist.config import TrainConfig
from ddp_mnist.errors import JobError

log = logging.getLogger(__name__)

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOCK = ".lock"
SUMMARY = "summary.json"
WEIGHTS = "model.safetensors"
WANDB = "wandb"
WANDB_STATE = "wandb.json"
PATIENCE = 60.0
"""Seconds that a job waits for another one to leave the run directory."""


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
    names = _numbered(f"{time.strftime('%Y%m%d-%H%M%S')}-{config.recipe}")
    while True:
        path = Path("runs") / next(names)
        try:
            path.mkdir(parents=True)
            return path
        except OSError as error:
            if not os.path.exists(path):  # else another job has started in the same second
                raise JobError(f"{path} cannot be made: {error.strerror}. Choose a place with --output-dir.") from error


def lock(path: Path, patience: float = PATIENCE) -> filelock.BaseFileLock | None:
    """Hold the directory for this job; the kernel lets go when the process dies. A predecessor that is still saving
    gets `patience` seconds. None where the file system has no locks. Raises: JobError."""
    # What filelock would fall back to, a file that is there or not, outlives a killed job.
    holder = filelock.FileLock(path / LOCK, timeout=0, fallback_to_soft=False)
    try:
        holder.acquire()
    except filelock.Timeout:
        log.warning("%s is held by another job; waiting up to %.0f s for it to finish.", path, patience)
        try:
            holder.acquire(timeout=patience)
        except filelock.Timeout as error:
            raise JobError(
                f"--output-dir {path} is held by another job that is still running. Wait for it, stop it, or choose "
                "another directory.",
                stop_reason="locked",
            ) from error
    except OSError as error:
        log.warning("%s cannot be locked (%s): see to it that only one job uses it.", path, error)
        return None
    return holder


def start_over(path: Path) -> None:
    """Set aside what a run has left in the directory; nothing is deleted. Raises: OSError."""
    names = (CHECKPOINTS, METRICS, SUMMARY, WEIGHTS, CONFIG, WANDB, WANDB_STATE)
    present = [path / name for name in names if (path / name).exists()]
    if present:
        aside = path / f"old-{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        aside.mkdir()
        for item in present:
            item.rename(aside / item.name)


def set_aside(path: Path, folder: Path, label: str) -> Path:
    """Rename `path` to a free name in `folder` that begins with `label`; returns it. Raises: OSError."""
    names = _numbered(f"{label}-{path.name}")
    target = next(folder / name for name in names if not (folder / name).exists())
    path.rename(target)
    return target


def _numbered(name: str) -> Iterator[str]:
    """The name, then others for where it is taken."""
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def remove(path: Path) -> None:
    """Raises: JobError."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise JobError(f"{path} cannot be removed: {error.strerror}.") from error


def read_settings(path: Path) -> TrainConfig:
    """The settings of the run in directory `path`; changes nothing. Raises: JobError."""
    file = path / CONFIG
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        if not path.exists():
            raise JobError(f"{path} does not exist; expected a run directory, such as a --output-dir.") from error
        raise JobError(f"{path} is not a run directory of ddp_mnist: there is no {CONFIG} in it.") from error
    except NotADirectoryError as error:
        raise JobError(f"{path} is a file; expected a run directory: the one with {CONFIG} in it.") from error
    except OSError as error:
        raise JobError(f"{file} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise JobError(f"{file} is damaged: {error}.") from error
    settings = content.get("settings") if isinstance(content, dict) else None
    if not isinstance(settings, dict):
        raise JobError(f"{path} is not a run directory of ddp_mnist: its {CONFIG} has no settings.")
    try:
        return TrainConfig.from_dict(settings)
    except (TypeError, ValueError) as error:  # of another version, or edited by hand
        raise JobError(f"{file} is not what this version writes: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """{} where there is no such file or it is not whole."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Raise JobError where the file cannot be written."""
    try:
        yield path
    except OSError as error:
        raise JobError(f"{path} could not be written: {error.strerror}.") from error


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
    """Make renames in it survive a power cut, where the file system can: some network ones do not sync directories."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Raises: OSError."""
    write_atomic(path, (_pretty(finite(value)) + "\n").encode())


def _pretty(value: Any, indent: str = "  ") -> str:
    """JSON with a line for each entry of an object, and one for a whole list: a confusion matrix has 100 numbers."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    lines = (f"{indent}{json.dumps(key)}: {_pretty(entry, indent + '  ')}" for key, entry in value.items())
    return "{\n" + ",\n".join(lines) + "\n" + indent[2:] + "}"


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """null for NaN and infinity, which Python writes as words that are not JSON."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }
