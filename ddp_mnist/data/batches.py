"""Deal a data set out to the ranks, batch by batch. No other module shards.

The batch order is a function of (seed, epoch) alone. At batch size G, global batch k is rows k*G ... k*G + G - 1 of the
epoch's permutation, at every world size; each rank takes every world_size-th row of the batch.
"""

import hashlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DistributedSampler

from ddp_mnist.errors import UsageError

if TYPE_CHECKING:
    from ddp_mnist.data.sources import DataLoaderSet

Items = tuple[Any, Any]
"""Inputs and targets of a batch. Inputs: a tensor (n, ...), a tuple of them, or a dict of them; targets: a tensor."""
Split: TypeAlias = "TensorSet | DataLoaderSet"
"""The training or test set: in memory, or loaded by a DataLoader when needed. Both classes have the same methods."""


@dataclass(frozen=True)
class TensorSet:
    """A data set in memory, on one device. A batch is one `index_select`, not a Python loop over items."""

    inputs: Tensor  # (n, ...), for MNIST uint8 (n, 1, 28, 28)
    targets: Tensor  # (n, ...), for MNIST int64 (n,)
    failure = None  # as in `DataLoaderSet`, but here `iterate` cannot fail

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device) -> Self:
        """Return the set on that device."""
        return type(self)(self.inputs.to(device), self.targets.to(device))

    def load(self, rows: Tensor, _epoch: int = 0, /) -> Items:
        """Return copies of the items in `rows`, int64 (n,); they are the same in every epoch."""
        rows = rows.to(self.inputs.device)
        return self.inputs.index_select(0, rows), self.targets.index_select(0, rows)

    def iterate(self, rows: Tensor, size: int, _epoch: int = 0, /) -> Iterator[Items]:
        """Yield what `load` returns, in batches of `size` rows; the last batch may be smaller."""
        rows = rows.to(self.inputs.device)
        return (self.load(rows[start : start + size]) for start in range(0, len(rows), size))

    def limit_labels(self, classes: int) -> None:
        """Raise UsageError for a label that is not 0 ... classes - 1."""
        check_labels(self.targets, classes)

    def close(self) -> None:
        """Do nothing: no process loads the items."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of one global batch."""

    inputs: Any  # as the data set has them: a tensor (n, ...), or a tuple or dict of tensors
    targets: Tensor  # (n, ...), for class labels int64 (n,)
    # Real items: len(targets), or 0 if an epoch's last batch has none for this rank, or if loading has failed. With 0
    # the inputs and targets are dummies, since many networks cannot take an empty batch.
    count: int
    global_size: int  # items in the global batch, over all ranks
    seed: int  # for this rank's random numbers in this step, such as dropout's; it differs by step and rank


class ShardSampler(DistributedSampler):
    """A DistributedSampler that neither pads nor drops: rank r gets rows r, r+W, r+2W, ... of the permutation.

    torch's class pads to a multiple of the world size (an image counts twice) or drops the rest. It also adds the epoch
    to the seed, so that epoch 1 of seed 0 repeats epoch 0 of seed 1.
    """

    def __init__(self, length: int, *, rank: int, world_size: int, seed: int) -> None:
        super().__init__(range(length), num_replicas=world_size, rank=rank, shuffle=True, seed=seed)  # type: ignore[arg-type]
        self.length = length
        self.num_samples = len(range(rank, length, world_size))

    def indices(self) -> Tensor:
        """Return this rank's share of this epoch's order, int64 (len(self),)."""
        generator = torch.Generator().manual_seed(derive_seed("batch order", self.seed, self.epoch))
        order = torch.randperm(self.length, generator=generator)  # the same on every rank
        return order[self.rank :: self.num_replicas]

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices().tolist())


class Batches:
    """The training set as this rank's batches."""

    def __init__(self, train_set: Split, *, batch_size: int, rank: int, world_size: int, seed: int) -> None:
        """Shard the set. `batch_size`: items in a global batch; the world size must divide this number."""
        self.train_set = train_set
        self.batch_size = batch_size
        self.local_size = batch_size // world_size
        self.sampler = ShardSampler(len(train_set), rank=rank, world_size=world_size, seed=seed)
        self.dummy = train_set.load(torch.zeros(min(2, self.local_size), dtype=torch.int64), 0)
        """Used if this rank has no item in a step: item 0, twice if there is room, since batch norm may need two."""

    def __len__(self) -> int:
        """Return the steps of an epoch, the same on every rank."""
        return math.ceil(len(self.train_set) / self.batch_size)

    @property
    def items_in_last_batch(self) -> int:
        """Return how many items, dummies included, this rank has in an epoch's last batch."""
        items = max(0, len(self.sampler) - (len(self) - 1) * self.local_size)
        return items or len(self.dummy[1])

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches `start` ... len(self) - 1 of that epoch."""
        loaded = self.train_set.iterate(self._rows(epoch, start), self.local_size, epoch)
        for step in range(start, len(self)):
            yield self._batch(epoch, step, next(loaded, None))

    def sample(self, step_in_epoch: int = 0) -> Batch:
        """Return a batch of epoch 0 to try the network on."""
        rows = self._rows(0, step_in_epoch)[: self.local_size]
        return self._batch(0, step_in_epoch, self.train_set.load(rows, 0) if len(rows) else None)

    def _rows(self, epoch: int, start: int) -> Tensor:
        self.sampler.set_epoch(epoch)
        return self.sampler.indices()[start * self.local_size :]

    def _batch(self, epoch: int, step: int, items: Items | None) -> Batch:
        inputs, targets = items or self.dummy
        seed = derive_seed("step", self.sampler.seed, epoch, step, self.sampler.rank)
        global_size = min(self.batch_size, len(self.train_set) - step * self.batch_size)
        return Batch(inputs, targets, len(targets) if items else 0, global_size, seed)


def evaluation_batches(split: Split, *, rank: int, world_size: int, size: int) -> Iterator[Items]:
    """Yield this rank's chunks of `size` items, as epoch 0 has them: chunk i goes to rank i % world_size. No padding.

    The chunks do not depend on the world size, so the outputs do not either.
    """
    chunks = torch.arange(len(split)).split(size)[rank::world_size]
    return split.iterate(torch.cat(chunks), size, 0) if chunks else iter(())


def check_labels(labels: Tensor, classes: int) -> None:
    """Raise UsageError if one of the labels (n,) is not 0 ... classes - 1."""
    low, high = (int(each) for each in labels.aminmax())
    if low < 0 or high >= classes:
        found = low if low < 0 else high
        raise UsageError(f"there is a label {found}; the network tells {classes} classes apart, 0 to {classes - 1}.")


def to_float(tensor: Tensor) -> Tensor:
    """Return inputs as fp32, uint8 divided by 255; other integers and bools stay: they may be indices or masks.

    Divides, as ToTensor does: multiplying by 1/255 rounds differently.
    """
    if tensor.dtype == torch.uint8:
        return tensor.to(torch.float32).div_(255)
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed `random`, numpy's and torch's CPU generator, and the device's generator."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    # Not torch.manual_seed: it formats a stack trace for CUDA's sake, which takes far longer than to seed.
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def derive_seed(purpose: str, *numbers: int) -> int:
    """Return a seed, 0 ... 2^63 - 1, made from the arguments; numbers that differ by one give unrelated seeds."""
    words = " ".join([purpose, *map(str, numbers)])
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8]) >> 1
