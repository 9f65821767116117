"""2x2 pooling, bias and ReLU on a CPU: what torch's three operations compute, in less time and memory.

torch's pooling keeps its input, which is the largest tensor of a step, a second one of 64-bit places, and writes the
gradient into a third. Here the gradient takes the place of the input, and there are no places: the larger of two rows,
then of two columns, is found again by comparing them (docs/benchmarks/README.md).

Where the largest of a window are equal, which torch's pooling settles row by row, another of them may get the gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def relu_of_maxima(images: Tensor, bias: Tensor | None, *, once: bool) -> Tensor:
    """relu(max_pool2d(images, 2) + bias): (n, c, h, w) → (n, c, h // 2, w // 2). `bias`: (c,).

    `once`: the backward pass may overwrite the images. The graph can then be used no more than once, and not by
    torch.func. Otherwise, where gradients are wanted, it is torch's own pooling.
    """
    suits = images.device.type == "cpu" and images.shape[-2] % 2 == images.shape[-1] % 2 == 0
    suits = suits and not (torch.compiler.is_compiling() or torch.jit.is_tracing())
    if suits and not images.requires_grad:
        return _forward(images, bias)[0]
    if suits and once:
        return _ReluOfMaxima.apply(images, bias)
    pooled = F.max_pool2d(images, 2)
    return (pooled if bias is None else pooled.add_(bias.to(pooled.dtype).view(-1, 1, 1))).relu_()


def _forward(images: Tensor, bias: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(n, c, h / 2, w / 2), and what was compared for it: the images, their every other row, the larger of these
    (n, c, h / 2, w), and its every other column."""
    above, below = images[:, :, 0::2], images[:, :, 1::2]
    rows = torch.maximum(above, below)
    left, right = rows[..., 0::2], rows[..., 1::2]
    pooled = torch.maximum(left, right)
    if bias is not None:
        pooled.add_(bias.view(-1, 1, 1))
    return pooled.relu_(), (images, above, below, rows, left, right)


class _ReluOfMaxima(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, bias: Tensor | None) -> Tensor:
        pooled, ctx.compared = _forward(images, bias)  # views cost as much as small operations: made once
        ctx.save_for_backward(images, pooled)  # the images for its look whether they are as they were
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None]:
        _, pooled = ctx.saved_tensors
        images, above, below, rows, left, right = ctx.compared
        del ctx.compared
        gradient = torch.ops.aten.threshold_backward(gradient, pooled, 0)
        of_bias = gradient.sum((0, 2, 3)) if ctx.needs_input_grad[1] else None
        _become_gradients(left, right, gradient)
        _become_gradients(above, below, rows)
        return images.detach(), of_bias


def _become_gradients(one: Tensor, other: Tensor, gradient: Tensor) -> None:
    """Of their maximum's gradient all goes to the larger; to `one`, where they are equal."""
    torch.ge(one, other, out=one)  # 1 or 0
    one.mul_(gradient)
    torch.sub(gradient, one, out=other)
