"""How `--recipe record` was tuned: on 55,000 training images, scored on the other 5,000; never on the test set.

    python docs/benchmarks/tune.py --seeds 24 published 8,32:160:2:2.2e-2:0.95:linear:no

Each word is widths:batch:epochs:peak rate:beta2:schedule:precision, or `published`, the fast recipe of others as the
bench restates it. Every seed holds out another 5,000, the same for all words: differences are of equal images.
Prints mean ± sd in percent, the difference to the first word ± its standard error, and training seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
from pathlib import Path

import torch

from ddp_mnist import TrainConfig, fit
from ddp_mnist.bench_clock import timed
from ddp_mnist.config import default_data_dir
from ddp_mnist.data import Split, load
from ddp_mnist.process import tell_uncaught
from ddp_mnist.reference import published_accuracy, published_tensors, train_published

HELD_OUT = 5000


def split(data: Split, seed: int) -> tuple[Split, Split]:
    first = seed * HELD_OUT % len(data)
    held = torch.arange(len(data)).sub(first).remainder(len(data)) < HELD_OUT
    return Split(data.images[~held], data.labels[~held]), Split(data.images[held], data.labels[held])


def ours(word: str, data: Split, seed: int, threads: int) -> tuple[float, float]:
    """(accuracy in percent, training seconds)"""
    widths, batch, epochs, rate, beta2, schedule, precision = word.split(":")
    fitted, held = split(data, seed)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        config = TrainConfig(
            widths=tuple(map(int, widths.split(","))),  # type: ignore[arg-type]
            batch_size=int(batch),
            epochs=int(epochs),
            lr=float(rate),
            beta2=float(beta2),
            schedule=schedule,  # type: ignore[arg-type]
            mixed_precision=precision,  # type: ignore[arg-type]
            seed=seed,
            threads=threads,
            output_dir=Path(folder),
            wandb="disabled",
            pictures=False,
        )
        summary = fit(config, data=((fitted.images, fitted.labels), (held.images, held.labels))).summary
    return 100 * summary["test_accuracy"], summary["train_seconds"]


def published(data: Split, seed: int) -> tuple[float, float]:
    (images, labels), held = (
        published_tensors(part.images, part.labels, torch.device("cpu")) for part in split(data, seed)
    )
    nets = []
    seconds = timed(lambda: nets.append(train_published(images, labels, seed)))
    return 100 * published_accuracy(nets[0], *held), seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("recipes", nargs="+", metavar="WIDTHS:BATCH:EPOCHS:RATE:BETA2:SCHEDULE:PRECISION")
    options = parser.parse_args()
    tell_uncaught()
    torch.set_num_threads(options.threads)
    data, _ = load("mnist", default_data_dir())
    first: list[float] = []
    for word in options.recipes:
        runs = [
            published(data, seed) if word == "published" else ours(word, data, seed, options.threads)
            for seed in range(options.seeds)
        ]
        accuracies = [accuracy for accuracy, _ in runs]
        first = first or accuracies
        text = f"{word}: {statistics.mean(accuracies):.2f}"
        if options.seeds > 1:
            differences = [one - other for one, other in zip(accuracies, first, strict=True)]
            error = statistics.stdev(differences) / options.seeds**0.5
            text += f" ± {statistics.stdev(accuracies):.2f} %, {statistics.mean(differences):+.3f} ± {error:.3f}"
        print(f"{text}, {statistics.median(seconds for _, seconds in runs):.2f} s", flush=True)


if __name__ == "__main__":
    main()
