"""What a run says of itself: the banner at its start, config.json, and summary.json at its end."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ddp_mnist.data.batches import Batches
from ddp_mnist.data.sources import SYNTHETIC_WARNING
from ddp_mnist.distributed.context import Context
from ddp_mnist.errors import JobError
from ddp_mnist.evaluate import Score
from ddp_mnist.run import directory, provenance
from ddp_mnist.run.checkpoint import TrainState
from ddp_mnist.run.metrics import Metrics
from ddp_mnist.run.resume import Run
from ddp_mnist.wandb_mirror.mirror import PATIENCE

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
        directory.write_json(path, content | provenance.facts(context.size))


class SummaryWriter:
    """Makes and writes summary.json. Every rank owns one; rank 0 writes."""

    def __init__(self, run: Run, context: Context, state: TrainState, metrics: Metrics | None = None) -> None:
        """`metrics`: None where the attempt has failed before there were any."""
        self.path, self.config, self.context = run.path / directory.SUMMARY, run.config, context
        self.state, self.metrics = state, metrics
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

    def wait_for_mirror(self, summary: dict[str, Any], patience: float = PATIENCE) -> dict[str, Any]:
        """Give W&B's mirror `patience` seconds to end, and return the summary with the mode it has ended in."""
        assert self.metrics is not None
        self.metrics.wait(patience)
        if (mode := self.metrics.wandb_mode()) != summary["wandb_mode"]:
            summary = summary | {"wandb_mode": mode}
            self.try_to_write(summary)
        return summary

    def make(
        self, stop_reason: str, exit_code: int, train: Score | None = None, test: Score | None = None
    ) -> dict[str, Any]:
        """Return summary.json's content; null for what is not known."""
        config, state, metrics = self.config, self.state, self.metrics
        if metrics is not None:
            state.wall_seconds = metrics.wall_seconds()
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
            "wandb_mode": metrics.wandb_mode() if metrics is not None else "disabled",
            "test_confusion": test and [list(row) for row in test.confusion],
            "test_mistakes": test and [asdict(mistake) for mistake in test.mistakes],
        }
