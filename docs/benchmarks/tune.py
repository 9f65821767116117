"""How the recipes were tuned: on 55,000 images of the training set, scored on its other 5,000; never on the test set.

    python docs/benchmarks/tune.py --seeds 3 16,48:128:1:1.5e-2:0.99 8,16:64:2:1e-2:0.99

Each word is widths:batch:epochs:peak rate:beta2, with the one-cycle schedule. Prints mean ± sd and training seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile

from ddp_mnist import TrainConfig, fit
from ddp_mnist.config import default_data_dir
from ddp_mnist.data import load

FIT = 55_000


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("recipes", nargs="+", metavar="WIDTHS:BATCH:EPOCHS:RATE:BETA2")
    options = parser.parse_args()
    train, _ = load("mnist", default_data_dir())
    split = ((train.images[:FIT], train.labels[:FIT]), (train.images[FIT:], train.labels[FIT:]))
    for word in options.recipes:
        widths, batch, epochs, rate, beta2 = word.split(":")
        accuracies, seconds = [], []
        for seed in range(options.seeds):
            with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
                config = TrainConfig(
                    widths=tuple(map(int, widths.split(","))),  # type: ignore[arg-type]
                    batch_size=int(batch),
                    epochs=int(epochs),
                    lr=float(rate),
                    beta2=float(beta2),
                    schedule="onecycle",
                    seed=seed,
                    threads=options.threads,
                    output_dir=folder,  # type: ignore[arg-type]
                    wandb="disabled",
                    pictures=False,
                )
                summary = fit(config, data=split).summary
            accuracies.append(100 * summary["test_accuracy"])
            seconds.append(summary["train_seconds"])
        spread = statistics.stdev(accuracies) if len(accuracies) > 1 else 0
        print(
            f"{word}: {statistics.mean(accuracies):.2f} ± {spread:.2f} %, {statistics.median(seconds):.2f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()
