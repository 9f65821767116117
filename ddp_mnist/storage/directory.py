"""The run directory: its file names, its lock, and writes that are whole or not there."""

import contextlib
import errno
import itertools
import json
import logging
import math
import os
import secrets
import tempfile
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
PATIENCE = 60.0  # seconds that a job waits for another one to leave the run directory


def create(config: TrainConfig) -> Path:
    """Return the run directory, and make it if it is not there. Call it on one rank only. Raises: JobError."""
    path = config.output_dir
    try:
        if path is None:
            return make_new(Path("runs", f"{time.strftime('%Y%m%d-%H%M%S')}-{config.recipe}"))
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        name = "runs" if path is None else f"--output-dir {path}"
        why = "it is a file, or lies below one" if isinstance(error, FileExistsError) else error.strerror
        raise JobError(f"{name} cannot be written: {why}. Choose another path with --output-dir.") from error


def make_new(path: Path) -> Path:
    """Make the directory, or the first of `path-2`, `path-3`... that is not there. Return it. Raises: OSError."""
    for number in itertools.count(1):
        target = path.with_name(f"{path.name}-{number}") if number > 1 else path
        with contextlib.suppress(FileExistsError):
            target.mkdir(parents=True)
            break
    return target


def lock(path: Path, patience: float = PATIENCE) -> filelock.BaseFileLock | None:
    """Hold the run directory until the returned lock is released or the process dies.

    `patience`: seconds to wait for an earlier job that is still saving. Returns None, after a warning, where the
    file system has no locks. Raises JobError: another job keeps the directory.
    """
    # filelock's fallback, a lock by the mere existence of a file, would outlive a killed job.
    holder = filelock.FileLock(path / LOCK, timeout=0, fallback_to_soft=False)
    try:
        with contextlib.suppress(filelock.Timeout):
            return holder.acquire().lock
        log.warning("%s is held by another job; waiting up to %.0f s for it to finish.", path, patience)
        return holder.acquire(timeout=patience).lock
    except filelock.Timeout as error:
        raise JobError(
            f"--output-dir {path} is held by another job that is still running. Wait for it, stop it, or choose "
            "another directory.",
            stop_reason="locked",
        ) from error
    except OSError as error:
        log.warning("%s cannot be locked (%s): see to it that only one job uses it.", path, error)
        return None


def start_over(path: Path) -> None:
    """Set aside what a run has left in the directory; delete nothing. Raises: JobError."""
    names = (CHECKPOINTS, METRICS, SUMMARY, WEIGHTS, CONFIG, WANDB, WANDB_STATE, "report.html")
    present = [*(path / name for name in names if (path / name).exists()), *path.glob("*.png")]
    if present:
        with translate_write_errors(path):
            aside = make_new(path / f"old-{time.strftime('%Y%m%d-%H%M%S')}")
            for item in present:
                item.rename(aside / item.name)


def read_settings(path: Path) -> TrainConfig:
    """Return the settings of the run in directory `path`. Raises JobError: this version cannot read any there."""
    file = path / CONFIG
    try:
        return TrainConfig(**json.loads(file.read_bytes())["settings"])
    except OSError as error:
        raise JobError(
            f"{path} is not a run directory of ddp_mnist, such as an --output-dir: {file} cannot be read "
            f"({error.strerror})."
        ) from error
    except (KeyError, TypeError, ValueError) as error:
        raise JobError(f"{file} is damaged, or not what this version writes: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in the file; {} where there is no such file or it is not whole."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


@contextlib.contextmanager
def translate_write_errors(path: Path) -> Iterator[Path]:
    """Raise JobError where the file cannot be written."""
    try:
        yield path
    except OSError as error:
        raise JobError(f"{path} could not be written: {error.strerror}.") from error


def write_atomic(path: Path, content: bytes) -> None:
    """Write `path`: even after a crash it holds either the old content or all of the new content. Raises: OSError."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_directory(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it. Raises: OSError."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Make renames in a directory survive a power cut, except on network file systems that cannot sync directories."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write the object, a line for each entry. Raises: OSError."""
    write_atomic(path, (format_json(finite(value)) + "\n").encode())


def format_json(value: Any, indent: str = "  ") -> str:
    """Return JSON with one line for a whole list: a confusion matrix has 100 numbers."""
    if not isinstance(value, dict) or not value:
        return json.dumps(value)
    lines = (f"{indent}{json.dumps(key)}: {format_json(entry, indent + '  ')}" for key, entry in value.items())
    return "{\n" + ",\n".join(lines) + "\n" + indent[2:] + "}"


def finite(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record with null for NaN and infinity, which Python writes as words that are not JSON."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in record.items()
    }


def format_setting(value: Any) -> str:
    """Return a setting as a user would type it."""
    return " ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)
