"""Score a network on a data set exactly, over all ranks; `python -m ddp_mnist.evaluate RUN_DIR` scores a run again."""

import argparse
import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast, gather_object, recursively_apply
from torch import Tensor, nn

from ddp_mnist.config import TrainConfig, default_data_dir
from ddp_mnist.data import batches, sources
from ddp_mnist.data.batches import Split, TensorSet
from ddp_mnist.distributed.context import Context, translate_errors
from ddp_mnist.distributed.launcher import entry_point, from_environment, hard_exit, show_warnings, suppress_output
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.model import CNN
from ddp_mnist.step import Loss, call, cross_entropy
from ddp_mnist.storage import directory
from ddp_mnist.storage.checkpoint import SavedRun, load_saved_run

WORST = 25  # the number of mistakes that a Score keeps


@dataclass(frozen=True)
class Mistake:
    """An image that the network put into a wrong class."""

    index: int  # row of the data set
    label: int
    prediction: int
    confidence: float  # the network's probability, 0-1, of its wrong prediction


@dataclass(frozen=True)
class Score:
    """The score of one network on one whole data set, each item counted once; equal on all ranks."""

    loss: float  # mean over all items
    count: int
    confusion: tuple[tuple[int, ...], ...] | None = None  # images by [label][prediction]; None: no labels
    mistakes: tuple[Mistake, ...] = ()  # the most confident first; at most WORST, the same at every world size

    @property
    def correct(self) -> int | None:
        """Return how many images were classified correctly; None without class labels."""
        return None if self.confusion is None else sum(row[label] for label, row in enumerate(self.confusion))

    @property
    def accuracy(self) -> float | None:
        """Return the share of correct images, 0-1; None without class labels."""
        return None if self.correct is None else self.correct / self.count

    def sentence(self) -> str:
        """Return the tutorial's line with the accuracy or, without class labels, a line with the mean loss."""
        if self.accuracy is None:
            return f"Got a mean loss of {self.loss:.6g} over {self.count}"
        return f"Got {self.correct} / {self.count} with accuracy {100 * self.accuracy:.2f}"


@torch.no_grad()
def evaluate(
    network: nn.Module, split: Split, context: Context, *, loss: Loss = cross_entropy, classes: int | None
) -> Score:
    """Return the network's exact score, in fp32, the same on every rank. Collective.

    `loss` returns one value per item. `classes`: what `find_classes` returns for this network and data set.
    """
    broadcast(list(network.buffers()))  # e.g. batch norm's averages: each rank has trained on other images
    cells = classes * classes if classes is not None else 0
    # float64 holds the counts exactly and makes the loss the same at every world size; MPS has no float64.
    home = torch.device("cpu") if context.device.type == "mps" else context.device
    totals = torch.zeros(2 + cells, dtype=torch.float64, device=home)
    mistakes: list[Mistake] = []
    size = context.run_on_all_ranks(lambda: chunk_size(split, context.device))
    first = context.rank * size
    with evaluation_mode(network):
        chunks = batches.evaluation_batches(split, rank=context.rank, world_size=context.world_size, size=size)
        for inputs, targets in chunks:
            batches.seed_generators(batches.derive_seed("score", first), context.device)  # for random layers
            outputs = call(network, inputs)
            totals[0] += loss(outputs, targets).sum().to(home)
            totals[1] += len(targets)
            if classes is not None:
                totals[2:] += torch.bincount(targets * classes + outputs.argmax(1), minlength=cells).to(home)
                mistakes = _worst([*mistakes, *_mistakes(outputs, targets, first)])
            first += context.world_size * size
    context.run_on_all_ranks(lambda: raise_failure(split))
    loss_sum, count, *counts = context.sum(totals).tolist()
    assert count == len(split), f"scored {count} of {len(split)} items"
    if classes is None:
        return Score(loss_sum / len(split), len(split))
    confusion = tuple(tuple(map(int, counts[start : start + classes])) for start in range(0, cells, classes))
    return Score(loss_sum / len(split), len(split), confusion, tuple(_worst(gather_object(mistakes))))


def raise_failure(split: Split) -> None:
    """Raise the error that ended `split.iterate` early on this rank, if any; the other ranks do not know of it."""
    if split.failure is not None:
        raise split.failure


