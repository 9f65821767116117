"""Data sets behind a DataLoader: each item is a function of (seed, epoch, row), whoever makes it."""

from __future__ import annotations

import itertools
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from ddp_mnist import TrainConfig, fit
from ddp_mnist.data.batches import Batches, TensorSet, evaluation_batches
from ddp_mnist.data.sources import DataLoaderSet
from ddp_mnist.distributed.context import Context
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.evaluate import evaluate

BATCH, ITEMS = 42, 85  # the last batch has one item, and most ranks none


class Augmented(Dataset[Any]):
    """Items that draw from all three generators, each its own number of times; and say how they were made."""

    def __init__(self, length: int = ITEMS) -> None:
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        drawn = torch.rand(row % 3 + 1).sum().item(), random.random(), np.random.rand()
        ignores_stops = signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
        return torch.tensor([row, torch.get_num_threads(), ignores_stops, os.nice(0), *drawn]), row % 3


Load = Callable[..., DataLoaderSet]


@pytest.fixture
def load() -> Iterator[Load]:
    made: list[DataLoaderSet] = []

    def make(data: Any = None, **options: Any) -> DataLoaderSet:
        made.append(DataLoaderSet("training", data or Augmented(), seed=5, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()


def rows_of(batches: Iterator[Any]) -> list[list[list[float]]]:
    """Return the real items of each batch, each as a list of numbers."""
    return [batch.inputs[: batch.count].tolist() for batch in batches]


@pytest.fixture(scope="module")
def expected() -> list[list[list[list[float]]]]:
    """Return the batches of two epochs as one rank without workers makes them."""
    batches = Batches(DataLoaderSet("training", Augmented(), seed=5), batch_size=BATCH, rank=0, world_size=1, seed=5)
    return [rows_of(batches.epoch(epoch)) for epoch in range(2)]


def drawn(item: list[float]) -> tuple[float, ...]:
    """Return an item without who has made it."""
    return item[0], *item[4:]


def test_every_item_of_every_epoch_is_drawn_anew(expected: list[list[list[list[float]]]]) -> None:
    found = [tuple(item[4:]) for epoch in expected for batch in epoch for item in batch]
    assert len(set(found)) == len(found) == 2 * ITEMS
    assert len({tuple(item[0] for batch in epoch for item in batch) for epoch in expected}) == 2


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_each_row_is_loaded_once_to_the_same_bits_at_any_number_of_ranks_and_workers(
    load: Load, expected: list[list[list[list[float]]]], workers: int
) -> None:
    """From an epoch's first batch or a later one, whatever the main process draws, after an epoch that was left."""
    split = load(workers=workers)
    for world_size, (epoch, start) in itertools.product((1, 2, 3, 7), ((0, 0), (1, 1))):
        torch.manual_seed(world_size)
        random.seed(workers)
        ranks = []
        for rank in range(world_size):
            batches = Batches(split, batch_size=BATCH, rank=rank, world_size=world_size, seed=5)
            next(batches.epoch(7))
            ranks.append(rows_of(batches.epoch(epoch, start)))
        for step, shares in enumerate(zip(*ranks, strict=True), start=start):
            items = [item for share in shares for item in share]
            # One thread; a worker ignores what stops the job, and leaves the CPU to the training.
            assert {tuple(item[1:4]) for item in items} == {(1, workers > 0, os.nice(0) + 5 * (workers > 0))}
            assert sorted(map(drawn, items)) == sorted(map(drawn, expected[epoch][step]))


def test_an_epoch_entered_in_the_middle_loads_nothing_that_it_throws_away(load: Load) -> None:
    made: list[int] = []
    data = Items(lambda row: (torch.zeros(1), made.append(row) or 0), ITEMS)
    batches = Batches(load(data), batch_size=20, rank=1, world_size=2, seed=5)
    made.clear()
    assert len(list(batches.epoch(0, start=3))) == 2
    assert made == batches.sampler.indices()[30:].tolist()


@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_a_score_sees_each_row_once_as_epoch_0_makes_it(
    load: Load, expected: list[list[list[list[float]]]], world_size: int
) -> None:
    split = load()
    found = [
        (inputs.tolist(), targets.tolist())
        for rank in range(world_size)
        for inputs, targets in evaluation_batches(split, rank=rank, world_size=world_size, size=10)
    ]
    items = sorted(drawn(item) for chunk, _ in found for item in chunk)
    assert items == sorted(drawn(item) for batch in expected[0] for item in batch)
    assert sorted(len(chunk) for chunk, _ in found) == [5, *[10] * 8]
    assert all([row % 3 for row, *_ in chunk] == targets for chunk, targets in found)


def test_more_workers_than_items(load: Load) -> None:
    split = load(Augmented(2), workers=3)
    found = [targets.tolist() for _, targets in split.iterate(torch.tensor([1, 0]), 1, 0)]
    assert found == [[1], [0]]


class Records(Dataset[Any]):
    """The bytes of a file, which is opened when the first of them is asked for."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, None

    def __len__(self) -> int:
        return self.path.stat().st_size

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        self.file: Any = self.file or self.path.open("rb")
        self.file.seek(row)
        return torch.tensor(self.file.read(1)[0]), 0


def test_a_file_that_items_are_read_from_is_opened_by_workers_alone(load: Load, tmp_path: Path) -> None:
    """Opened before they are forked, it would have one position for all of them."""

    (path := tmp_path / "records").write_bytes(bytes(range(200)))
    split = load(records := Records(path), workers=2)
    assert split.identity() == load(Records(path)).identity()
    assert split.load(torch.tensor([7, 5]), 0)[0].tolist() == [7, 5]
    assert torch.cat([inputs for inputs, _ in split.iterate(torch.arange(200), 10, 0)]).tolist() == [*range(200)]
    assert records.file is None


def test_pictures_are_scored_many_at_a_time_and_large_volumes_few(process_of_a_job: None) -> None:
    sizes: list[int] = []

    class Recording(nn.Module):
        def forward(self, pictures: Tensor) -> Tensor:
            sizes.append(len(pictures))
            return pictures[:, :, 0, 0]

    with Context(TrainConfig()) as context:
        for count, *shape in ((40, 3, 224, 224), (3, 3, 2048, 4096)):
            items = TensorSet(torch.zeros(count, *shape, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
            assert evaluate(Recording(), items, context, classes=3).correct == count
    assert sizes == [32, 8, 1, 1, 1]


# --- Whole runs in this process


class Items(Dataset[Any]):
    """Items of any kind: what `make` returns for a row."""

    def __init__(self, make: Callable[[int], Any], length: int = 21) -> None:
        self.make, self.length = make, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, row: int) -> Any:
        return self.make(row)


def point(row: int) -> tuple[Any, int]:
    return torch.rand(4, generator=torch.Generator().manual_seed(row)), row % 3


class Sum(nn.Module):
    """Two layers for two inputs, of which one may come in whatever way."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(2, 3), nn.Linear(2, 3)

    def forward(self, left: Tensor, right: Tensor | None = None) -> Tensor:
        if right is None:
            left, right = left.split(2, dim=1)
        return self.left(left) + self.right(right)


Fit = Callable[..., Any]


@pytest.fixture
def fit_here(process_of_a_job: None, tmp_path: Path) -> Fit:
    def run(data: Any, name: str = "run", *, model: Any = Sum, **settings: Any) -> Any:
        settings = {"batch_size": 4, "epochs": 2, "threads": 1, "pictures": False} | settings
        config = TrainConfig(output_dir=tmp_path / name, wandb="disabled", **settings)
        return fit(config, model=model, data=(data, data))

    return run


def test_inputs_may_be_a_tensor_a_tuple_or_a_dict_of_any_numbers(fit_here: Fit) -> None:
    def halves(row: int) -> tuple[Any, Any]:
        whole, _ = point(row)
        return whole[:2].double().numpy(), whole[2:]

    kinds = {
        "tensor": point,
        "tuple": lambda row: (halves(row), np.int32(row % 3)),
        "dict": lambda row: (dict(zip(("left", "right"), halves(row), strict=True)), torch.tensor(row % 3).byte()),
    }
    weights = {
        (fit_here(Items(make), name, accumulate=2).run_dir / "model.safetensors").read_bytes()
        for name, make in kinds.items()
    }
    assert len(weights) == 1


def test_tensors_in_memory_and_the_same_items_give_the_same_weights(fit_here: Fit) -> None:
    inputs, targets = zip(*map(point, range(21)), strict=True)
    in_memory = fit_here((torch.stack(inputs), torch.tensor(targets)), "memory").run_dir
    loaded = fit_here(Items(point), "loaded").run_dir
    assert (loaded / "model.safetensors").read_bytes() == (in_memory / "model.safetensors").read_bytes()


def test_integers_reach_the_network_as_they_are(fit_here: Fit) -> None:
    """They may be the indices of words."""
    words = torch.arange(63).view(21, 3) % 7
    network = {"model": lambda: nn.Sequential(nn.Embedding(7, 2), nn.Flatten(), nn.Linear(6, 3))}
    in_memory = fit_here((words, words[:, 0] % 3), "memory", **network).summary
    loaded = fit_here(Items(lambda row: (words[row], words[row, 0] % 3)), "loaded", **network).summary
    assert in_memory["test_correct"] == loaded["test_correct"]


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(())


class NoLength(Dataset[Any]):
    def __getitem__(self, row: int) -> Any:
        return point(row)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (Endless(), "the training set is a Endless; expected .*__len__ and __getitem__"),
        (NoLength(), "the training set, a NoLength, has no length"),
        (Items(point, 0), "the training set, a Items, is empty"),
        (Items(lambda row: {"x": point(row)}), "the training set: an item is a dict; expected a pair"),
        (Items(lambda row: (*point(row), 1)), "the training set: an item is a tuple; expected a pair"),
        (Items(lambda row: (torch.zeros(row + 1), 0)), "the training set: its items do not make a batch"),
        (Items(lambda row: ("a word", 0)), "the training set: its items do not make a batch"),
        (Items(lambda row: (torch.zeros(4), {"box": 1})), "a target is a dict; expected a tensor or a number"),
        (Items(lambda row: (torch.zeros(4), 3)), "there is a label 3; the network tells 3 classes apart"),
        (Items(lambda row: (torch.zeros(4), 3 if row == 9 else 0)), "there is a label 3"),
        (Items(lambda row: (torch.zeros(4), 0.5)), "a class, an integer. Give a `loss` of your own"),
        (
            Items(lambda row: point(row) if row != 10 else [][row]),
            "item 10 could not be made.\nTraceback(?s:.*)IndexErr",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_a_bad_data_set_is_one_message(fit_here: Fit, data: Any, message: str) -> None:
    with pytest.raises(JobError, match=message) as caught:
        fit_here(data)
    assert caught.value.exit_code == (1 if "Traceback" in message else 2)


def test_a_run_is_continued_on_the_same_data_set_alone(fit_here: Fit, caplog: pytest.LogCaptureFixture) -> None:
    fit_here(Items(point), max_steps=5)
    for other in (Items(point, 22), Items(lambda row: (point(row)[0] + 1, row % 3))):
        with pytest.raises(UsageError, match="holds a run on other"):
            fit_here(other)
    assert fit_here(Items(point)).summary["resumed_from"] == 5
    assert not caplog.records


def test_random_numbers_of_a_data_sets_own_are_warned_of_and_it_is_known_by_type_and_length(
    fit_here: Fit, caplog: pytest.LogCaptureFixture
) -> None:
    own = torch.Generator().manual_seed(0)
    data = Items(lambda row: (torch.rand(4, generator=own), row % 3))
    fit_here(data, max_steps=5)
    assert "an item of the training set differs each time it is made, by random numbers of its own" in caplog.text
    assert fit_here(data).summary["resumed_from"] == 5


class Scaled(TensorDataset):
    """The usual way to augment tensors."""

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        inputs, target = super().__getitem__(row)
        return inputs * 0 + random.random(), target


def test_a_subclass_of_a_tensor_dataset_makes_its_own_items(fit_here: Fit) -> None:
    seen: list[Tensor] = []

    class Watching(Sum):
        def forward(self, left: Tensor) -> Tensor:
            seen.append(left.detach())
            return super().forward(left)

    fit_here(Scaled(torch.rand(8, 4), torch.arange(8) % 3), model=Watching)
    assert all((batch == batch[:, :1]).all() for batch in seen) and len(torch.cat(seen)[:, 0].unique()) > 8


def test_a_mask_of_bools_reaches_the_network_as_it_is(fit_here: Fit) -> None:
    class Masked(nn.Linear):
        def forward(self, values: Tensor, mask: Tensor) -> Tensor:
            return super().forward(values.masked_fill(mask, 0))

    data = Items(lambda row: ({"values": point(row)[0], "mask": torch.arange(4) > row % 4}, row % 3))
    assert fit_here(data, model=lambda: Masked(4, 3)).summary["finished"]


def test_a_score_can_be_repeated_whatever_was_drawn_before(load: Load, process_of_a_job: None) -> None:
    class Drawing(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return super().forward(inputs) + torch.rand(3) * random.random()

    network, split = Drawing(7, 3), load()
    with Context(TrainConfig(threads=1, mixed_precision="no")) as context:
        first = evaluate(network, split, context, classes=3)
        random.seed(int(torch.rand(1) * 1000))
        assert evaluate(network, split, context, classes=3) == first
    assert first.count == ITEMS


def test_a_bug_of_a_network_leaves_no_workers(fit_here: Fit) -> None:
    """Its traceback, which may live as long as Python, holds the loader."""

    class Failing(Sum):
        def forward(self, left: Tensor) -> Tensor:
            assert len(psutil.Process().children()) < 2
            return super().forward(left)

    with pytest.raises(AssertionError) as caught:
        fit_here(Items(point), model=Failing, workers=2)
    assert caught.tb is not None and psutil.Process().children() == []
