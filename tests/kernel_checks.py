"""`ddp_mnist.kernels` against torch's own operations; one JSON line of relative errors, by what was compared.

Run by test_kernels.py on a CPU, with Triton's interpreter (TRITON_INTERPRET=1), and by test_gpu.py on a GPU.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ddp_mnist import kernels

Found = dict[str, float]


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a part of the largest value."""
    assert found.shape == expected.shape
    one, other = found.detach().float(), expected.detach().float()
    return float((one - other).abs().max() / other.abs().max())


def gradients(result: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 2, result.numel(), device=result.device).view_as(result)
    return list(torch.autograd.grad((result.float() * weights).sum(), inputs))


def compare(name: str, result: Tensor, expected: Tensor, inputs: Sequence[Tensor]) -> Found:
    found = {f"{name}: output": off(result, expected)}
    pairs = zip(("input", "weight", "bias"), gradients(result, inputs), gradients(expected, inputs), strict=True)
    return found | {f"{name}: gradient of the {which}": off(one, other) for which, one, other in pairs}


def layer(count: int, inputs: int, outputs: int, size: int, device: str, kind: torch.dtype) -> Found:
    images = torch.randn(count, inputs, size, size, device=device).to(kind).requires_grad_()
    weight = torch.randn(outputs, inputs, 3, 3, device=device, requires_grad=True)
    bias = torch.randn(outputs, device=device, requires_grad=True)
    convolved = F.conv2d(images.float(), weight.to(kind).float(), padding=1)
    expected = F.relu(F.max_pool2d(convolved, 2) + bias.to(kind).float().view(-1, 1, 1))
    name = f"layer {count}x{inputs}x{size}x{size} to {outputs}, {kind}"
    return compare(name, kernels.layer(images, weight, bias), expected, (images, weight, bias))


def linear(count: int, features: int, classes: int, device: str, kind: torch.dtype) -> Found:
    hidden = torch.randn(count, features, device=device).to(kind).requires_grad_()
    weight = torch.randn(classes, features, device=device, requires_grad=True)
    bias = torch.randn(classes, device=device, requires_grad=True)
    expected = F.linear(hidden.float(), weight.to(kind).float(), bias.to(kind).float())
    name = f"linear {count}x{features} to {classes}, {kind}"
    return compare(name, kernels.linear(hidden, weight, bias), expected, (hidden, weight, bias))


def loss(count: int, classes: int, size: int, device: str, kind: torch.dtype) -> Found:
    logits = (5 * torch.randn(count, classes, device=device)).to(kind).requires_grad_()
    labels = torch.arange(count, device=device) % classes
    found, correct = kernels.loss_and_count(logits, labels, size)
    expected = F.cross_entropy(logits.float(), labels, reduction="sum") / size
    assert 0 < correct.item() == (logits.argmax(1) == labels).sum().item()
    name = f"loss of {count}x{classes}, {kind}"
    one, other = (torch.autograd.grad(3 * value, logits)[0] for value in (found, expected))
    return {f"{name}: output": off(found, expected), f"{name}: gradient": off(one, other)}


def ties_and_nan(device: str) -> Found:
    """Of equal values the first gets the gradient, and NaN is passed on, as torch's pooling has it."""
    images = torch.ones(1, 1, 4, 4, device=device, requires_grad=True)
    weight = torch.zeros(1, 1, 3, 3, device=device)
    weight[0, 0, 1, 1] = 1  # each output is the pixel it stands at
    bias = torch.zeros(1, device=device)
    kernels.layer(images, weight, bias).sum().backward()
    assert images.grad is not None
    assert images.grad.flatten().tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0]
    with torch.no_grad():
        images[0, 0, 2, 2] = torch.nan  # outputs around it are NaN: of the first window the last one only
        passed_on = kernels.layer(images, weight, bias).isnan().flatten().tolist()
    return {"ties and NaN": 0.0 if passed_on == [True, True, True, True] else 1.0}


def main() -> None:
    on_gpu = sys.argv[1] == "cuda"
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    found = ties_and_nan(sys.argv[1])
    if not on_gpu:
        kernels.PROGRAMS = 4  # so that there are several images a program
    layers = [(64, 1, 8, 28), (64, 8, 16, 14), (160, 8, 48, 14)] if on_gpu else [(1, 1, 8, 16), (3, 2, 5, 6)]
    # The interpreter's bf16 is not rounded to the nearest.
    for kind in (torch.float32, torch.float16, *([torch.bfloat16] if on_gpu else [])):
        for sizes in layers:
            found |= layer(*sizes, sys.argv[1], kind)
        found |= linear(70, 784 if on_gpu else 37, 10, sys.argv[1], kind) | loss(70, 10, 80, sys.argv[1], kind)
    found |= layer(3, 3, 18, 2, sys.argv[1], torch.float32) | loss(300, 7, 300, sys.argv[1], torch.float32)
    with torch.autocast("cuda", torch.float16) if on_gpu else contextlib.nullcontext():
        out = kernels.layer(*(torch.rand(*size, device=sys.argv[1]) for size in [(1, 1, 2, 2), (1, 1, 3, 3), (1,)]))
        assert out.dtype == (torch.float16 if on_gpu else torch.float32)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
