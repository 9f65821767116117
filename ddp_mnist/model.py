"""The tutorial's network: two 3x3 convolutions with pooling, one linear layer."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn


class CNN(nn.Module):
    """Map images (n, in_channels, 28, 28) in 0-1 to logits (n, num_classes).

    Parameter names and shapes are the tutorial's (9,098 parameters at the defaults): a state dict fits both classes.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, widths: Sequence[int] = (8, 16)) -> None:
        super().__init__()
        first, second = widths
        self.conv1 = nn.Conv2d(in_channels, first, kernel_size=3, padding=1)
        self.pool = nn.MaxPool2d(kernel_size=2)
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(second * 7 * 7, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (n, num_classes)."""
        # Pool before the ReLU: the same function as the tutorial's, and the ReLU has a quarter of the work.
        hidden = F.relu(self.pool(self.conv1(images)))
        hidden = F.relu(self.pool(self.conv2(hidden)))
        return self.fc1(hidden.flatten(1))
