"""Exact loss, accuracy and confusion counts of a network on a data set, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ddp_mnist.data import Split, evaluation_batches, to_float
from ddp_mnist.model import CNN
from ddp_mnist.world import World

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
