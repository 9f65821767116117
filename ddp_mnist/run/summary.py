"""What a run says of itself: the banner at its start, config.json, and summary.json at its end."""

from __future__ import annotations

import logging
import os
import platform
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ddp_mnist.data.sources import SYNTHETIC_WARNING
from ddp_mnist.distributed.launcher import local_world_size_from_environment
from ddp_mnist.errors import JobError
from ddp_mnist.run import directory

if TYPE_CHECKING:
    from ddp_mnist.data.batches import Batches
    from ddp_mnist.distributed.context import Context
    from ddp_mnist.evaluate import Score
    from ddp_mnist.run.checkpoint import TrainState
    from ddp_mnist.run.resume import Run

log = logging.getLogger(__name__)


def banner(run: Run, context: Context, batches: Batches, test_images: int) -> str:
    """Return a few lines about what is about to happen. `test_images`: how many."""
    config = run.config
    threads = f"{context.threads} thread" + ("s" if context.threads > 1 else "")
    ranks = f"{context.size} rank" + ("s" if context.size > 1 else "")
    if context.shares_gpus:
        ranks += " sharing GPUs over gloo"
    device = torch.cuda.get_device_name(context.device) if context.device.type == "cuda" else context.device.type
    share = f"{config.batch_size} images, {batches.local_size} per rank"
    if config.accumulate > 1:
        share += f" in {config.accumulate} parts"
    lines = [
        f"ddp_mnist: {config.recipe} recipe on {config.dataset}, "
        f"{len(batches.split):,} training and {test_images:,} test images",
        f"  device  {device}, {ranks}, {threads} each, precision {config.mixed_precision}",
        f"  batch   {share}; {config.epochs} epoch{'s' if config.epochs > 1 else ''} of {len(batches)} steps; "
        f"Adam {config.lr:g} {config.schedule}",
        f"  output  {run.path}",
    ]
    if run.snapshot is not None:
        lines.append(f"  resumed at step {run.snapshot.state.step} of {len(batches) * config.epochs}")
    if config.dataset == "synthetic":
        lines.append(SYNTHETIC_WARNING)
    return "\n".join(lines)


def write_config(run: Run, context: Context, network: nn.Module | None, steps_per_epoch: int) -> None:
    """Write config.json. `network`: the caller's own one; None: it is ours.

    Raises:
        JobError: It cannot be written.
    """
    name = None if network is None else f"{type(network).__module__}.{type(network).__qualname__}"
    content = {"settings": run.config.to_dict(), "network": name, "steps_per_epoch": steps_per_epoch}
    with directory.writing(run.path / directory.CONFIG) as path:
        directory.write_json(path, content | facts(context.size))


class SummaryWriter:
    """Makes and writes summary.json. Every rank owns one; rank 0 writes."""

    def __init__(
        self,
        run: Run,
        context: Context,
        state: TrainState,
        wall_seconds: Callable[[], float] | None = None,
        wandb_mode: Callable[[], str] = lambda: "disabled",
    ) -> None:
        """Note the totals before this attempt.

        Args:
            run: The run directory, its settings and its checkpoint.
            context: The ranks of the job.
            state: Position and totals, as they will be when a summary is made.
            wall_seconds: Returns the run's seconds over all attempts; None: the attempt fails before it has begun.
            wandb_mode: Returns online, offline or disabled.
        """
        self.path, self.config, self.context = run.path / directory.SUMMARY, run.config, context
        self.state, self.wall_seconds, self.wandb_mode = state, wall_seconds, wandb_mode
        self._resumed_from = run.snapshot.state.step if run.snapshot else None
        self._before = (state.samples_seen, state.train_seconds)

    def write(self, summary: dict[str, Any]) -> None:
        """Write the summary, on rank 0.

        Raises:
            JobError: It cannot be written.
        """
        if self.context.is_main:
            with directory.writing(self.path) as path:
                directory.write_json(path, summary)

    def try_to_write(self, summary: dict[str, Any]) -> None:
        """Write the summary, on rank 0; warn where it cannot be written."""
        try:
            self.write(summary)
        except JobError as error:
            log.warning("%s", error)

    def make(
        self, stop_reason: str, exit_code: int, train: Score | None = None, test: Score | None = None
    ) -> dict[str, Any]:
        """Return summary.json's content; null for what is not known."""
        config, state = self.config, self.state
        if self.wall_seconds is not None:
            state.wall_seconds = self.wall_seconds()
        samples, seconds = state.samples_seen - self._before[0], state.train_seconds - self._before[1]
        return {
            "finished": stop_reason == "finished",
            "stop_reason": stop_reason,
            "exit_code": exit_code,
            "dataset": config.dataset,
            "recipe": config.recipe,
            "epochs": config.epochs,
            "steps": state.step,
            "samples_seen": state.samples_seen,
            "world_size": self.context.size,
            "device": self.context.device.type,
            "mixed_precision": config.mixed_precision,
            "threads": self.context.threads,
            "skipped_steps": state.skipped_steps,
            "train_correct": train and train.correct,
            "train_count": train and train.count,
            "train_accuracy": train and train.accuracy,
            "train_loss": train and train.loss,
            "test_correct": test and test.correct,
            "test_count": test and test.count,
            "test_accuracy": test and test.accuracy,
            "test_loss": test and test.loss,
            "train_seconds": round(state.train_seconds, 3),
            "eval_seconds": round(state.eval_seconds, 3),
            "wall_seconds": round(state.wall_seconds, 3),
            "images_per_second": round(samples / seconds, 1) if seconds else None,
            "resumed_from": self._resumed_from,
            "wandb_mode": self.wandb_mode(),
            "test_confusion": test and [list(row) for row in test.confusion],
            "test_mistakes": test and [asdict(mistake) for mistake in test.mistakes],
        }


def facts(world_size: int) -> dict[str, Any]:
    """Return `versions`, `git` (None outside a checkout) and `launch` of a job of `world_size` ranks."""
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
    """Return the command line with *** for secrets: a script's own arguments may hold anything."""
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
