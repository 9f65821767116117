"""What a run says of itself: the banner at its start, summary.json at its end."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from ddp_mnist.checkpoint import TrainState
from ddp_mnist.config import TrainConfig
from ddp_mnist.data import SYNTHETIC_WARNING, TrainBatches
from ddp_mnist.evaluate import Score
from ddp_mnist.resume import Run
from ddp_mnist.world import World


def banner(run: Run, world: World, batches: TrainBatches, test_images: int) -> str:
    """What is about to happen, for the console: a few lines. `test_images`: how many."""
    config = run.config
    threads = f"{world.threads} thread" + ("s" if world.threads > 1 else "")
    ranks = f"{world.size} rank" + ("s" if world.size > 1 else "")
    if world.shares_gpus:
        ranks += " sharing GPUs over gloo"
    device = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type
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


def summary_of(
    config: TrainConfig,
    world: World,
    state: TrainState,
    *,
    stop_reason: str,
    exit_code: int,
    train: Score | None = None,
    test: Score | None = None,
    images_per_second: float | None = None,
    resumed_from: int | None = None,
    wandb_mode: str = "disabled",
) -> dict[str, Any]:
    """summary.json's content; null for what is not known."""
    return {
        "finished": stop_reason == "finished",
        "stop_reason": stop_reason,
        "exit_code": exit_code,
        "dataset": config.dataset,
        "recipe": config.recipe,
        "epochs": config.epochs,
        "steps": state.step,
        "samples_seen": state.samples_seen,
        "world_size": world.size,
        "device": world.device.type,
        "mixed_precision": config.mixed_precision,
        "threads": world.threads,
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
        "images_per_second": images_per_second,
        "resumed_from": resumed_from,
        "wandb_mode": wandb_mode,
        "test_confusion": test and [list(row) for row in test.confusion],
        "test_mistakes": test and [asdict(mistake) for mistake in test.mistakes],
    }
