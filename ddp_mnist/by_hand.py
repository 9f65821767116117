"""The CNN's passes over a batch on a CPU, written out: what autograd computes, but for rounding, in less time.

Much of what a small batch takes is not arithmetic but launching it, and autograd launches its own, down to the gradient
of each parameter (docs/benchmarks/README.md). `model.agree` compares these passes with `CNN.forward` on noise, and
where that was changed they are not taken; a change that noise does not show must be made here as well.

torch's pooling keeps its input, which is the largest tensor of a step, a second one of 64-bit places, and writes the
gradient into a third. Here the gradient takes the place of the input, and there are no places: the larger of two rows,
then of two columns, is found again by comparing them. Where the largest of a window are equal, which torch's pooling
settles row by row, another of them may get the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from ddp_mnist.model import CNN

aten = torch.ops.aten
SUM = 2  # torch's number for this reduction
NO_LABEL = -100  # torch's default for a label to be left out
LAYERS = ["conv1", "conv2", "fc1"]
BARE = {*vars(nn.Module()), "once", "triton", "forward", "_original_forward", "_is_accelerate_prepared"}
"""What a `CNN` has of its own: with more, it may be another function. The last three are Accelerate's."""
USUAL = (3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros"
"""A convolution's kernel, stride, padding, dilation, groups and padding mode."""


class Layer(NamedTuple):
    """A layer's forward pass, as its backward pass needs it, which writes the gradient over `convolved`."""

    images: Tensor
    weight: Tensor
    convolved: Tensor
    above: Tensor
    below: Tensor
    rows: Tensor
    left: Tensor
    right: Tensor
    pooled: Tensor


class Activations(NamedTuple):
    """A forward pass, as its one backward pass needs it."""

    first: Layer
    second: Layer
    hidden: Tensor
    weight: Tensor


def takes(net: CNN, images: Tensor) -> bool:
    """Whether the passes below have been written for such a network and such images (N, C, H, W), of any type."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if images.device.type != "cpu" or images.requires_grad or images.dim() != 4 or list(net._modules) != LAYERS:
        return False
    if net._parameters or net._buffers or not vars(net).keys() <= BARE:
        return False
    first, second, last = layers = tuple[Any, ...](net._modules.values())
    if not (type(first) is type(second) is nn.Conv2d and type(last) is nn.Linear):
        return False
    for layer in (first, second):
        shape = layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups, layer.padding_mode
        if shape != USUAL:
            return False
    _, channels, height, width = images.shape
    fitting = channels == first.in_channels and height % 4 == width % 4 == 0
    fitting = fitting and second.out_channels * height * width == 16 * last.in_features
    for layer in layers:
        if list(layer._parameters) != ["weight", "bias"] or layer.bias is None or layer.weight.dtype != torch.float32:
            return False
    return fitting


def logits(images: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """(N, classes), fp32. With gradients where they are wanted, for one backward pass at most, and not for torch.func
    nor for the images. `parameters`: weight and bias of both convolutions and of the linear layer."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else torch.float32
    if torch.is_grad_enabled():
        return _Logits.apply(dtype, images, *parameters)
    return forward(images, parameters, dtype)[0]


@torch.no_grad()
def loss_and_gradients(
    images: Tensor, labels: Tensor, parameters: Sequence[Tensor], global_size: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(sum of the cross entropies / global_size, how many are recognised, the gradient for each of the parameters).

    `labels`: int64 (N,); `dtype` is what is multiplied, what is added up and returned is fp32.
    """
    found, activations = forward(images, parameters, dtype)
    log_probabilities = torch.log_softmax(found, 1)
    loss, weight = aten.nll_loss_forward(log_probabilities, labels, None, SUM, NO_LABEL)
    correct = (found.argmax(1) == labels).sum()
    gradient = log_probabilities.new_full((), 1 / global_size)
    gradient = aten.nll_loss_backward(gradient, log_probabilities, labels, None, SUM, NO_LABEL, weight)
    gradient = aten._log_softmax_backward_data(gradient, log_probabilities, 1, torch.float32)
    return loss / global_size, correct, backward(activations, gradient)


def forward(images: Tensor, parameters: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Activations]:
    weight1, bias1, weight2, bias2, weight3, bias3 = (parameter.to(dtype) for parameter in parameters)
    first = _layer(images.to(dtype), weight1, bias1)
    second = _layer(first.pooled, weight2, bias2)
    # Both in the order that channels_last activations have in memory: to reorder the weight, and its gradient, is less
    # than to reorder a batch of activations and theirs.
    weight = weight3.unflatten(1, second.pooled.shape[1:]).permute(0, 2, 3, 1).flatten(1)
    hidden = second.pooled.permute(0, 2, 3, 1).flatten(1)
    return torch.addmm(bias3, hidden, weight.t()).float(), Activations(first, second, hidden, weight)


def backward(activations: Activations, gradient: Tensor) -> list[Tensor]:
    """Of the logits → of the parameters, fp32."""
    first, second, hidden, weight = activations
    of_bias3 = gradient.sum(0)
    gradient = gradient.to(hidden.dtype)
    channels, height, width = second.pooled.shape[1:]
    of_weight3 = (gradient.t() @ hidden).unflatten(1, (height, width, channels)).permute(0, 3, 1, 2).flatten(1)
    gradient = (gradient @ weight).unflatten(1, (height, width, channels)).permute(0, 3, 1, 2)
    gradient, of_weight2, of_bias2 = _of_layer(second, gradient, of_images=True)
    _, of_weight1, of_bias1 = _of_layer(first, gradient, of_images=False)
    return [each.float() for each in (of_weight1, of_bias1, of_weight2, of_bias2, of_weight3, of_bias3)]


def _layer(images: Tensor, weight: Tensor, bias: Tensor) -> Layer:
    """Convolution, 2x2 pooling, ReLU."""
    convolved = torch.conv2d(images, weight, bias, padding=1)
    above, below = convolved[:, :, 0::2], convolved[:, :, 1::2]
    rows = torch.maximum(above, below)
    left, right = rows[..., 0::2], rows[..., 1::2]
    pooled = torch.maximum(left, right).relu_()
    return Layer(images, weight, convolved, above, below, rows, left, right, pooled)


def _of_layer(layer: Layer, gradient: Tensor, *, of_images: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Of what was pooled → of the images, of the weight, of the bias: that is the same for all that is pooled, so its
    gradient is a sum over a quarter of the places."""
    gradient = aten.threshold_backward(gradient, layer.pooled, 0)
    of_bias = gradient.sum((0, 2, 3), dtype=torch.float32)
    _become_gradients(layer.left, layer.right, gradient)
    _become_gradients(layer.above, layer.below, layer.rows)
    ones, mask = [1, 1], [of_images, True, False]
    gradients = aten.convolution_backward(
        layer.convolved, layer.images, layer.weight, None, ones, ones, ones, False, [0, 0], 1, mask
    )
    return gradients[0], gradients[1], of_bias


def _become_gradients(one: Tensor, other: Tensor, gradient: Tensor) -> None:
    """Of their maximum's gradient all goes to the larger; to `one`, where they are equal."""
    torch.ge(one, other, out=one)  # 1 or 0
    one.mul_(gradient)
    torch.sub(gradient, one, out=other)


class _Logits(torch.autograd.Function):
    """For those who need autograd: a scaler, hooks, DDP where it exchanges the gradients."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, images: Tensor, *parameters: Tensor) -> Tensor:
        found, ctx.activations = forward(images, parameters, dtype)
        ctx.save_for_backward(images, *parameters)  # for its look whether they are as they were
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        activations, ctx.activations = ctx.activations, None
        if activations is None:
            raise RuntimeError("a second backward pass through a network that is being trained; see CNN.once")
        return None, None, *backward(activations, gradient)
