"""The other sides of the comparisons, restated in our own words.

"PyTorch Convolutional Neural Network Tutorial" by Aladdin and Sanna Persson; its script is `baselines.py DIR 5`;
the loop of Accelerate's documentation; github.com/tuomaso/train_mnist_fast, notebook 8 (99.04 ± 0.07 %, n = 30).
"""

import sys
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, transforms


def tutorial_net(channels: int = 1, side: int = 28) -> nn.Module:
    """Return a network of images in 0-1 (n, channels, side, side) → logits (n, 10); of MNIST's 9,098 parameters."""
    first = nn.Conv2d(channels, 8, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    second = nn.Conv2d(8, 16, kernel_size=3, padding=1), nn.ReLU(), nn.MaxPool2d(2)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(16 * (side // 4) ** 2, 10))


def published_net() -> nn.Module:
    """Return a network of normalised images (n, 1, 28, 28) → log-probabilities (n, 10); 215,194 parameters."""
    first = nn.Conv2d(1, 24, kernel_size=5), nn.MaxPool2d(2), nn.ReLU()
    second = nn.Conv2d(24, 32, kernel_size=3), nn.MaxPool2d(2), nn.ReLU()
    linear = nn.Flatten(), nn.Linear(32 * 5 * 5, 256), nn.ReLU(), nn.Linear(256, 10)
    return nn.Sequential(*first, *second, *linear, nn.LogSoftmax(dim=1))


def write_pictures(root: Path, count: int) -> None:
    """Write so many PNGs of 32 x 32 random colours, a folder for each of ten classes."""
    for number, (picture, label) in enumerate(datasets.FakeData(count, (3, 32, 32))):
        (root / str(int(label))).mkdir(parents=True, exist_ok=True)
        picture.save(root / str(int(label)) / f"{number}.png")


def augmented(root: Path) -> Dataset[Any]:
    """Return the pictures in these folders, each with another crop and flip whenever it is loaded."""
    changes = transforms.RandomCrop(32, padding=4), transforms.RandomHorizontalFlip(), transforms.ToTensor()
    return datasets.ImageFolder(root, transforms.Compose(changes))


class Tutorial:
    """The tutorial's loop and accuracy check: a PIL image at a time, through ToTensor. The raw files must be there."""

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schedule: Any = None
    backward: Any = staticmethod(Tensor.backward)
    make_network: Any = staticmethod(tutorial_net)

    def __init__(self, dataset: str, root: Path) -> None:
        if dataset == "own-files":
            self.make_network = partial(tutorial_net, 3, 32)
            self.loader: Any = DataLoader(augmented(root), 64, shuffle=True, num_workers=2, persistent_workers=True)
            return
        sets = (datasets.FashionMNIST(root, train, transforms.ToTensor()) for train in (True, False))
        self.loader, self.test_loader = (DataLoader(each, batch_size=64, shuffle=True) for each in sets)

    def begin(self, seed: int) -> None:
        """Make a new network and optimizer."""
        torch.manual_seed(seed)
        self.model: Any = self.make_network().to(self.device)
        self.criterion: nn.Module = nn.CrossEntropyLoss()
        self.optimizer: Any = torch.optim.Adam(self.model.parameters(), lr=1e-3)

    def epoch(self, limit: int | None = None) -> int:
        """Train for one epoch, or its first `limit` steps. Return the number of images."""
        count = 0
        for images, targets in islice(self.loader, limit):
            images, targets = images.to(self.device), targets.to(self.device)
            loss = self.criterion(self.model(images), targets)
            self.optimizer.zero_grad()
            self.backward(loss)
            self.optimizer.step()
            if self.schedule is not None:
                self.schedule.step()
            count += len(targets)
        return count

    @torch.no_grad()
    def accuracy(self, loader: Any = None) -> float:
        """Return the accuracy on the test set, or on what `loader` yields, 0-1."""
        correct, count = torch.zeros((), dtype=torch.int64, device=self.device), 0
        self.model.eval()
        for images, targets in loader or self.test_loader:
            correct += (self.model(images.to(self.device)).argmax(1) == targets.to(self.device)).sum()
            count += len(targets)
        self.model.train()
        return int(correct) / count


class AccelerateExample(Tutorial):
    """The same network, loader and optimizer, all prepared by Accelerate, as its documentation shows."""

    def begin(self, seed: int) -> None:
        """Make a new network and optimizer, and prepare them."""
        super().begin(seed)
        accelerator = Accelerator()
        self.loader, self.model, self.optimizer = accelerator.prepare(self.loader, self.model, self.optimizer)
        self.backward = accelerator.backward


class Published(Tutorial):
    """One epoch of the fast recipe. Its clock starts with tensors that are normalised, shuffled once, on the device."""

    def __init__(self, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> None:  # uint8 images, labels
        order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(0))
        self.loader: Any = self._batches(train[0][order], train[1][order], 256)
        self.test_loader: Any = self._batches(*test, 2000)

    def _batches(self, images: Tensor, labels: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
        normal = images.to(torch.float32).div_(255).sub_(0.1307).div_(0.3081).to(self.device)  # mean, deviation
        return list(zip(normal.split(size), labels.to(self.device).split(size), strict=True))

    def begin(self, seed: int) -> None:
        """Make a new network, optimizer and schedule."""
        torch.manual_seed(seed)
        self.model, self.criterion = published_net().to(self.device), nn.NLLLoss()
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-2, betas=(0.7, 0.9))
        self.schedule = OneCycleLR(self.optimizer, 1e-2, total_steps=len(self.loader), cycle_momentum=False)


if __name__ == "__main__":
    tutorial = Tutorial("fashion-mnist", Path(sys.argv[1]))
    tutorial.begin(seed=0)
    for _ in range(int(sys.argv[2])):
        tutorial.epoch()
    for name, loader in {"training": tutorial.loader, "test": tutorial.test_loader}.items():
        print(f"Accuracy on {name} data: {tutorial.accuracy(loader):.2%}")
