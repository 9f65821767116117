"""Score a network on a data set exactly, over all ranks; `python -m ddp_mnist.evaluate RUN_DIR` scores a run again."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
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
from ddp_mnist.distributed.launcher import entry_point, hard_exit, rank_from_environment, show_warnings, suppress_output
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.run import directory
from ddp_mnist.run.checkpoint import SavedRun, open_saved
from ddp_mnist.workload import move_to_device

WORST = 25  # mistakes that a Score remembers


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
        """Return how many images were classified correctly."""
        return sum(row[label] for label, row in enumerate(self.confusion))

    @property
    def count(self) -> int:
        """Return how many images were scored."""
        return sum(map(sum, self.confusion))

    @property
    def accuracy(self) -> float:
        """Return the correct part of the images, 0-1."""
        return self.correct / self.count

    def class_accuracy(self) -> list[float | None]:
        """Return the accuracy of each class, 0-1; None for a class that the data set does not have."""
        return [row[label] / sum(row) if sum(row) else None for label, row in enumerate(self.confusion)]

    def sentence(self) -> str:
        """Return the tutorial's line."""
        return f"Got {self.correct} / {self.count} with accuracy {100 * self.accuracy:.2f}"


@torch.no_grad()
def evaluate(network: nn.Module, split: Split, context: Context) -> Score:
    """Return the network's exact score, in fp32, the same on every rank. Collective. Raises: as `count_classes`."""
    classes = count_classes(network, split)
    context.broadcast_tensors(network.buffers())  # such as batch norm's averages: each rank has seen other images
    # float64 holds the counts exactly and makes the loss the same at every world size; MPS has no float64.
    home = torch.device("cpu") if context.device.type == "mps" else context.device
    totals = torch.zeros(1 + classes * classes, dtype=torch.float64, device=home)
    mistakes: list[Mistake] = []
    size = 250 if context.device.type == "cpu" else 10_000  # on a CPU what fits its caches
    size = max(1, size * 784 // max(784, split.images[0].numel()))  # larger images, as much memory
    first = context.rank * size
    with evaluation_mode(network):
        for images, labels in evaluation_batches(split, rank=context.rank, world_size=context.world_size, size=size):
            logits = network(to_float(images.clone()))  # a copy: a network may work in place on its input
            loss = F.cross_entropy(logits, labels, reduction="sum")
            cells = torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
            totals += torch.cat([loss.view(1), cells]).to(home)
            mistakes = _worst([*mistakes, *_mistakes(logits, labels, first)])
            first += context.world_size * size
    loss_sum, *counts = context.sum(totals).tolist()
    confusion = tuple(tuple(map(int, counts[start : start + classes])) for start in range(0, len(counts), classes))
    assert sum(counts) == len(split), f"scored {sum(counts)} of {len(split)} images"
    return Score(loss_sum / len(split), confusion, tuple(_worst(gather_object(mistakes))))


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
    """Return how many classes the network tells apart. Raises: UsageError if its output does not fit the labels."""
    with evaluation_mode(network):
        logits = network(to_float(split.images[:1].clone()))
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else f"a {type(logits).__name__}"
        raise UsageError(f"for one image the network gives {found}; expected logits (1, classes).")
    if (highest := int(split.labels.max())) >= logits.shape[1]:
        raise UsageError(f"the network tells {logits.shape[1]} classes apart; there is a label {highest}.")
    return logits.shape[1]


def _mistakes(logits: Tensor, labels: Tensor, first: int) -> Iterator[Mistake]:
    """Yield the wrong predictions of a chunk whose first image is row `first`."""
    wrong = (logits.argmax(1) != labels).nonzero().flatten()
    confidence = logits[wrong].softmax(1).amax(1).nan_to_num()  # NaN: the weights are ruined
    columns = (wrong + first, labels[wrong], logits[wrong].argmax(1), confidence)
    return (Mistake(*values) for values in zip(*(column.tolist() for column in columns), strict=True))


def _worst(mistakes: Iterable[Mistake]) -> list[Mistake]:
    return sorted(mistakes, key=lambda mistake: (-mistake.confidence, mistake.index))[:WORST]


def _rescore(run_dir: Path, context: Context, data_dir: Path | None) -> tuple[SavedRun, list[Score]]:
    """Return (the saved run, [its score on the training set, on the test set]). Collective. Raises: JobError."""
    # Rank 0 reads for all: the run may be going on, and write its next checkpoint meanwhile.
    saved = context.broadcast(context.run_on_all_ranks(lambda: open_saved(run_dir) if context.is_main else None))
    assert saved is not None
    own = saved.config.data_dir
    root = data_dir or (own if own.exists() else default_data_dir())
    splits = context.run_on_all_ranks(lambda: sources.load(saved.config.dataset, root))
    network = move_to_device(saved.network, context.device)  # as in training: the same rounding
    return saved, [evaluate(network, split.to(context.device), context) for split in splits]


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0. Raises: JobError where the counts are not those of the run's own summary."""
    is_main = rank_from_environment() == 0
    show_warnings(main=is_main)
    with contextlib.nullcontext() if is_main else suppress_output():  # one message for a wrong flag
        options = _parser().parse_args(argv)
    config = TrainConfig(threads=options.threads, mixed_precision="no")
    with Context(config) as context, translate_collective_errors(context):
        saved, (train, test) = _rescore(options.run_dir, context, options.data_dir)
    counts = {"train_correct": train.correct, "train_count": train.count}
    counts |= {"test_correct": test.correct, "test_count": test.count}
    said = saved.summary or counts
    differing = [name for name in counts if counts[name] != said.get(name)]
    if is_main and options.json:
        facts: dict[str, Any] = {"run_dir": str(options.run_dir), "weights": str(saved.source), "step": saved.step}
        facts |= {"dataset": saved.config.dataset, "world_size": context.world_size, "device": context.device.type}
        facts |= counts | {"train_accuracy": train.accuracy, "train_loss": train.loss}
        facts |= {"test_accuracy": test.accuracy, "test_loss": test.loss}
        facts["agrees"] = not differing if saved.summary else None  # None: the run has not counted with these weights
        print(json.dumps(directory.finite(facts), indent=2), flush=True)
    elif is_main:
        print(f"{saved.source}, step {saved.step or 'unknown'}, on {saved.config.dataset}")
        print(f"Checking accuracy on training data\n{train.sentence()}")
        print(f"Checking accuracy on test data\n{test.sentence()}", flush=True)
    if differing:
        found = "; ".join(f"{name} is {counts[name]}, {directory.SUMMARY} says {said.get(name)}" for name in differing)
        raise JobError(
            f"{saved.source} does not score as it did: {found}. The weights, the data or the summary have been changed "
            f"since, or {context.device.type} rounds otherwise than {said.get('device')}, the run's device."
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ddp_mnist.evaluate",
        description="Score a run's weights again on both sets, or an unfinished run's newest checkpoint. Counts that "
        "differ from summary.json are an error. Any number of ranks counts the same: start several with torchrun.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="default: the run's, else $DDP_MNIST_DATA or data")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="per rank; default: allowed CPUs / ranks")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    return parser


if __name__ == "__main__":
    hard_exit(main())
