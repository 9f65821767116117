"""The network's layers and its loss on an NVIDIA GPU: what four dozen kernels of torch compute, in a dozen of Triton's.

At this size a step is bound by the number of its kernels, and cuDNN's gradients of the weights take long besides
(docs/benchmarks/README.md). Sums are fp32 and added up in the same order at every run. Under autocast, what is read and
written is rounded to its type, as autocast has it. The sizes of programs were chosen on an H200, for 8/16 and 8/48.

Of four values the largest is kept, and only it gets a gradient: `places` says which one it was. So the backward pass
never writes out the zeros beside it.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NOWHERE = tl.constexpr(4)
"""In `places`: the ReLU let nothing through."""
PROGRAMS = 1024
"""Of a launch that adds up over images, about: several for each multiprocessor of a large GPU."""
MOST = {"inputs": 16, "outputs": 64, "features": 4096, "classes": 16}
"""Of a layer. Beyond them cuDNN and cuBLAS are the faster ones, or may be: not measured."""
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}
"""Of every launch: multiply and add in one instruction. It is Triton's default, but 3.9 wants to be asked for it."""


@triton.jit
def _load(at, mask, kind: tl.constexpr):
    """fp32, rounded to the type that `kind` points to; 0 where masked."""
    return tl.load(at, mask=mask, other=0.0).to(kind.dtype.element_ty).to(tl.float32)


@triton.jit
def _added(sums, to: tl.constexpr, product):
    return sums[:to] + (sums[to] + product,) + sums[to + 1 :]  # noqa: RUF005 -- Triton cannot unpack


