"""Exact loss, accuracy, confusion counts and worst mistakes of a network on a data set, over all ranks.

`python -m ddp_mnist.evaluate RUN_DIR` scores a run's weights again, also on several ranks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

from ddp_mnist.config import TrainConfig, default_data_dir
from ddp_mnist.data import sources
from ddp_mnist.data.batches import Split, evaluation_batches, to_float
from ddp_mnist.distributed.context import Context, translate_collective_errors
from ddp_mnist.distributed.launcher import (
    command,
    hard_exit,
    rank_from_environment,
    show_warnings,
    suppress_output,
)
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.program import move_to_device
from ddp_mnist.run import directory
from ddp_mnist.run.checkpoint import SavedRun, open_saved

WORST = 25
"""Mistakes that a Score remembers."""


@dataclass(frozen=True)
class Mistake:
    """An image that was read as another class."""

    index: int
    """Row of the data set."""
    label: int
    prediction: int
    confidence: float
    """The network's probability, 0-1, of its wrong prediction."""


@dataclass(frozen=True)
class Score:
    """The score of one network on one whole data set, each image counted once; equal on all ranks."""

    loss: float
    """Mean cross-entropy over all images."""
    confusion: tuple[tuple[int, ...], ...]
    """confusion[label][prediction]: number of images."""
    mistakes: tuple[Mistake, ...] = ()
    """The most confident ones first; at most WORST, the same at every world size."""

    @property
    def correct(self) -> int:
        """Images classified correctly."""
        return sum(row[label] for label, row in enumerate(self.confusion))

    @property
    def count(self) -> int:
        """Images scored."""
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        """0-1"""
        return self.correct / self.count

    def class_accuracy(self) -> list[float | None]:
        """Return the accuracy of each class, 0-1; None for a class that the data set does not have."""
        return [row[label] / sum(row) if sum(row) else None for label, row in enumerate(self.confusion)]

    def sentence(self) -> str:
        """Return the tutorial's line."""
        return f"Got {self.correct} / {self.count} with accuracy {100 * self.accuracy:.2f}"


