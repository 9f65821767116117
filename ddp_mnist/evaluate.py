"""Exact loss, accuracy, confusion counts and worst mistakes of a network on a data set, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_mnist.data import Split, evaluation_batches, to_float
from ddp_mnist.errors import UsageError
from ddp_mnist.world import World

WORST = 25
"""Mistakes that a Score remembers."""


@dataclass(frozen=True)
class Mistake:
    index: int
    """Row of the data set."""
    label: int
    prediction: int
    confidence: float
    """The network's probability, 0-1, of its wrong prediction."""


@dataclass(frozen=True)
class Score:
    loss: float
    """Mean cross-entropy over all images."""
    confusion: tuple[tuple[int, ...], ...]
    """confusion[label][prediction]: number of images."""
    mistakes: tuple[Mistake, ...] = ()
    """The worst, most confident first; at most WORST, the same at every world size."""

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

    def class_accuracy(self) -> list[float | None]:
        """0-1 by label; None for a class that the data set does not have."""
        return [row[label] / sum(row) if sum(row) else None for label, row in enumerate(self.confusion)]

    def sentence(self) -> str:
        return f"Got {self.correct} / {self.count} with accuracy {100 * self.accuracy:.2f}"


@torch.no_grad()
def evaluate(net: nn.Module, split: Split, world: World) -> Score:
    """Score the unwrapped network in fp32; a collective: every rank calls it and gets the same Score.

    Its buffers, such as batch norm's averages, are rank 0's from here on: the ranks have each seen other images.
    """
    classes = class_count(net, split)
    world.share(net.buffers())
    training = net.training
    net.eval()
    try:
        return _evaluate(net, split, world, classes)
    finally:
        net.train(training)


@torch.no_grad()
def class_count(net: nn.Module, split: Split) -> int:
    """Classes that the network tells apart. Raises: UsageError when labels or output do not fit each other."""
    training = net.training
    logits = type(net.eval()).forward(net, to_float(split.images[:1]))
    net.train(training)
    if logits.dim() != 2:
        raise UsageError(f"for one image the network gives {tuple(logits.shape)}; expected logits (1, classes).")
    if split.labels.max() >= logits.shape[1]:
        highest = int(split.labels.max())
        raise UsageError(f"the network tells {logits.shape[1]} classes apart; there is a label {highest}.")
    return logits.shape[1]


def _evaluate(net: nn.Module, split: Split, world: World, classes: int) -> Score:
    # float64 holds the counts exactly and makes the loss the same at every world size; MPS has no float64.
    home = torch.device("cpu") if world.device.type == "mps" else world.device
    totals = torch.zeros(1 + classes * classes, dtype=torch.float64, device=home)
    worst = torch.zeros(0, 4, dtype=torch.float64, device=home)
    size = 1000 if world.device.type == "cpu" else 10_000
    first = world.rank * size
    for images, labels in evaluation_batches(split, rank=world.rank, world_size=world.size, size=size):
        # Accelerate replaces the instance's forward by one that autocasts; the class's own is fp32.
        logits = type(net).forward(net, to_float(images))
        totals += _counts(logits, labels).to(home)
        worst = _worst(torch.cat([worst, _mistakes(logits, labels, first, home)]))
        first += world.size * size
    # One reduction: the sums, then a place for each rank's mistakes, of which every other rank holds zeros.
    places = torch.zeros(world.size, WORST, 4, dtype=torch.float64, device=home)
    places[world.rank, : len(worst)] = worst
    everything = world.sum(torch.cat([totals, places.flatten()]))
    loss_sum, *cells = everything[: len(totals)].tolist()
    confusion = tuple(
        tuple(int(cell) for cell in cells[start : start + classes]) for start in range(0, len(cells), classes)
    )
    found = _worst(everything[len(totals) :].view(-1, 4))
    mistakes = tuple(Mistake(int(row), int(label), int(said), sure) for sure, row, label, said in found.tolist())
    score = Score(loss_sum / len(split), confusion, mistakes)
    assert score.count == len(split), f"scored {score.count} of {len(split)} images"
    return score


def _counts(logits: Tensor, labels: Tensor) -> Tensor:
    """(1 + classes²,): summed loss, then the flattened confusion counts of one chunk."""
    classes = logits.shape[1]
    cells = torch.bincount(labels * classes + logits.argmax(1), minlength=classes * classes)
    return torch.cat([F.cross_entropy(logits, labels, reduction="sum").view(1), cells])


def _mistakes(logits: Tensor, labels: Tensor, first: int, home: torch.device) -> Tensor:
    """(n, 4) float64 on `home`: confidence, row, label and prediction of each of the n wrong predictions of a chunk.

    `first`: the row of the chunk's first image.
    """
    wrong = (logits.argmax(1) != labels).nonzero().flatten()
    confidence, prediction = logits[wrong].softmax(1).max(1)
    columns = (confidence, wrong + first, labels[wrong], prediction)
    return torch.stack([column.to(home).double() for column in columns], dim=1)


def _worst(mistakes: Tensor) -> Tensor:
    """The WORST of (n, 4) mistakes, most confident first, equals by row; empty places (confidence 0) are left out."""
    mistakes = mistakes[mistakes[:, 0] > 0]
    by_row = mistakes[mistakes[:, 1].argsort()]
    return by_row[by_row[:, 0].argsort(descending=True, stable=True)][:WORST]
