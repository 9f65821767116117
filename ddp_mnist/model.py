"""The tutorial's network: two 3x3 convolutions with pooling, one linear layer."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_mnist import by_hand

log = logging.getLogger(__name__)


def placed(net: nn.Module, device: torch.device, *, triton: bool = True) -> nn.Module:
    """The network on the device, its weights in the order in memory that is the faster one there. `triton`: ours runs
    there as `kernels`, where that can be."""
    net.to(device)
    # Not ours on a GPU: CUDA's libraries prefer the usual order where the channels are few (docs/benchmarks/README.md).
    usual = isinstance(net, CNN) and device.type == "cuda"
    if not usual and all(parameter.dim() <= 4 for parameter in net.parameters()):
        net.to(memory_format=torch.channels_last)
    if isinstance(net, CNN):
        net.triton = triton and device.type == "cuda" and torch.version.hip is None and _triton_works(device)
    return net


@functools.cache
def _triton_works(device: torch.device) -> bool:
    """Whether kernels can be built and run here; a warning where not: Triton, a C compiler or a place for what they
    make may be missing, or the GPU too old."""
    try:
        from ddp_mnist import kernels

        kernels.try_out(device)
    except Exception as error:  # of many kinds; torch does the same, in more time
        what = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}" if str(error).strip() else repr(error)
        log.warning("Triton cannot be used (%s): torch's own operations are, which take longer. See --no-triton.", what)
        return False
    return True


def _layer(convolution: nn.Conv2d, images: Tensor, *, triton: bool) -> Tensor:
    """Convolution, pooling, ReLU. The bias is the same for all that is pooled: added behind the pooling, it and its
    gradient have a quarter of the work. Hooks of the convolutions do not run."""
    weight, bias = convolution.weight, convolution.bias
    if triton and images.is_cuda:
        from ddp_mnist import kernels

        if kernels.takes_layer(convolution, images):
            return kernels.layer(images, weight, bias)  # type: ignore[arg-type]
    pooled = F.max_pool2d(convolution._conv_forward(images, weight, None), 2)
    return (pooled if bias is None else pooled.add_(bias.to(pooled.dtype).view(-1, 1, 1))).relu_()


class CNN(nn.Module):
    """Images (N, in_channels, 28, 28) in 0-1 → logits (N, num_classes), both fp32.

    Parameter names and shapes are the tutorial's (9,098 parameters at the defaults), so a state dict fits either
    class. It is the same function but for rounding: each layer pools before the ReLU, which then has a quarter of the
    work, and what is added up is in another order.
    """

    once = False
    """Whether each forward pass has one backward pass at most, and neither torch.func nor hooks see what is between:
    it is then the faster one on a CPU (`by_hand`). A `TrainStep` sets it as long as it trains."""

    triton = False
    """Whether the layers are those of `kernels`, on a GPU, which have no second derivative. `placed` sets it."""

    def __init__(self, in_channels: int = 1, num_classes: int = 10, widths: Sequence[int] = (8, 16)) -> None:
        super().__init__()
        first, second = widths
        self.conv1 = nn.Conv2d(in_channels, first, kernel_size=3, padding=1)
        self.conv2 = nn.Conv2d(first, second, kernel_size=3, padding=1)
        self.fc1 = nn.Linear(second * 7 * 7, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        if self.is_written_out(images) and images.dtype == torch.float32:
            return by_hand.logits(images, self.weights())
        hidden = _layer(self.conv1, images, triton=self.triton)
        hidden = _layer(self.conv2, hidden, triton=self.triton).flatten(1)
        if self.triton and images.is_cuda:
            from ddp_mnist import kernels

            if kernels.takes_linear(self.fc1, hidden):
                return kernels.linear(hidden, self.fc1.weight, self.fc1.bias)
        return F.linear(hidden, self.fc1.weight, self.fc1.bias)

    def is_written_out(self, images: Tensor) -> bool:
        """Whether `by_hand` is taken for images of this shape: nobody needs what autograd keeps, and it computes what
        `forward` says; a warning where it does not."""
        if not ((self.once or not torch.is_grad_enabled()) and by_hand.takes(self, images)):
            return False
        widths = self.conv1.out_channels, self.conv2.out_channels
        return agree(CNN.forward, self.conv1.in_channels, self.fc1.out_features, widths, images.shape[2:])

    def weights(self) -> list[Tensor]:
        """Weight and bias of each layer, as `parameters` has them."""
        layers: tuple[Any, ...] = self.conv1, self.conv2, self.fc1
        return [each for layer in layers for each in (layer.weight, layer.bias)]


@functools.cache
def agree(
    forward: Callable[[CNN, Tensor], Tensor],
    channels: int,
    classes: int,
    widths: tuple[int, int],
    size: tuple[int, int],
) -> bool:
    """Whether `by_hand` gives what that forward and autograd do; a warning where not. Asked of noise, and of weights
    that are the same everywhere: the answer is one of code, versions and kind of CPU, whatever a run has learned."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.device("cpu"),
        torch.random.fork_rng(devices=[]),
    ):
        torch.default_generator.manual_seed(0)
        try:
            # Near to what is trained first, and far from it: a limit may be reached, or not.
            return all(_agree(forward, CNN(channels, classes, widths), size, scale) for scale in (1, 30)) or _differ()
        except Exception:
            log.debug("CNN.forward cannot be compared", exc_info=True)
            return _differ()


def _agree(forward: Callable[[CNN, Tensor], Tensor], net: CNN, size: tuple[int, int], scale: float) -> bool:
    channels, classes = net.conv1.in_channels, net.fc1.out_features
    images, labels = scale * (torch.rand(4, channels, *size) - 0.03), torch.arange(4) % classes
    with torch.no_grad():
        for weight in net.weights():
            weight.mul_(math.sqrt(scale))
    logits, _ = by_hand.forward(images, [weight.detach() for weight in net.weights()], torch.float32)
    *_, gradients = by_hand.loss_and_gradients(images, labels, net.weights(), len(labels), torch.float32)
    for training in (True, False):
        net.train(training).zero_grad()
        own = forward(net, images)
        F.cross_entropy(own, labels).backward()
        if not alike([logits, *gradients], [own.detach(), *(weight.grad for weight in net.weights())]):
            return False
    return True


def alike(ours: Sequence[Tensor], theirs: Sequence[Tensor | None]) -> bool:
    """Whether two ways to compute the same came to the same, but for rounding; None: a gradient that there is not."""
    pairs = zip(ours, theirs, strict=True)
    return all(other is not None and (one - other).norm() <= 1e-2 * other.norm() for one, other in pairs)


def _differ() -> bool:
    log.warning("CNN.forward is not what ddp_mnist.by_hand computes, and is taken as it is: slower.")
    return False