@torch.no_grad()
def evaluate(network: nn.Module, split: Split, context: Context) -> Score:
    """Return the exact score of the network on a data set, in fp32, the same on every rank. Collective.

    Its buffers, such as batch norm's averages, are rank 0's from here on: each rank has seen other images.

    Raises:
        UsageError: The network's output is no logits, or of fewer classes than the labels name.
    """
    classes = count_classes(network, split)
    context.broadcast_tensors(network.buffers())
    # float64 holds the counts exactly and makes the loss the same at every world size; MPS has no float64.
    home = torch.device("cpu") if context.device.type == "mps" else context.device
    totals = torch.zeros(1 + classes * classes, dtype=torch.float64, device=home)
    mistakes: list[Mistake] = []
    size = 250 if context.device.type == "cpu" else 10_000  # on a CPU what fits its caches
    size = max(1, size * 784 // max(784, split.images[0].numel()))  # larger images, as much memory
    first = context.rank * size
    with evaluation_mode(network):
        for images, labels in evaluation_batches(split, rank=context.rank, world_size=context.size, size=size):
            logits = network(to_float(images.clone()))  # a copy: a network may work in place on its input
            loss = F.cross_entropy(logits, labels, reduction="sum")
            cells = torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
            totals += torch.cat([loss.view(1), cells]).to(home)
            mistakes = _worst([*mistakes, *_mistakes(logits, labels, first)])
            first += context.size * size
    loss_sum, *counts = context.sum(totals).tolist()
    confusion = tuple(tuple(map(int, counts[start : start + classes])) for start in range(0, len(counts), classes))
    score = Score(loss_sum / len(split), confusion, tuple(_worst(gather_object(mistakes))))
    assert score.count == len(split), f"scored {score.count} of {len(split)} images"
    return score


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode, then each layer into its own again: some may be frozen."""
    before = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def count_classes(network: nn.Module, split: Split) -> int:
    """Return the number of classes that the network tells apart.

    Raises:
        UsageError: Its output is no logits, or of fewer classes than the labels name.
    """
    with evaluation_mode(network):
        logits = network(to_float(split.images[:1].clone()))
    if logits.dim() != 2:
        raise UsageError(f"for one image the network gives {tuple(logits.shape)}; expected logits (1, classes).")
    if split.labels.max() >= logits.shape[1]:
        highest = int(split.labels.max())
        raise UsageError(f"the network tells {logits.shape[1]} classes apart; there is a label {highest}.")
    return logits.shape[1]


def _mistakes(logits: Tensor, labels: Tensor, first: int) -> Iterator[Mistake]:
    """Yield the wrong predictions of a chunk; `first`: the row of its first image."""
    wrong = (logits.argmax(1) != labels).nonzero().flatten()
    confidence, prediction = logits[wrong].softmax(1).max(1)
    for columns in zip(wrong, labels[wrong], prediction, confidence, strict=True):
        row, label, said, sure = (value.item() for value in columns)
        if sure > 0:  # not NaN, of weights that are ruined
            yield Mistake(int(row) + first, int(label), int(said), sure)


def _worst(mistakes: list[Mistake]) -> list[Mistake]:
    return sorted(mistakes, key=lambda mistake: (-mistake.confidence, mistake.index))[:WORST]


def rescore(run_dir: Path, context: Context, data_dir: Path | None = None) -> tuple[SavedRun, Score, Score]:
    """Return (the saved run, its scores on the training and the test set). Change nothing. Collective.

    Args:
        run_dir: The run directory; only rank 0 needs to see it.
        context: The ranks.
        data_dir: Where the data are; default: where the run had them.

    Raises:
        JobError: Weights or data cannot be read; on all ranks.
    """
    saved = context.broadcast(context.run_on_all_ranks(lambda: open_saved(run_dir) if context.is_main else None))
    assert saved is not None
    own = saved.config.data_dir
    root = data_dir or (own if own.exists() else default_data_dir())
    train, test = context.run_on_all_ranks(lambda: sources.load(saved.config.dataset, root))
    network = move_to_device(saved.network, context.device)  # as in training: the same rounding
    train_score, test_score = (evaluate(network, split.to(context.device), context) for split in (train, test))
    return saved, train_score, test_score


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0: scored, 1: the counts are not the run's own or something cannot be read, 2: a flag."""
    is_main = rank_from_environment() == 0
    show_warnings(main=is_main)
    with contextlib.nullcontext() if is_main else suppress_output():  # one message for a wrong flag
        options = _parser().parse_args(argv)
    with Context(TrainConfig(threads=options.threads, mixed_precision="no")) as context:
        with translate_collective_errors(context):
            saved, train, test = rescore(options.run_dir, context, options.data_dir)
        if context.is_main:
            _print(saved, train, test, context, options)
    _compare(saved, train, test, context)
    return 0


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


def _print(saved: SavedRun, train: Score, test: Score, context: Context, options: argparse.Namespace) -> None:
    if options.json:
        counts = _as_in_summary(train, test)
        result: dict[str, Any] = {
            "run_dir": str(options.run_dir),
            "weights": str(saved.source),
            "step": saved.step,
            "dataset": saved.config.dataset,
            "world_size": context.size,
            "device": context.device.type,
            **counts,
            "train_accuracy": train.accuracy,
            "train_loss": train.loss,
            "test_accuracy": test.accuracy,
            "test_loss": test.loss,
            # Whether these are the run's own counts; null where it has not counted with these weights.
            "agrees": {name: saved.summary.get(name) for name in counts} == counts if saved.summary else None,
        }
        print(json.dumps(directory.finite(result), indent=2), flush=True)
        return
    step = "" if saved.step is None else f", step {saved.step}"
    print(f"{saved.source}{step}, on {saved.config.dataset}")
    if saved.config.dataset == "synthetic":
        print(sources.SYNTHETIC_WARNING)
    print(f"Checking accuracy on training data\n{train.sentence()}")
    print(f"Checking accuracy on test data\n{test.sentence()}", flush=True)


def _compare(saved: SavedRun, train: Score, test: Score, context: Context) -> None:
    """Raise JobError when the run's own counts are others, on all ranks."""
    if not saved.summary:
        return
    differing = [
        f"{name} is {count}, {directory.SUMMARY} says {saved.summary.get(name)}"
        for name, count in _as_in_summary(train, test).items()
        if count != saved.summary.get(name)
    ]
    if differing:
        then, now = saved.summary.get("device"), context.device.type
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
    hard_exit(main())
