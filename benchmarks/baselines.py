"""The other sides of the comparisons, restated in our own words.

"PyTorch Convolutional Neural Network Tutorial" by Aladdin and Sanna Persson; its script is `baselines.py mnist DIR 5`;
the loop of Accelerate's documentation; github.com/tuomaso/train_mnist_fast, notebook 8 (99.04 ± 0.07 %, n = 30).

Each has `begin(seed)`: make a new network and optimizer; `epoch(limit)`: train for one epoch, or its first `limit`
steps, and return the number of images; `accuracy()`: return the test accuracy, 0-1.
"""

import sys
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision import datasets, transforms

MEAN, DEVIATION = 0.1307, 0.3081  # of MNIST's training pixels in 0-1, as the fast recipe normalises


class TutorialCNN(nn.Module):
    """Map images (n, 1, 28, 28) in 0-1 to logits (n, 10)."""

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


class Tutorial:
    """The tutorial's loop and accuracy check: a PIL image at a time, through ToTensor. The raw files must be there."""

    def __init__(self, dataset: str, root: str) -> None:
        kind = {"mnist": datasets.MNIST, "fashion-mnist": datasets.FashionMNIST}[dataset]
        sets = (kind(root, train=train, transform=transforms.ToTensor()) for train in (True, False))
        self.train_loader, self.test_loader = (DataLoader(each, batch_size=64, shuffle=True) for each in sets)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.criterion = nn.CrossEntropyLoss()

    def begin(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model: Any = TutorialCNN().to(self.device)
        self.optimizer: Any = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def epoch(self, limit: int | None = None) -> int:
        count = 0
        for images, targets in islice(self.train_loader, limit):
            images, targets = images.to(self.device), targets.to(self.device)
            loss = self.criterion(self.model(images), targets)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            count += len(targets)
        return count

    @torch.no_grad()
    def accuracy(self, loader: DataLoader[Any] | None = None) -> float:
        correct, count = torch.zeros((), dtype=torch.int64, device=self.device), 0
        self.model.eval()
        for images, targets in loader or self.test_loader:
            correct += (self.model(images.to(self.device)).argmax(1) == targets.to(self.device)).sum()
            count += len(targets)
        self.model.train()
        return int(correct) / count


class AccelerateExample(Tutorial):
    """The same network, loader and optimizer, all prepared by Accelerate, in the loop of its documentation."""

    def begin(self, seed: int) -> None:
        super().begin(seed)
        self.accelerator = accelerator = Accelerator()
        self.loader, self.model, self.optimizer = accelerator.prepare(self.train_loader, self.model, self.optimizer)

    def epoch(self, limit: int | None = None) -> int:
        count = 0
        for images, targets in islice(self.loader, limit):
            self.optimizer.zero_grad()
            loss = self.criterion(self.model(images), targets)
            self.accelerator.backward(loss)
            self.optimizer.step()
            count += len(targets)
        return count


def published_net() -> nn.Module:
    """Return a network of normalised images (n, 1, 28, 28) → log-probabilities (n, 10); 215,194 parameters."""
    first = nn.Conv2d(1, 24, kernel_size=5), nn.MaxPool2d(2), nn.ReLU()
    second = nn.Conv2d(24, 32, kernel_size=3), nn.MaxPool2d(2), nn.ReLU()
    linear = nn.Flatten(), nn.Linear(32 * 5 * 5, 256), nn.ReLU(), nn.Linear(256, 10)
    return nn.Sequential(*first, *second, *linear, nn.LogSoftmax(dim=1))


class Published:
    """One epoch of the fast recipe. Its clock starts with tensors that are normalised, shuffled once, on the device."""

    def __init__(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:  # uint8 images, labels
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))
        self.batches = self._batches(train[0][order], train[1][order], 256)
        self.test_batches = self._batches(*test, 2000)

    def _batches(self, images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        normal = images.to(torch.float32).div_(255).sub_(MEAN).div_(DEVIATION).to(self.device)
        return list(zip(normal.split(size), labels.to(self.device).split(size), strict=True))

    def begin(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.net = published_net().to(self.device)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=1e-2, betas=(0.7, 0.9))
        self.schedule = OneCycleLR(self.optimizer, 1e-2, total_steps=len(self.batches), cycle_momentum=False)

    def epoch(self, limit: int | None = None) -> int:
        for images, targets in self.batches[:limit]:
            self.optimizer.zero_grad()
            F.nll_loss(self.net(images), targets).backward()
            self.optimizer.step()
            self.schedule.step()
        return sum(len(targets) for _, targets in self.batches[:limit])

    @torch.no_grad()
    def accuracy(self) -> float:
        right = [self.net(images).argmax(1) == targets for images, targets in self.test_batches]
        return torch.cat(right).double().mean().item()


if __name__ == "__main__":
    dataset, root, epochs = sys.argv[1:]
    tutorial = Tutorial(dataset, root)
    tutorial.begin(seed=0)
    for _ in range(int(epochs)):
        tutorial.epoch()
    for name, loader in {"training": tutorial.train_loader, "test": tutorial.test_loader}.items():
        print(f"Accuracy on {name} data: {tutorial.accuracy(loader):.2%}")
