"""Checkpoints and weights on disk: written whole or not at all, verified before they are used.

`checkpoints/step-XXXXXXXX/` holds model.safetensors, optimizer.safetensors, state.json and MANIFEST.json (sizes and
SHA-256). Nothing is pickled. The batch order follows from (seed, epoch), so the position is three integers and there
is no random state to keep.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import secrets
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.model import CNN
from ddp_mnist.run import directory

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig

log = logging.getLogger(__name__)

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
MANIFEST = "MANIFEST.json"
NAME = re.compile(r"step-\d{8,}")
TEMPORARY = ".tmp-"
DAMAGE = (
    *(FileNotFoundError, NotADirectoryError, IsADirectoryError),
    *(ValueError, KeyError, TypeError, safetensors.SafetensorError),
)
"""Exceptions of reading a damaged checkpoint; a disk that does not answer raises another OSError."""


@dataclass
class TrainState:
    """The position and totals of a run; with weights, optimizer and scaler, all that is needed to continue.

    One object for the whole attempt: the trainer moves the position on, `Metrics` the sums and seconds.
    """

    epoch: int = 0
    """Epoch in progress, from 0."""
    step_in_epoch: int = 0
    """Global batches of it that are done."""
    step: int = 0
    """Optimizer steps done in the whole run."""
    samples_seen: int = 0
    skipped_steps: int = 0
    """Steps that fp16's loss scaler left out."""
    train_seconds: float = 0.0
    eval_seconds: float = 0.0
    wall_seconds: float = 0.0
    """Over all attempts."""
    interval_loss: float = 0.0
    """Sum of the loss of the images since the last line of metrics.jsonl, each by the weights of its own step."""
    interval_correct: int = 0
    interval_images: int = 0

    def advance(self, global_size: int, *, skipped: bool = False) -> None:
        """Count a step on a global batch of so many items. `skipped`: by fp16's loss scaler."""
        self.step += 1
        self.step_in_epoch += 1
        self.samples_seen += global_size
        self.skipped_steps += skipped

    def end_epoch(self) -> None:
        """Go to the beginning of the next epoch."""
        self.epoch += 1
        self.step_in_epoch = 0


@dataclass(frozen=True)
class Snapshot:
    """The content of one checkpoint."""

    state: TrainState
    config: dict[str, Any]
    weights: dict[str, Tensor]
    """fp32, on the CPU, by parameter name"""
    optimizer: dict[str, Tensor]
    """`<parameter>.<name of the state>`, on the CPU"""
    scaler: dict[str, Any]
    """fp16's loss scaler; empty for other precisions"""
    metrics_bytes: int
    """Length of metrics.jsonl at this moment; what lies beyond belongs to a future that did not happen."""