@triton.jit
def _forward(
    images, weight, bias, out, places,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """A block of one image's pooled pixels, for a block of channels."""
    image = tl.program_id(0)
    high: tl.constexpr = HEIGHT // 2
    wide: tl.constexpr = WIDTH // 2
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    top, left = 2 * (pixel // wide), 2 * (pixel % wide)
    inside, wanted = pixel < high * wide, channel < OUTPUTS
    zero = tl.zeros((PIXELS, CHANNELS), tl.float32)
    sums = (zero, zero, zero, zero)  # the four to be pooled
    for plane in range(INPUTS):
        source = images + (image * INPUTS + plane) * (HEIGHT * WIDTH)
        for row in tl.static_range(4):  # of the 4x4 pixels that these four see
            y = top + (row - 1)
            for column in tl.static_range(4):
                x = left + (column - 1)
                value = _load(source + y * WIDTH + x, inside & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH), out)
                for place in tl.static_range(4):
                    down = row - place // 2
                    right = column - place % 2
                    if down >= 0 and down < 3 and right >= 0 and right < 3:
                        tap = (channel * INPUTS + plane) * 9 + down * 3 + right
                        product = value[:, None] * _load(weight + tap, wanted, out)[None, :]
                        sums = _added(sums, place, product)
    best, place = sums[0], tl.zeros((PIXELS, CHANNELS), tl.int32)
    for other in tl.static_range(1, 4):  # the first of equal ones, and NaN before all others: as torch has it
        better = (sums[other] > best) | (sums[other] != sums[other])
        best, place = tl.where(better, sums[other], best), tl.where(better, other, place)
    best += _load(bias + channel, wanted, out)[None, :]
    dead = best <= 0
    at = (image * OUTPUTS + channel[None, :]) * (high * wide) + pixel[:, None]
    there = inside[:, None] & wanted[None, :]
    tl.store(out + at, tl.where(dead, 0.0, best), mask=there)
    tl.store(places + at, tl.where(dead, NOWHERE, place).to(tl.uint8), mask=there)


@triton.jit
def _of_images(
    gradient, places, weight, out,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of one image's channels, at the four pixels of each window of a block. Outputs in nine
    windows see these four, and each window has sent its gradient to one of its outputs."""
    image = tl.program_id(0)
    high: tl.constexpr = HEIGHT // 2
    wide: tl.constexpr = WIDTH // 2
    pixel = tl.program_id(1) * PIXELS + tl.arange(0, PIXELS)
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    y, x = pixel // wide, pixel % wide
    wanted = channel < INPUTS
    zero = tl.zeros((PIXELS, CHANNELS), tl.float32)
    sums = (zero, zero, zero, zero)
    for plane in range(OUTPUTS):
        source = (image * OUTPUTS + plane) * (high * wide) + pixel
        for below in tl.static_range(-1, 2):
            for beside in tl.static_range(-1, 2):
                there = (y + below >= 0) & (y + below < high) & (x + beside >= 0) & (x + beside < wide)
                window = source + below * wide + beside
                place = tl.load(places + window, mask=there, other=NOWHERE)
                value = _load(gradient + window, there, gradient)
                for sender in tl.static_range(4):
                    sent = tl.where(place == sender, value, 0.0)[:, None]
                    for mine in tl.static_range(4):
                        row = mine // 2 + 1 - 2 * below - sender // 2
                        column = mine % 2 + 1 - 2 * beside - sender % 2
                        if row >= 0 and row < 3 and column >= 0 and column < 3:
                            tap = (plane * INPUTS + channel) * 9 + row * 3 + column
                            product = sent * _load(weight + tap, wanted, gradient)[None, :]
                            sums = _added(sums, mine, product)
    at = (image * INPUTS + channel[None, :]) * (HEIGHT * WIDTH) + (2 * y * WIDTH + 2 * x)[:, None]
    for mine in tl.static_range(4):
        there = (pixel < high * wide)[:, None] & wanted[None, :]
        tl.store(out + at + mine // 2 * WIDTH + mine % 2, sums[mine], mask=there)


@triton.jit
def _of_weights(
    images, gradient, places, out, count, EACH: tl.constexpr,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    PIXELS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What EACH of the `count` images add to the gradient of one input's weights, for a block of outputs, and to that
    of the bias: a row of `out`, which has all weights and then all biases."""
    plane = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    pooled: tl.constexpr = (HEIGHT // 2) * (WIDTH // 2)
    zero = tl.zeros((PIXELS, CHANNELS), tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero, zero, zero)
    alone = zero
    for turn in range(EACH):
        image = tl.program_id(2) * EACH + turn
        source = images + (image * INPUTS + plane) * (HEIGHT * WIDTH)
        for start in range(0, pooled, PIXELS):
            pixel = start + tl.arange(0, PIXELS)
            inside = pixel < tl.where(image < count, pooled, 0)
            there = inside[:, None] & (channel < OUTPUTS)[None, :]
            at = (image * OUTPUTS + channel[None, :]) * pooled + pixel[:, None]
            place = tl.load(places + at, mask=there, other=NOWHERE)
            value = _load(gradient + at, there, gradient)
            alone += tl.where(place == NOWHERE, 0.0, value)
            top, left = 2 * (pixel // (WIDTH // 2)), 2 * (pixel % (WIDTH // 2))
            for row in tl.static_range(4):
                y = top + (row - 1)
                for column in tl.static_range(4):
                    x = left + (column - 1)
                    seen = inside & (y >= 0) & (y < HEIGHT) & (x >= 0) & (x < WIDTH)
                    shown = _load(source + y * WIDTH + x, seen, gradient)[:, None]
                    for tap in tl.static_range(9):
                        down = row - tap // 3
                        right = column - tap % 3
                        if down >= 0 and down < 2 and right >= 0 and right < 2:  # one of the four
                            product = tl.where(place == down * 2 + right, value, 0.0) * shown
                            sums = _added(sums, tap, product)
    out += tl.program_id(2) * (OUTPUTS * (INPUTS * 9 + 1))
    for tap in tl.static_range(9):
        tl.store(out + (channel * INPUTS + plane) * 9 + tap, tl.sum(sums[tap], 0), mask=channel < OUTPUTS)
    if plane == 0:
        tl.store(out + OUTPUTS * INPUTS * 9 + channel, tl.sum(alone, 0), mask=channel < OUTPUTS)


@triton.jit
def _add_up(parts, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """parts (ROWS, COLUMNS) → out (COLUMNS,)"""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((TILE, BLOCK), tl.float32)
    for start in range(0, ROWS, TILE):
        row = start + tl.arange(0, TILE)[:, None]
        total += tl.load(parts + row * COLUMNS + column, mask=(row < ROWS) & (column < COLUMNS), other=0.0)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + column, tl.sum(total, 0), mask=column < COLUMNS)


@triton.jit
def _classify(hidden, weight, bias, out, FEATURES: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """The linear layer for one image and one class."""
    image, kind = tl.program_id(0), tl.program_id(1)
    feature = tl.arange(0, BLOCK)
    value = _load(hidden + image * FEATURES + feature, feature < FEATURES, out)
    factor = _load(weight + kind * FEATURES + feature, feature < FEATURES, out)
    tl.store(out + image * CLASSES + kind, tl.sum(value * factor, 0) + _load(bias + kind, True, out))


@triton.jit
def _of_hidden(gradient, weight, out, FEATURES: tl.constexpr, CLASSES: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of one image's features."""
    image = tl.program_id(0)
    feature = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for kind in tl.static_range(CLASSES):
        sent = tl.load(gradient + image * CLASSES + kind).to(tl.float32)
        total += sent * _load(weight + kind * FEATURES + feature, feature < FEATURES, gradient)
    tl.store(out + image * FEATURES + feature, total, mask=feature < FEATURES)


@triton.jit
def _of_classes(
    hidden, gradient, out, COUNT: tl.constexpr,
    FEATURES: tl.constexpr, CLASSES: tl.constexpr, IMAGES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradient of a block of one class's weights, and its bias, in `out` as `_of_weights` has them."""
    kind = tl.program_id(0)
    feature = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((IMAGES, BLOCK), tl.float32)
    alone = tl.zeros((IMAGES,), tl.float32)
    for start in range(0, COUNT, IMAGES):
        image = start + tl.arange(0, IMAGES)
        sent = _load(gradient + image * CLASSES + kind, image < COUNT, gradient)
        there = (image < COUNT)[:, None] & (feature < FEATURES)[None, :]
        total += sent[:, None] * _load(hidden + image[:, None] * FEATURES + feature[None, :], there, gradient)
        alone += sent
    tl.store(out + kind * FEATURES + feature, tl.sum(total, 0), mask=feature < FEATURES)
    if tl.program_id(1) == 0:
        tl.store(out + CLASSES * FEATURES + kind, tl.sum(alone, 0))


@triton.jit
def _loss(
    logits, labels, figures, gradient, size,
    COUNT: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """One program for all: (loss, recognised) in `figures`, and the loss's gradient."""
    column = tl.arange(0, COLUMNS)[None, :]
    losses, correct = tl.zeros((ROWS,), tl.float32), tl.zeros((ROWS,), tl.float32)
    for start in range(0, COUNT, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None] * CLASSES + column
        there = (row < COUNT)[:, None] & (column < CLASSES)
        value = tl.load(logits + at, mask=there, other=float("-inf")).to(tl.float32)
        value = tl.where((row < COUNT)[:, None], value, 0.0)
        label = tl.load(labels + row, mask=row < COUNT, other=0)
        hit = column == label[:, None]
        largest = tl.max(value, 1)
        powers = tl.exp(value - largest[:, None])
        total = tl.sum(powers, 1)
        losses += tl.where(row < COUNT, tl.log(total) + largest - tl.sum(tl.where(hit, value, 0.0), 1), 0.0)
        first = tl.min(tl.where(value == largest[:, None], column, COLUMNS), 1)
        correct += tl.where((row < COUNT) & (first == label), 1.0, 0.0)
        tl.store(gradient + at, (powers / total[:, None] - tl.where(hit, 1.0, 0.0)) / size, mask=there)
    tl.store(figures, tl.sum(losses, 0) / size)
    tl.store(figures + 1, tl.sum(correct, 0))


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        images, weight = images.contiguous(), weight.contiguous()
        count, inputs, height, width = images.shape
        out = torch.empty(count, len(weight), height // 2, width // 2, device=images.device, dtype=_kind(images))
        places = torch.empty_like(out, dtype=torch.uint8)
        pixels, channels, warps = (32, 8, 1) if len(weight) > 16 else (16, 4, 1) if inputs > 1 else (32, 4, 2)
        grid = count, triton.cdiv(height * width // 4, pixels), triton.cdiv(len(weight), channels)
        tile = {"PIXELS": pixels, "CHANNELS": channels, "num_warps": warps}
        with torch.cuda.device_of(images):
            _forward[grid](images, weight, bias, out, places, **_sizes(images, weight), **tile, **OPTIONS)
        ctx.save_for_backward(images, weight, places)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        images, weight, places = ctx.saved_tensors
        gradient = gradient.contiguous()
        sizes = _sizes(images, weight)
        count, inputs, height, width = images.shape
        pixels, channels, warps = (64, 4, 1) if inputs > 1 else (32, 2, 1)
        blocks = triton.cdiv(len(weight), channels)
        each = triton.cdiv(count * inputs * blocks, PROGRAMS)
        groups = triton.cdiv(count, each)
        parts = torch.empty(groups, weight.numel() + len(weight), device=images.device)
        tile = {"PIXELS": pixels, "CHANNELS": channels, "num_warps": warps}
        of_images = None
        with torch.cuda.device_of(images):
            _of_weights[inputs, blocks, groups](
                images, gradient, places, parts, count, EACH=each, **sizes, **tile, **OPTIONS
            )
            if ctx.needs_input_grad[0]:
                of_images = torch.empty_like(images)
                pixels, channels, warps = 16, 4, 1
                grid = count, triton.cdiv(height * width // 4, pixels), triton.cdiv(inputs, channels)
                tile = {"PIXELS": pixels, "CHANNELS": channels, "num_warps": warps}
                _of_images[grid](gradient, places, weight, of_images, **sizes, **tile, **OPTIONS)
            return of_images, *_added_up(parts, weight)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        hidden, weight = hidden.contiguous(), weight.contiguous()
        out = torch.empty(len(hidden), len(weight), device=hidden.device, dtype=_kind(hidden))
        sizes = {"FEATURES": hidden.shape[1], "CLASSES": len(weight)}
        block = triton.next_power_of_2(hidden.shape[1])
        with torch.cuda.device_of(hidden):
            _classify[len(hidden), len(weight)](hidden, weight, bias, out, **sizes, BLOCK=block, **OPTIONS)
        ctx.save_for_backward(hidden, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        gradient = gradient.contiguous()
        count, features = hidden.shape
        sizes = {"FEATURES": features, "CLASSES": len(weight)}
        total = torch.empty(weight.numel() + len(weight), device=hidden.device)
        of_hidden = None
        with torch.cuda.device_of(hidden):
            grid = len(weight), triton.cdiv(features, 32)
            _of_classes[grid](hidden, gradient, total, COUNT=count, **sizes, IMAGES=64, BLOCK=32, **OPTIONS)
            if ctx.needs_input_grad[0]:
                of_hidden = torch.empty_like(hidden)
                block = triton.next_power_of_2(features)
                _of_hidden[count,](gradient, weight, of_hidden, **sizes, BLOCK=block, num_warps=8, **OPTIONS)
        return of_hidden, *_apart(total, weight)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)  # no zeros for the count
        logits = logits.contiguous()
        gradient = torch.empty_like(logits, dtype=torch.float32)  # fp16 has it after it is scaled
        figures = torch.empty(2, device=logits.device)
        count, classes = logits.shape
        rows = min(max(16, triton.next_power_of_2(count)), 256)
        tile = {"ROWS": rows, "COLUMNS": triton.next_power_of_2(classes), "num_warps": min(16, rows // 8)}
        with torch.cuda.device_of(logits):
            _loss[1,](logits, labels, figures, gradient, float(size), COUNT=count, CLASSES=classes, **tile, **OPTIONS)
        ctx.save_for_backward(gradient)
        ctx.kind = logits.dtype
        loss, correct = figures
        ctx.mark_non_differentiable(correct)
        return loss, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (own,) = ctx.saved_tensors
        return (own * gradient).to(ctx.kind), None, None


def _kind(images: Tensor) -> torch.dtype:
    """What autocast would have a convolution write."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else images.dtype


def _sizes(images: Tensor, weight: Tensor) -> dict[str, int]:
    return {"INPUTS": images.shape[1], "OUTPUTS": len(weight), "HEIGHT": images.shape[2], "WIDTH": images.shape[3]}


def _added_up(parts: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = parts.shape
    total = torch.empty(columns, device=parts.device)
    _add_up[triton.cdiv(columns, 16),](parts, total, ROWS=rows, COLUMNS=columns, BLOCK=16, TILE=64, **OPTIONS)
    return _apart(total, weight)


def _apart(total: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return total[: weight.numel()].view_as(weight), total[weight.numel() :]


def try_out(device: torch.device) -> None:
    """Build one kernel and run it. Raises: whatever Triton, the C compiler or CUDA raises."""
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise RuntimeError("the GPU is too old for bf16")
    with torch.cuda.device(device):
        _added_up(torch.ones(2, 3, device=device), torch.ones(1, 2, device=device))


def takes_layer(convolution: nn.Conv2d, images: Tensor) -> bool:
    """Whether `layer` has been written for these."""
    shape = convolution.kernel_size, convolution.stride, convolution.padding, convolution.dilation, convolution.groups
    plain = shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and convolution.padding_mode == "zeros"
    few = convolution.in_channels <= MOST["inputs"] and convolution.out_channels <= MOST["outputs"]
    even = images.dim() == 4 and images.shape[2] % 2 == images.shape[3] % 2 == 0
    biased = convolution.bias is not None and convolution.weight.dtype == torch.float32
    fitting = images.dim() == 4 and images.shape[1] == convolution.in_channels  # torch says what is wrong with others
    return plain and few and even and biased and fitting and _floats(images)


def takes_linear(linear: nn.Linear, hidden: Tensor) -> bool:
    few = linear.out_features <= MOST["classes"] and linear.in_features <= MOST["features"]
    biased = linear.bias is not None and linear.weight.dtype == torch.float32
    fitting = hidden.dim() > 1 and hidden.shape[1:].numel() == linear.in_features
    return few and biased and fitting and _floats(hidden)


def takes_loss(logits: Tensor, labels: Tensor) -> bool:
    fitting = logits.dim() == 2 and labels.shape == logits.shape[:1] and labels.dtype == torch.int64
    return fitting and labels.is_contiguous() and logits.shape[1] <= MOST["classes"] and _floats(logits)


def _floats(tensor: Tensor) -> bool:
    """Some, on a GPU, and not so many that 32 bits do not count them."""
    kinds = torch.float32, torch.bfloat16, torch.float16
    return tensor.is_cuda and tensor.dtype in kinds and 0 < tensor.numel() < 2**26


def layer(images: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """relu(max_pool2d(conv2d(images, weight, padding=1), 2) + bias), in fp32.

    images (n, inputs, h, w), h and w even, n > 0; weight (outputs, inputs, 3, 3); bias (outputs,) →
    (n, outputs, h / 2, w / 2). Without a second derivative.
    """
    return _Layer.apply(images, weight, bias)


def linear(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """hidden (n, features), n > 0; weight (classes, features); bias (classes,) → (n, classes). Without a
    second derivative."""
    return _Linear.apply(hidden, weight, bias)


def loss_and_count(logits: Tensor, labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(sum of the cross entropies / size, how many are recognised), both fp32 scalars; n > 0; the first has a
    gradient. logits (n, classes), labels int64 (n,)."""
    return _Loss.apply(logits, labels, size)


@functools.cache
def hide_from_compiler() -> None:
    """Keep torch.compile from looking into them. Not at import: that would import torch's compiler, a second."""
    global layer, linear, loss_and_count
    layer, linear, loss_and_count = (torch.compiler.disable(each) for each in (layer, linear, loss_and_count))
