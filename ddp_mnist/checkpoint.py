"""What a run is at one moment: the position, the totals, the weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ddp_mnist import rundir
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.model import CNN


@dataclass
class TrainState:
    """The position and totals of a run; with weights and optimizer, all that continuing means."""

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
    losses: list[float] = field(default_factory=list)
    """Global mean loss of each step since the last line of metrics.jsonl."""

    def advance(self, global_size: int) -> None:
        self.step += 1
        self.step_in_epoch += 1
        self.samples_seen += global_size

    def end_epoch(self) -> None:
        self.epoch += 1
        self.step_in_epoch = 0


def weights(net: CNN) -> dict[str, Tensor]:
    """The network's state dict, fp32 on the CPU in plain layout. Raises: JobError when a value is not finite."""
    tensors = {name: value.detach().float().cpu().contiguous() for name, value in net.state_dict().items()}
    for name, value in tensors.items():
        if not math.isfinite(value.double().abs().sum().item()):
            raise JobError(f"the weights of {name} are not finite; they are not saved.", stop_reason="nan")
    return tensors


def publish_weights(net: CNN, path: Path) -> None:
    """Write `model.safetensors`: no metadata, so that equal weights are equal files. Raises: JobError, OSError."""
    rundir.write_atomic(path, safetensors.torch.save(weights(net)))


def load_weights(net: CNN, path: Path) -> None:
    """Weights of a `model.safetensors` → `net`. Raises: JobError for the file, UsageError for other shapes."""
    try:
        tensors = safetensors.torch.load_file(path)
    except FileNotFoundError as error:
        raise JobError(f"--init-from {path} does not exist.") from error
    except (OSError, safetensors.SafetensorError) as error:
        raise JobError(f"--init-from {path} is not a whole safetensors file: {error}") from error
    expected = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != expected:
        raise UsageError(f"{path} holds {found}; this network has {expected}. Do the --widths agree?")
    if not all(torch.isfinite(value).all() for value in tensors.values()):
        raise JobError(f"{path} holds weights that are not finite; use another file.")
    net.load_state_dict(tensors)
