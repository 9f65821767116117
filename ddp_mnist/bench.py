"""The tutorial's training loop, restated, against this job's: one epoch each, in turn, on the same machine.

`python -m ddp_mnist.bench` prints the seconds, the best of each and their ratio, and writes them as JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddp_mnist.config import TrainConfig, default_data_dir
from ddp_mnist.errors import JobError


def tutorial_epoch(data_dir: Path) -> float:
    """Seconds for one training epoch as the tutorial does it: an image at a time through PIL and ToTensor."""
    import torch
    from torch import nn
    from torch.nn import functional
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    class TutorialCNN(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(1, 8, kernel_size=3, padding=1)
            self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
            self.conv2 = nn.Conv2d(8, 16, kernel_size=3, padding=1)
            self.fc1 = nn.Linear(16 * 7 * 7, 10)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            hidden = self.pool(functional.relu(self.conv1(images)))
            hidden = self.pool(functional.relu(self.conv2(hidden)))
            return self.fc1(hidden.reshape(hidden.shape[0], -1))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dataset = datasets.MNIST(root=str(data_dir), train=True, transform=transforms.ToTensor())
    loader = DataLoader(dataset, batch_size=64, shuffle=True)
    model = TutorialCNN().to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    started = time.perf_counter()
    for images, targets in loader:
        loss = criterion(model(images.to(device)), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def our_epoch(data_dir: Path) -> float:
    """Training seconds of one epoch of the job itself, tutorial recipe, with its logging and checkpoints."""
    from ddp_mnist.trainer import fit

    with tempfile.TemporaryDirectory() as folder:
        config = TrainConfig(dataset="mnist", data_dir=data_dir, epochs=1, output_dir=Path(folder), progress=False)
        return fit(config).summary["train_seconds"]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ddp_mnist.bench", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data-dir", type=Path, default=default_data_dir(), metavar="DIR")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="epochs of each, in turn (default: 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures and machine facts there")
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}; expected 1 or more")
    from ddp_mnist import data

    try:
        data.load("mnist", options.data_dir)  # both read the same verified files, nothing is timed while unpacking
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    import torch

    threads = torch.get_num_threads()
    times: dict[str, list[float]] = {"tutorial": [], "ddp_mnist": []}
    for _ in range(options.repeats):
        torch.set_num_threads(threads)
        times["tutorial"].append(tutorial_epoch(options.data_dir))
        times["ddp_mnist"].append(our_epoch(options.data_dir))
    report: dict[str, Any] = {
        "what": "seconds of one training epoch, 60,000 images, batch 64, Adam 1e-3",
        "machine": {"processor": platform.processor(), "threads": threads, "torch": torch.__version__},
        "seconds": times,
        "best_ratio": min(times["ddp_mnist"]) / min(times["tutorial"]),
    }
    print(f"\n{report['what']}; {threads} threads")
    for name, values in times.items():
        each = " ".join(f"{value:.2f}" for value in values)
        print(f"{name:10} best {min(values):6.2f}  median {statistics.median(values):6.2f}  all {each}")
    print(f"ratio of the best: {report['best_ratio']:.3f}")
    if options.json is not None:
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
