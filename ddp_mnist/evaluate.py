"""Exact loss, accuracy and confusion counts of a network on a data set, over all ranks.

`python -m ddp_mnist.evaluate RUN_DIR` scores a run's weights again, also on several ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddp_mnist import data, rundir
from ddp_mnist.checkpoint import Saved, open_saved
from ddp_mnist.config import TrainConfig, default_data_dir, rank_from_environment
from ddp_mnist.data import Split, evaluation_batches, to_float
from ddp_mnist.errors import JobError
from ddp_mnist.model import CNN
from ddp_mnist.world import World, is_lost_rank, lost_rank

CLASSES = 10


@dataclass(frozen=True)
class Score:
    loss: float
    """Mean cross-entropy over all images."""
    confusion: tuple[tuple[int, ...], ...]
    """confusion[label][prediction]: number of images."""

    @property
    def correct(self) -> int:
        return sum(row[label] for label, row in enumerate(self.confusion))

    @property
    def count(self) -> int:
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        """0-1"""
        return self.correct / self.count

    def sentence(self) -> str:
        return f"Got {self.correct} / {self.count} with accuracy {100 * self.accuracy:.2f}"


@torch.no_grad()
def evaluate(net: CNN, split: Split, world: World) -> Score:
    """Score the unwrapped network in fp32; a collective: every rank calls it and gets the same Score."""
    # float64 holds the counts exactly and makes the loss the same at every world size; MPS has no float64.
    home = torch.device("cpu") if world.device.type == "mps" else world.device
    totals = torch.zeros(1 + CLASSES * CLASSES, dtype=torch.float64, device=home)
    size = 1000 if world.device.type == "cpu" else 10_000
    for images, labels in evaluation_batches(split, rank=world.rank, world_size=world.size, size=size):
        # Accelerate replaces the instance's forward by one that autocasts; the class's own is fp32.
        logits = CNN.forward(net, to_float(images))
        totals += _counts(logits, labels).to(home)
    world.sum(totals)
    loss_sum, *cells = totals.tolist()
    confusion = tuple(
        tuple(int(cell) for cell in cells[start : start + CLASSES]) for start in range(0, len(cells), CLASSES)
    )
    score = Score(loss_sum / len(split), confusion)
    assert score.count == len(split), f"scored {score.count} of {len(split)} images"
    return score


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """(1 + 100,): summed loss, then the flattened confusion counts of one chunk."""
    cells = torch.bincount(labels * CLASSES + logits.argmax(1), minlength=CLASSES * CLASSES)
    return torch.cat([F.cross_entropy(logits, labels, reduction="sum").view(1), cells])


def rescore(run_dir: Path, world: World, data_dir: Path | None = None) -> tuple[Saved, Score, Score]:
    """Score a run's weights on its (training set, test set); every rank calls it and gets the same.

    Changes nothing in the run directory. `data_dir`: default the run's own. Raises: JobError.
    """
    # The run directory may be on rank 0's machine only; where the data are is each machine's own matter.
    saved = world.broadcast(world.agree(lambda: open_saved(run_dir) if world.is_main else None))
    assert saved is not None
    own = saved.config.data_dir
    root = data_dir or (own if own.exists() else default_data_dir())
    train, test = world.agree(lambda: data.load(saved.config.dataset, root))
    net = saved.net.to(world.device).to(memory_format=torch.channels_last)  # as in training: the same rounding
    return saved, evaluate(net, train.to(world.device), world), evaluate(net, test.to(world.device), world)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 0: scored. 1: the counts are not the run's own, or something could not be read. 2: a wrong flag."""
    rank = rank_from_environment()
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="warning: %(message)s")
    with contextlib.ExitStack() as stack:
        if rank != 0:  # a wrong flag is told once
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        options = _parser().parse_args(argv)
    try:
        with World(TrainConfig(threads=options.threads, mixed_precision="no")) as world:
            try:
                saved, train, test = rescore(options.run_dir, world, options.data_dir)
            except RuntimeError as error:
                if not is_lost_rank(error):
                    raise
                raise lost_rank(error, world) from error
            if world.is_main:
                _tell(saved, train, test, world, options)
        _compare(saved, train, test, world)
        return 0
    except JobError as error:
        if rank_from_environment() == 0 or error.local:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_mnist.evaluate",
        description="Score a run's model.safetensors again on both sets, or, while it is not finished, its newest "
        "checkpoint; changes nothing. Counts that differ from the run's summary.json are an error. Any number of "
        "ranks gives the same: start it with torchrun or accelerate launch for several.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="default: the run's own, else $DDP_MNIST_DATA, else data"
    )
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads per rank; default: allowed CPUs / ranks"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


def _tell(saved: Saved, train: Score, test: Score, world: World, options: argparse.Namespace) -> None:
    if options.json:
        counts = _as_in_summary(train, test)
        result: dict[str, Any] = {
            "run_dir": str(options.run_dir),
            "weights": str(saved.source),
            "step": saved.step,
            "dataset": saved.config.dataset,
            "world_size": world.size,
            "device": world.device.type,
            **counts,
            "train_accuracy": train.accuracy,
            "train_loss": train.loss,
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            # Whether these are the run's own counts; null where it has not counted with these weights.
            "agrees": {name: saved.summary.get(name) for name in counts} == counts if saved.summary else None,
        }
        print(json.dumps(rundir.finite(result), indent=2), flush=True)
        return
    step = "" if saved.step is None else f", step {saved.step}"
    print(f"{saved.source}{step}, on {saved.config.dataset}")
    if saved.config.dataset == "synthetic":
        print(data.SYNTHETIC_WARNING)
    print(f"Checking accuracy on training data\n{train.sentence()}")
    print(f"Checking accuracy on test data\n{test.sentence()}", flush=True)


def _compare(saved: Saved, train: Score, test: Score, world: World) -> None:
    """Raises: JobError when the run's own counts are others, the same on all ranks."""
    if not saved.summary:
        return
    differing = [
        f"{name} is {count}, {rundir.SUMMARY} says {saved.summary.get(name)}"
        for name, count in _as_in_summary(train, test).items()
        if count != saved.summary.get(name)
    ]
    if differing:
        then, now = saved.summary.get("device"), world.device.type
        why = f", or {now} rounds otherwise than {then}, where the run was scored" if then != now else ""
        raise JobError(
            f"{saved.source} does not score as it did: {'; '.join(differing)}. The weights, the data or the summary "
            f"have been changed since{why}."
        )


def _as_in_summary(train: Score, test: Score) -> dict[str, int]:
    return {
        "train_correct": train.correct,
        "train_count": train.count,
        "test_correct": test.correct,
        "test_count": test.count,
    }


if __name__ == "__main__":
    from ddp_mnist.train import leave

    leave(main())