def chunk_size(split: Split, device: torch.device) -> int:
    """Return how many items to score at once: the larger the items, the fewer. The world size has no influence."""
    numbers: list[int] = []
    recursively_apply(lambda tensor: numbers.append(tensor.numel()), split.load(torch.tensor([0]), 0)[0])
    # 250: what fits a CPU's caches, or what one process loads at a time. At least 32, if these are at most 128 MB.
    size = 10_000 if device.type != "cpu" and isinstance(split, TensorSet) else 250
    return max(1, min(32, 2**25 // max(1, sum(numbers))), size * 784 // max(784, sum(numbers)))


def move_to_device(network: nn.Module, device: torch.device) -> nn.Module:
    """Move the network to the device, in place, and return it. Training and scoring use it, so both round alike."""
    network.to(device)
    # On a CPU a step with NCHW weights takes much longer. Other networks stay in NCHW: `view` may fail in them.
    if device.type == "cpu" and isinstance(network, CNN):
        network.to(memory_format=torch.channels_last)
    return network


@contextlib.contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put the network into evaluation mode; after the block, give each layer its mode back: some may be frozen."""
    before = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


@torch.no_grad()
def find_classes(network: nn.Module, split: Split, loss: Loss = cross_entropy) -> int | None:
    """Return how many classes the network tells apart; None if the targets are no class labels.

    Raises UsageError: outputs, targets and loss do not fit each other.
    """
    inputs, targets = split.load(torch.arange(min(2, len(split))), 0)
    with evaluation_mode(network):
        outputs = call(network, inputs)
    labels = not targets.is_floating_point() and targets.dim() == 1
    logits = isinstance(outputs, Tensor) and outputs.dim() == 2
    if loss is cross_entropy and not logits:
        found = tuple(outputs.shape) if isinstance(outputs, Tensor) else f"a {type(outputs).__name__}"
        raise UsageError(f"for {len(targets)} items the network gives {found}; expected logits (items, classes).")
    if loss is cross_entropy and not labels:
        found = f"{targets.dtype} {tuple(targets.shape[1:])}"
        raise UsageError(f"a target is {found}; cross entropy expects a class, an integer. Give a `loss` of your own.")
    classes = None
    # With a loss of the script's own, integer targets need not be classes; if not, there is no error, and no accuracy.
    with contextlib.nullcontext() if loss is cross_entropy else contextlib.suppress(UsageError):
        if labels and logits and outputs.shape[1] > 1:
            batches.check_labels(targets, outputs.shape[1])
            split.limit_labels(outputs.shape[1])
            classes = outputs.shape[1]
    values = loss(outputs, targets)
    found = tuple(values.shape) if isinstance(values, Tensor) else f"a {type(values).__name__}"
    if found != (len(targets),):
        raise UsageError(
            f"for {len(targets)} items the loss is {found}; expected one value per item, ({len(targets)},): "
            'reduction="none", and a mean over what an item has several of.'
        )
    alone = loss(outputs[:1], targets[:1]) if isinstance(outputs, Tensor) else values[:1]
    if alone.shape != values[:1].shape or not torch.allclose(alone, values[:1], 1e-3, 1e-5, equal_nan=True):
        raise UsageError(
            f"the loss of an item depends on the other items of its batch; outputs are {tuple(outputs.shape)}, targets "
            f"{tuple(targets.shape)}. Expected a loss of each item by itself: do these shapes fit each other?"
        )
    return classes


def _mistakes(logits: Tensor, labels: Tensor, first: int) -> Iterator[Mistake]:
    """Yield the wrong predictions of a chunk whose first image is row `first`."""
    wrong = (logits.argmax(1) != labels).nonzero().flatten()
    confidence = logits[wrong].softmax(1).amax(1).nan_to_num()  # NaN, from ruined weights, becomes 0
    columns = (wrong + first, labels[wrong], logits[wrong].argmax(1), confidence)
    return (Mistake(*values) for values in zip(*(column.tolist() for column in columns), strict=True))


def _worst(mistakes: Iterable[Mistake]) -> list[Mistake]:
    return sorted(mistakes, key=lambda mistake: (-mistake.confidence, mistake.index))[:WORST]


def _rescore(run_dir: Path, context: Context, data_dir: Path | None) -> tuple[SavedRun, list[Score]]:
    """Return (the saved run, [its score on the training set, on the test set]). Collective. Raises: JobError."""
    # Rank 0 reads for all ranks: a run that is still training may write a checkpoint between two ranks' reads.
    saved = context.run_on_main(lambda: load_saved_run(run_dir))
    run_data_dir = saved.config.data_dir
    root = data_dir or (run_data_dir if run_data_dir.exists() else default_data_dir())
    splits = context.run_on_all_ranks(lambda: sources.load_mnist(saved.config.dataset, root))
    network = move_to_device(saved.network, context.device)  # as in training: the same rounding
    sets = [split.to(context.device) for split in splits]
    return saved, [evaluate(network, each, context, classes=find_classes(network, each)) for each in sets]


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0. Raises: JobError where the counts are not those of the run's own summary."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_mnist.evaluate",
        description="Score a run on its training and test set: the final weights, or an unfinished run's newest "
        "checkpoint. Counts that differ from summary.json are an error. With torchrun, several ranks share the work.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="default: the run's, else $DDP_MNIST_DATA or data")
    parser.add_argument("--threads", type=int, default=0, metavar="N", help="per rank; default: allowed CPUs / ranks")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    is_main = from_environment("RANK") == 0
    show_warnings(main=is_main)
    with contextlib.nullcontext() if is_main else suppress_output():  # one message for a wrong flag
        options = parser.parse_args(argv)
    config = TrainConfig(threads=options.threads, mixed_precision="no")
    with Context(config) as context, translate_errors(context):
        saved, (train, test) = _rescore(options.run_dir, context, options.data_dir)
    facts: dict[str, Any] = {"run_dir": str(options.run_dir), "weights": str(saved.source), "step": saved.step}
    facts |= {"dataset": saved.config.dataset, "world_size": context.world_size, "device": context.device.type}
    for name, score in (("train", train), ("test", test)):
        facts |= {f"{name}_{key}": getattr(score, key) for key in ("correct", "count", "accuracy", "loss")}
    said = saved.summary
    counts = ("train_correct", "train_count", "test_correct", "test_count")
    differing = [name for name in counts if said and facts[name] != said.get(name)]
    facts["agrees"] = not differing if said else None  # None: the run has no counts of these weights
    if is_main and options.json:
        print(json.dumps(directory.finite(facts), indent=2), flush=True)
    elif is_main:
        print(f"{saved.source}, step {saved.step or 'unknown'}, on {saved.config.dataset}")
        print(f"Checking accuracy on training data\n{train.sentence()}")
        print(f"Checking accuracy on test data\n{test.sentence()}", flush=True)
    if differing:
        found = "; ".join(f"{name} is {facts[name]}, {directory.SUMMARY} says {said.get(name)}" for name in differing)
        raise JobError(
            f"{saved.source} does not score as it did: {found}. The weights, the data or the summary have been changed "
            f"since, or {context.device.type} rounds otherwise than {said.get('device')}, the run's device."
        )
    return 0


if __name__ == "__main__":
    hard_exit(main())
