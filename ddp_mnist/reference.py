"""The competitors, restated in our own words: `bench` measures them and this job in turn on one machine.

The tutorial is "PyTorch Convolutional Neural Network Tutorial" by Aladdin and Sanna Persson: every image is decoded
and converted by itself, in the training process, and both sets are scored at the end. `python -m ddp_mnist.reference`
is its whole script.

The fast recipe is github.com/tuomaso/train_mnist_fast, notebook 8: one epoch to 99.04 ± 0.07 % (n = 30), published
with 0.76 s on a GTX 1660 Ti. Its clock starts with tensors that are normalised, shuffled and on the device, and so
does `train_published`; evaluation, which its 0.76 s include, is left out here as it is on our side.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

Loader = DataLoader[tuple[Tensor, Tensor]]

TUTORIAL_BATCH, TUTORIAL_EPOCHS, TUTORIAL_RATE = 64, 5, 1e-3
PUBLISHED_BATCH, PUBLISHED_RATE, PUBLISHED_BETAS = 256, 1e-2, (0.7, 0.9)
MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels in 0-1, as the fast recipe normalises


class TutorialCNN(nn.Module):
    """Images (N, 1, 28, 28) in 0-1 → logits (N, 10); its state dict fits `ddp_mnist.CNN` and the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, kernel_size=3, stride=1, padding=1)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        self.conv2 = nn.Conv2d(8, 16, kernel_size=3, stride=1, padding=1)
        self.fc1 = nn.Linear(16 * 7 * 7, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.pool(F.relu(self.conv1(images)))
        hidden = self.pool(F.relu(self.conv2(hidden)))
        return self.fc1(hidden.reshape(len(hidden), -1))


def tutorial_loaders(dataset: str, root: Path) -> tuple[Loader, Loader]:
    """(train, test) of `mnist` or `fashion-mnist`, whose raw files must be there: one image at a time through PIL and
    ToTensor, shuffled, no workers. Raises: RuntimeError for missing files."""
    from torchvision import datasets, transforms  # takes seconds, hence not above

    kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[dataset]
    splits = [kind(root=str(root), train=train, transform=transforms.ToTensor()) for train in (True, False)]
    train, test = (DataLoader(split, batch_size=TUTORIAL_BATCH, shuffle=True) for split in splits)
    return train, test


class Tutorial:
    """Network, loss and optimizer of the tutorial on the device it would choose."""

    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = TutorialCNN().to(self.device)
        self.criterion = nn.CrossEntropyLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=TUTORIAL_RATE)

    def step(self, images: Tensor, targets: Tensor) -> Tensor:
        """One optimizer step on images fp32 (n, 1, 28, 28) in 0-1; returns the batch's mean loss."""
        loss = self.criterion(self.model(images), targets)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss

    def epoch(self, loader: Loader) -> None:
        for images, targets in loader:
            self.step(images.to(self.device), targets.to(self.device))

    @torch.no_grad()
    def score(self, loader: Loader) -> tuple[int, int]:
        """(correct, count) in batches of the training's size, as the tutorial counts them."""
        correct: Tensor | int = 0
        count = 0
        self.model.eval()
        for images, targets in loader:
            predictions = self.model(images.to(self.device)).argmax(1)
            correct += (predictions == targets.to(self.device)).sum()
            count += len(predictions)
        self.model.train()
        return int(correct), count


class PublishedNet(nn.Module):
    """Normalised images (N, 1, 28, 28) → log-probabilities (N, 10); 215,194 parameters, no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, kernel_size=5)
        self.conv2 = nn.Conv2d(24, 32, kernel_size=3)
        self.fc1 = nn.Linear(32 * 5 * 5, 256)
        self.fc2 = nn.Linear(256, 10)

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(F.max_pool2d(self.conv1(images), 2))
        hidden = F.relu(F.max_pool2d(self.conv2(hidden), 2))
        hidden = F.relu(self.fc1(hidden.flatten(1)))
        return F.log_softmax(self.fc2(hidden), dim=1)


def published_tensors(images: Tensor, labels: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """uint8 (N, 1, 28, 28) → normalised fp32 on the device, and its labels, in an order drawn once for all runs."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    normal = images[order].to(torch.float32).div_(255).sub_(MEAN).div_(DEVIATION)
    return normal.to(device), labels[order].to(device)


def train_published(images: Tensor, labels: Tensor, seed: int) -> PublishedNet:
    """One epoch of the fast recipe over `published_tensors`."""
    torch.manual_seed(seed)
    net = PublishedNet().to(images.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=PUBLISHED_RATE, betas=PUBLISHED_BETAS)
    batches = list(zip(images.split(PUBLISHED_BATCH), labels.split(PUBLISHED_BATCH), strict=True))
    schedule = OneCycleLR(optimizer, max_lr=PUBLISHED_RATE, total_steps=len(batches), cycle_momentum=False)
    for batch, targets in batches:
        optimizer.zero_grad()
        F.nll_loss(net(batch), targets).backward()
        optimizer.step()
        schedule.step()
    return net


@torch.no_grad()
def published_accuracy(net: PublishedNet, images: Tensor, labels: Tensor) -> float:
    """0-1, in batches of 2,000 as published; the last, smaller one counts too."""
    batches = zip(images.split(2000), labels.split(2000), strict=True)
    correct = sum((net(batch).argmax(1) == targets).sum() for batch, targets in batches)
    return int(correct) / len(labels)


def main(argv: Sequence[str] | None = None) -> int:
    """The tutorial's script from its loaders to its two lines of accuracy; the files must be there."""
    parser = argparse.ArgumentParser(prog="python -m ddp_mnist.reference", description="The tutorial's script.")
    parser.add_argument("--dataset", choices=["mnist", "fashion-mnist"], default="mnist")
    parser.add_argument("--data-dir", type=Path, required=True, metavar="DIR")
    options = parser.parse_args(argv)
    train, test = tutorial_loaders(options.dataset, options.data_dir)
    tutorial = Tutorial()
    for _ in range(TUTORIAL_EPOCHS):
        tutorial.epoch(train)
    for name, loader in {"training": train, "test": test}.items():
        correct, count = tutorial.score(loader)
        print(f"Checking accuracy on {name} data")
        print(f"Got {correct} / {count} with accuracy {100 * correct / count:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