class Checkpoints:
    """The checkpoints of one run directory. Only rank 0 writes."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        """Name the directory of the run, and how many of the newest to `keep`."""
        self.folder = run_dir / directory.CHECKPOINTS
        self.keep = keep

    def steps(self) -> list[Path]:
        """Return the published checkpoints, oldest first. A user's copies (`step-00000050-good`) are none of ours."""
        found = [path for path in self.folder.glob("step-*") if NAME.fullmatch(path.name) and path.is_dir()]
        return sorted(found, key=_step)

    def last_step(self) -> int | None:
        """Return the step of the newest one, verified or not; None: there is none."""
        return _step(self.steps()[-1]) if self.steps() else None

    def publish(self, snapshot: Snapshot) -> Path:
        """Write, flush, rename into place, then remove the oldest beyond `keep`. Raises: OSError."""
        target = self.folder / f"step-{snapshot.state.step:08d}"
        if target.exists():  # a stop right after a resume: the very same state
            return target
        if not self.folder.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            directory.sync_directory(self.folder.parent)
        temporary = self.folder / f"{TEMPORARY}{target.name}-{secrets.token_hex(4)}"
        try:
            temporary.mkdir()
            names = ("config", "scaler", "metrics_bytes")
            state = {"state": asdict(snapshot.state)} | {name: getattr(snapshot, name) for name in names}
            contents = {
                MODEL: safetensors.torch.save(snapshot.weights),
                OPTIMIZER: safetensors.torch.save(snapshot.optimizer),
                STATE: (json.dumps(state, indent=1) + "\n").encode(),
            }
            manifest = {name: _fingerprint(content) for name, content in contents.items()}
            contents[MANIFEST] = (json.dumps(manifest, indent=1) + "\n").encode()
            for name, content in contents.items():
                directory.write_synced(temporary / name, content)
            directory.sync_directory(temporary)
            temporary.rename(target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        directory.sync_directory(self.folder)
        for old in self.steps()[: -self.keep]:
            self._remove(old)
        return target

    def newest(self) -> tuple[Path, Snapshot] | None:
        """Return the newest checkpoint that verifies, or None. Set damaged ones aside, with a warning.

        Raises:
            OSError: The disk does not answer; the checkpoint may be whole.
        """
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            shutil.rmtree(leftover, ignore_errors=True)
        paths = self.steps()
        while paths:
            path = paths.pop()
            try:
                return path, read(path)
            except DAMAGE as error:
                aside = directory.set_aside(path, self.folder, "damaged")
                next_one = f"using {paths[-1].name}" if paths else "there is none before it: starting over"
                log.warning("%s is damaged (%s); set aside as %s, %s.", path, error, aside.name, next_one)
        return None

    def _remove(self, path: Path) -> None:
        """Rename it first, so that a kill in between leaves no half checkpoint."""
        doomed = path.with_name(f"{TEMPORARY}{path.name}-{secrets.token_hex(4)}")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def read(path: Path) -> Snapshot:
    """Return the content of a checkpoint. Raises: OSError, or one of DAMAGE where a byte is not as it was written."""
    manifest = json.loads((path / MANIFEST).read_bytes())
    contents = {}
    for name in (MODEL, OPTIMIZER, STATE):
        contents[name] = (path / name).read_bytes()
        found, expected = _fingerprint(contents[name]), manifest[name]
        if found != expected:
            raise ValueError(f"{name} has {found}, expected {expected}")
    values = json.loads(contents[STATE])
    values["state"] = TrainState(**values["state"])
    tensors = [safetensors.torch.load(contents[name]) for name in (MODEL, OPTIMIZER)]
    return Snapshot(weights=tensors[0], optimizer=tensors[1], **values)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _fingerprint(content: bytes) -> dict[str, Any]:
    return {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the network's state dict on the CPU in plain layout, floats as fp32.

    Raises:
        JobError: A weight is not finite.
    """
    tensors = {
        # A copy: safetensors refuses tensors that share memory, as tied weights do.
        name: (value.detach().float() if value.is_floating_point() else value.detach()).cpu().contiguous().clone()
        for name, value in network.state_dict().items()
    }
    for name, value in tensors.items():
        if not math.isfinite(value.double().abs().sum().item()):
            raise JobError(f"the weights of {name} are not finite; they are not saved.", stop_reason="nan")
    return tensors


def publish_weights(network: nn.Module, path: Path) -> None:
    """Write `model.safetensors`, without metadata: equal weights are equal files. Raises: JobError."""
    content = safetensors.torch.save(weights(network))
    with directory.translate_write_errors(path):
        directory.write_atomic(path, content)


def load_weights(network: nn.Module, path: Path, *, of_run: bool = False) -> None:
    """Fill the network from a `model.safetensors`: that of --init-from, or `of_run`, of a run directory.

    Raises:
        JobError: The file is missing, damaged or not finite, or does not fit the run directory it lies in.
        UsageError: The file of --init-from does not fit.
    """
    named = str(path) if of_run else f"--init-from {path}"
    try:
        tensors = safetensors.torch.load_file(path)
        network.load_state_dict(tensors)
    except (OSError, safetensors.SafetensorError) as error:
        raise JobError(f"{named} cannot be read: {error}") from error
    except RuntimeError as error:
        if of_run:
            raise JobError(f"{named} does not fit the network of {directory.CONFIG} beside it. {error}") from error
        raise UsageError(f"{named} does not fit this network; do the --widths agree? {error}") from error
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise JobError(f"{named} holds weights that are not finite; use another file.")


@dataclass(frozen=True)
class SavedRun:
    """The weights that a run directory holds, and what they belong to."""

    config: TrainConfig
    network: CNN
    source: Path
    """The file or checkpoint that they are from."""
    step: int | None
    """None where nothing says which."""
    summary: dict[str, Any]
    """summary.json, where it is about these weights; else empty."""


def open_saved(run_dir: Path) -> SavedRun:
    """Return the final weights of a run of our own network, or the newest that verify while it is not finished.

    If summary.json has no counts, `model.safetensors` may be from an earlier stop at --max-steps: then the newest
    checkpoint is at least as new.

    Raises:
        JobError: There are none, or the network is not ours.
    """
    config = directory.read_settings(run_dir)
    if config.has_user_data or directory.read_json(run_dir / directory.CONFIG).get("network"):
        raise JobError(f"{run_dir} is of a script with a network and data of its own: only that script can read it.")
    summary = directory.read_json(run_dir / directory.SUMMARY)
    scored = summary.get("test_count") is not None
    network, path = CNN(widths=config.widths), run_dir / directory.WEIGHTS
    if not (scored and path.exists()):
        for checkpoint in reversed(Checkpoints(run_dir, config.keep_checkpoints).steps()):
            try:
                snapshot = read(checkpoint)
                network.load_state_dict(snapshot.weights)
            except (OSError, RuntimeError, *DAMAGE) as error:
                log.warning("%s is damaged (%s); looking at the one before it.", checkpoint, error)
                continue
            step = snapshot.state.step
            return SavedRun(config, network, checkpoint, step, summary if scored and summary["steps"] == step else {})
    if not path.exists():
        raise JobError(
            f"{run_dir} holds no weights yet: neither {directory.WEIGHTS} nor a checkpoint that verifies. Wait for its "
            "first checkpoint, or continue the run."
        )
    load_weights(network, path, of_run=True)
    return SavedRun(config, network, path, summary.get("steps") if scored else None, summary if scored else {})
