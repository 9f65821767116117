"""The tutorial's network and scoring, restated: the independent yardstick for this package's own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn


class TutorialCNN(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels=1, out_channels=8, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        self.pool = nn.MaxPool2d(kernel_size=(2, 2), stride=(2, 2))
        self.conv2 = nn.Conv2d(in_channels=8, out_channels=16, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
        self.fc1 = nn.Linear(16 * 7 * 7, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        return self.fc1(x.reshape(x.shape[0], -1))


def read_raw(folder: Path, prefix: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the fp32 images (N, 1, 28, 28) in 0-1 and the labels of IDX files, read without the package."""
    images = np.frombuffer((folder / f"{prefix}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
    labels = np.frombuffer((folder / f"{prefix}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)
    scaled = torch.from_numpy(images.reshape(-1, 1, 28, 28).copy()).to(torch.float32).div(255)
    return scaled, torch.from_numpy(labels.astype(np.int64))


@torch.no_grad()
def count_correct(weights: Path, folder: Path, prefix: str) -> tuple[int, int, float]:
    """Return (correct, count, mean loss) of saved weights, by one process and the tutorial's network."""
    net = TutorialCNN()
    net.load_state_dict(load_file(weights))
    images, labels = read_raw(folder, prefix)
    logits = torch.cat([net(part) for part in images.split(500)])
    return int((logits.argmax(1) == labels).sum()), len(labels), F.cross_entropy(logits, labels).item()


def train(
    images: torch.Tensor, labels: torch.Tensor, batches: Iterable[torch.Tensor]
) -> tuple[list[float], list[float]]:
    """Train over batches of these rows as the tutorial does, from seed 0. Return losses, accuracies in 0-1."""
    torch.manual_seed(0)
    model = TutorialCNN()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
    losses, accuracies = [], []
    for rows in batches:
        scores = model(images[rows])
        loss = F.cross_entropy(scores, labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        accuracies.append((scores.argmax(1) == labels[rows]).float().mean().item())
    return losses, accuracies
