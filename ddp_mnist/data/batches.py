"""Split a data set in memory into each rank's batches. Nothing else shards.

The batch order is a function of (seed, epoch) alone: global batch k is rows k*G ... (k+1)*G of the epoch's
permutation, at every world size; a rank takes every world_size-th row of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DistributedSampler


@dataclass(frozen=True)
class Split:
    """The training set or the test set, in memory on one device."""

    images: Tensor
    """(n, ...), of MNIST uint8 (n, 1, 28, 28)."""
    labels: Tensor
    """int64 (n,)."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Return the set on that device."""
        return Split(self.images.to(device), self.labels.to(device))

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return copies of these rows' images and labels; `rows`: int64 (n,) on the same device."""
        return self.images.index_select(0, rows), self.labels.index_select(0, rows)


@dataclass(frozen=True)
class Batch:
    """One rank's share of one global batch."""

    images: Tensor
    """(n, ...) as the data set has them."""
    labels: Tensor
    """int64 (n,)."""
    count: int
    """Number of real items: len(labels), or 0 where an epoch's last batch has none for this rank. Then the one row is
    a dummy, since many networks cannot take an empty batch."""
    global_size: int
    """Items in the global batch, over all ranks."""
    seed: int
    """Seed of this rank's random numbers in this step, such as dropout's; it differs by step and rank."""


class ShardSampler(DistributedSampler):
    """A DistributedSampler that neither pads nor drops: rank r gets rows r, r+W, r+2W, ... of the permutation.

    The one of torch pads to a multiple of the world size (an image counts twice) or drops the rest, and adds the epoch
    to the seed, so that epoch 1 of seed 0 repeats epoch 0 of seed 1.
    """

    def __init__(self, length: int, *, rank: int, world_size: int, seed: int) -> None:
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.length = length
        self.num_samples = len(range(rank, length, world_size))
        self.total_size = length

    def permutation(self) -> Tensor:
        """Return this epoch's order of the whole data set, int64 (length,): the same on every rank."""
        digest = hashlib.sha256(f"batch order {self.seed} {self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        return torch.randperm(self.length, generator=generator)

    def indices(self) -> Tensor:
        """Return this rank's share of this epoch's order, int64 (len(self),)."""
        return self.permutation()[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices().tolist())

    def __len__(self) -> int:
        return self.num_samples


class Batches:
    """The training set as this rank's batches. A batch is one `index_select`, not a Python loop over images."""

    def __init__(self, split: Split, *, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        """Shard the set. `batch_size` is the global one; the world size must divide it."""
        self.split = split
        self.batch_size = batch_size
        self.local_size = batch_size // world_size
        self.sampler = ShardSampler(len(split), rank=rank, world_size=world_size, seed=seed)

    def __len__(self) -> int:
        """Return the steps of an epoch, the same on every rank."""
        return math.ceil(len(self.split) / self.batch_size)

    def global_size(self, step_in_epoch: int) -> int:
        """Return how many items that global batch has: `batch_size`, or fewer in the epoch's last one."""
        return min(self.batch_size, len(self.split) - step_in_epoch * self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches `start` ... len(self) - 1 of that epoch."""
        self.sampler.set_epoch(epoch)
        indices = self.sampler.indices().to(self.split.labels.device)
        for step in range(start, len(self)):
            rows = indices[step * self.local_size : (step + 1) * self.local_size]
            images, labels = self.split.take(rows if len(rows) else indices.new_zeros(1))
            seed = hash_integers(self.sampler.seed, epoch, step, self.sampler.rank)
            yield Batch(images, labels, len(rows), self.global_size(step), seed)


def evaluation_batches(split: Split, *, rank: int, world_size: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's chunks of `size` items: chunk i goes to rank i % world_size. Nothing is padded.

    The chunks do not depend on the world size, so the logits do not either.
    """
    for chunk in range(rank, -(-len(split) // size), world_size):
        rows = slice(chunk * size, (chunk + 1) * size)
        yield split.images[rows], split.labels[rows]


def to_float(images: Tensor) -> Tensor:
    """Return images as fp32. uint8 is divided by 255; fp32 is returned without a copy.

    It divides as ToTensor does: multiplying by 1/255 rounds differently.
    """
    return images.to(torch.float32).div_(255) if images.dtype == torch.uint8 else images.to(torch.float32)


def hash_integers(*numbers: int) -> int:
    """Return the splitmix64 hash of the numbers, 0 ... 2^63 - 1; numbers that differ by one get unrelated hashes."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        mixed = ((mixed ^ mixed >> 27) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        mixed ^= mixed >> 31
    return mixed >> 1
