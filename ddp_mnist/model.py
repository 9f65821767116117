"""The tutorial's network: two 3x3 convolutions with pooling, one linear layer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_mnist.pooling import relu_of_maxima


def placed(net: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, its weights in the order in memory that is the faster one there."""
    net.to(device)
    # Not ours on a GPU: CUDA's libraries prefer the usual order where the channels are few (docs/benchmarks/README.md).
    usual = isinstance(net, CNN) and device.type == "cuda"
    if not usual and all(parameter.dim() <= 4 for parameter in net.parameters()):
        net.to(memory_format=torch.channels_last)
    return net


def _on_gpu(images: Tensor) -> bool:
    return images.device.type == "cuda"


def _layer(convolution: nn.Conv2d, images: Tensor, once: bool) -> Tensor:
    """Convolution, pooling, ReLU. The bias is the same for all that is pooled: added behind the pooling, it and its
    gradient have a quarter of the work. Not under autocast on a CPU, which loses by it
    (docs/benchmarks/variants.py). Hooks of the convolutions do not run."""
    weight, bias, padding = convolution.weight, convolution.bias, convolution.padding
    if _on_gpu(images):
        pooled = F.max_pool2d(F.conv2d(images, weight, padding=padding), 2)
        # The bias's gradient is summed over each picture first: a GPU does that sooner than one long sum.
        bias = bias.to(pooled.dtype).view(-1, 1, 1).expand(len(images), -1, 1, 1)  # type: ignore[union-attr]
        return pooled.add_(bias).relu_()
    if torch.is_autocast_enabled("cpu"):
        return relu_of_maxima(F.conv2d(images, weight, bias, padding=padding), None, once=once)
    return relu_of_maxima(F.conv2d(images, weight, padding=padding), bias, once=once)


class CNN(nn.Module):
    """Images (N, in_channels, 28, 28) in 0-1 → logits (N, num_classes), both fp32.

    Parameter names and shapes are the tutorial's (9,098 parameters at the defaults), so a state dict fits either
    class. It is the same function but for rounding: each layer pools before bias and ReLU (under autocast: before
    ReLU), which then have a quarter of the work, and the linear layer sums in another order.
    """

    once = False
    """Whether each forward pass has one backward pass at most, and neither torch.func nor hooks of saved tensors see
    it: it is then the faster one on a CPU. A `TrainStep` sets it as long as it trains."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10, widths: Sequence[int] = (8, 16)) -> None:
        super().__init__()
        first, second = widths
        self.conv1 = nn.Conv2d(in_channels, first, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(second * 7 * 7, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        hidden = _layer(self.conv2, _layer(self.conv1, images, self.once), self.once)
        if _on_gpu(hidden):
            return self._classify_in_parts(hidden.flatten(1))
        # Both in the order that channels_last activations have in memory: to reorder the weight, and its gradient, is
        # less than to reorder a batch of activations and theirs.
        weight = self.fc1.weight.unflatten(1, hidden.shape[1:]).permute(0, 2, 3, 1).flatten(1)
        return F.linear(hidden.permute(0, 2, 3, 1).flatten(1), weight, self.fc1.bias)

    def _classify_in_parts(self, hidden: Tensor) -> Tensor:
        """The linear layer as seven products of a seventh of its inputs each, which a GPU does side by side: with so
        few outputs cuBLAS adds up all inputs one after the other (docs/benchmarks/variants_gpu.py)."""
        if self.fc1.in_features % 7:  # a fork for larger images
            return self.fc1(hidden)
        parts = hidden.unflatten(1, (7, -1)).transpose(0, 1)
        weights = self.fc1.weight.unflatten(1, (7, -1)).permute(1, 2, 0)
        return torch.bmm(parts, weights).sum(0) + self.fc1.bias
