"""Ways to write the training step that were tried, each against the one in use, in turn, in one process.

    python docs/benchmarks/variants.py [--threads 2] [--batch-size 64] [--widths 8 16] [--repeats 15] [--compile]

Prints milliseconds per step (the least and the median of the repeats) and the ratio of the least to the plain step's.
The images are noise: they cost what digits cost.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_mnist import CNN, TrainConfig
from ddp_mnist.data import Batch, Split, TrainBatches, to_float
from ddp_mnist.step import TrainStep
from ddp_mnist.world import World

Step = Callable[[Batch], Any]


class ReluFirst(CNN):
    """The tutorial's order: four times the work for the ReLU."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.max_pool2d(F.relu(self.conv1(images)), 2)
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        return self.fc1(hidden.flatten(1))


class BiasInside(CNN):
    """Each bias where it belongs, in its convolution: four times the work for it and for its gradient."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(F.max_pool2d(self.conv1(images), 2))
        return self.classify(F.relu(F.max_pool2d(self.conv2(hidden), 2)))

    def classify(self, hidden: Tensor) -> Tensor:
        weight = self.fc1.weight.unflatten(1, hidden.shape[1:]).permute(0, 2, 3, 1).flatten(1)
        return F.linear(hidden.permute(0, 2, 3, 1).flatten(1), weight, self.fc1.bias)


class ActivationsReordered(BiasInside):
    """A batch of activations is brought into the order of the linear layer's weight, not the weight into theirs."""

    def classify(self, hidden: Tensor) -> Tensor:
        return self.fc1(hidden.flatten(1))


class Maxima(torch.autograd.Function):
    """Pooling as the maximum of two rows, then of two columns. Its forward takes a third of max_pool2d's time, whose
    vectors 8 channels do not fill; its backward takes twice as long."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Any:
        pixels = images.permute(0, 2, 3, 1)
        rows = torch.maximum(pixels[:, 0::2], pixels[:, 1::2])
        ctx.save_for_backward(pixels, rows)
        return torch.maximum(rows[:, :, 0::2], rows[:, :, 1::2]).permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        pixels, rows = ctx.saved_tensors
        inner, outer = torch.empty_like(rows), torch.empty_like(pixels)
        _share(
            gradients[0].permute(0, 2, 3, 1), rows[:, :, 0::2], rows[:, :, 1::2], inner[:, :, 0::2], inner[:, :, 1::2]
        )
        _share(inner, pixels[:, 0::2], pixels[:, 1::2], outer[:, 0::2], outer[:, 1::2])
        return outer.permute(0, 3, 1, 2)


def _share(gradient: Tensor, one: Tensor, other: Tensor, to_one: Tensor, to_other: Tensor) -> None:
    torch.ge(one, other, out=to_one)  # 1 or 0
    to_one.mul_(gradient)
    torch.sub(gradient, to_one, out=to_other)


class BiasBehind(BiasInside):
    """As in the network where torch's operations are taken, but for the order of the linear layer."""

    def forward(self, images: Tensor) -> Tensor:
        pooled = self.pool(F.conv2d(images, self.conv1.weight, padding=1))
        hidden = F.relu(pooled + self.bias(self.conv1, pooled))
        pooled = F.max_pool2d(F.conv2d(hidden, self.conv2.weight, padding=1), 2)
        return self.classify(F.relu(pooled + self.bias(self.conv2, pooled)))

    def pool(self, images: Tensor) -> Tensor:
        return F.max_pool2d(images, 2)

    def bias(self, convolution: nn.Conv2d, pooled: Tensor) -> Tensor:
        return convolution.bias.to(pooled.dtype).view(-1, 1, 1)  # type: ignore[union-attr]


class PoolingByMaxima(BiasBehind):
    def pool(self, images: Tensor) -> Tensor:
        return Maxima.apply(images)


class BothByMaxima(BiasInside):
    def forward(self, images: Tensor) -> Tensor:
        hidden = F.relu(Maxima.apply(self.conv1(images)))
        return self.classify(F.relu(Maxima.apply(self.conv2(hidden))))


class Patches(CNN):
    """The first convolution as a matrix product over the 4x4 patches that the pooled cells look at: the four
    convolutions of a cell lie side by side, and pooling is their maximum."""

    def forward(self, images: Tensor) -> Tensor:
        patches = F.unfold(F.pad(images, (1, 1, 1, 1)), 4, stride=2).transpose(1, 2)
        kernel = self.conv1.weight.view(-1, 3, 3)
        four = torch.stack([F.pad(kernel, (x, 1 - x, y, 1 - y)) for y in (0, 1) for x in (0, 1)])
        cells = (patches @ four.view(-1, 16).t()).view(len(images), 14, 14, 4, -1)
        left, right = (torch.maximum(cells[..., one, :], cells[..., one + 1, :]) for one in (0, 2))
        hidden = F.relu(torch.maximum(left, right) + self.conv1.bias).permute(0, 3, 1, 2)
        hidden = F.relu(F.max_pool2d(self.conv2(hidden), 2))
        return self.fc1(hidden.flatten(1))


class TwoRows(BiasInside):
    """The first convolution for two rows at a time, as 16 channels, which fill a CPU's vectors: the four cells of a
    pooling then lie side by side in memory."""

    def forward(self, images: Tensor) -> Tensor:
        weight, bias = self.conv1.weight, self.conv1.bias
        empty = weight.new_zeros(len(weight), 1, 1, 3).to(memory_format=torch.channels_last)
        kernels = torch.cat([torch.cat([weight, empty], 2), torch.cat([empty, weight], 2)])
        rows = F.conv2d(images, kernels, torch.cat([bias, bias]), stride=(2, 1), padding=1)  # type: ignore[list-item]
        cells = rows.permute(0, 2, 3, 1).view(len(images), 14 * 14, 4, -1).permute(0, 3, 1, 2)
        hidden = F.relu(F.max_pool2d(cells, (1, 4)).view(len(images), -1, 14, 14))
        return self.classify(F.relu(F.max_pool2d(self.conv2(hidden), 2)))


def step_of(net: nn.Module, *, channels_last: bool = True, bf16: bool = False, **adam: Any) -> Step:
    """Forward, backward and Adam as in step.py, with nothing around them."""
    if channels_last:
        net.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, **({"fused": True} | adam))

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = net(to_float(batch.images))
        loss = F.cross_entropy(logits.float(), batch.labels, reduction="sum") / batch.global_size
        loss.backward()
        optimizer.step()

    return step


class OneNode(CNN):
    """As those have it who need autograd: the passes of `by_hand` as one node of autograd's graph."""

    once = True


def without_onednn(batch: Batch, step: Step) -> None:
    with torch.backends.mkldnn.flags(enabled=False):
        step(batch)


def variants(world: World, config: TrainConfig, *, compile: bool) -> Iterator[tuple[str, Step]]:
    widths = config.widths
    yield "plain: channels_last, pooling first, bias behind it, torch's fused Adam", step_of(CNN(widths=widths))
    job = TrainStep(config, world)
    yield "the job's own step, Accelerate and counts included", lambda batch: job(batch, 1e-3)
    graph = TrainStep(config, world)
    graph.needs_no_autograd = lambda images: False  # type: ignore[method-assign]
    yield "the same with autograd, the network one node of its graph", lambda batch: graph(batch, 1e-3)
    autograd = TrainStep(config, world)
    autograd.net.once = False
    yield "the same with autograd throughout", lambda batch: autograd(batch, 1e-3)
    whole = TrainStep(config, world)
    whole.adam.fused_step = whole.adam.step  # type: ignore[method-assign]
    yield "the job's own with torch's whole Adam.step", lambda batch: whole(batch, 1e-3)
    accelerated = world.accelerator.prepare(torch.optim.Adam(job.net.parameters(), lr=1e-3, fused=True))

    def wrapped(batch: Batch) -> None:
        accelerated.zero_grad()
        job.gradients(batch)
        accelerated.step()

    yield "the job's own through Accelerate's optimizer", wrapped
    yield "NCHW in place of channels_last", step_of(CNN(widths=widths), channels_last=False)
    yield "bias in the convolution", step_of(BiasInside(widths=widths))
    yield "the same, ReLU before pooling", step_of(ReluFirst(widths=widths))
    yield (
        "the same, activations reordered for the linear layer, not its weight",
        step_of(ActivationsReordered(widths=widths)),
    )
    yield "written out, as one node of autograd's graph", step_of(OneNode(widths=widths))
    yield "bf16, written out, as one node of autograd's graph", step_of(OneNode(widths=widths), bf16=True)
    yield "bf16, bias in the convolution", step_of(BiasInside(widths=widths), bf16=True)
    yield "bf16, bias behind the pooling", step_of(BiasBehind(widths=widths), bf16=True)
    yield "bf16, both poolings as maxima of rows and columns", step_of(BothByMaxima(widths=widths), bf16=True)
    yield "Adam not fused", step_of(CNN(widths=widths), fused=False)
    yield "first pooling as maxima of rows and columns", step_of(PoolingByMaxima(widths=widths))
    yield "first convolution as a product over patches", step_of(Patches(widths=widths))
    yield "bias in the convolution, the first one two rows at a time", step_of(TwoRows(widths=widths))
    native = step_of(CNN(widths=widths), channels_last=False)
    yield "without oneDNN", lambda batch: without_onednn(batch, native)
    if compile:  # takes a minute to compile
        yield (
            "torch.compile",
            step_of(torch.compile(CNN(widths=widths).to(memory_format=torch.channels_last), dynamic=False)),
        )  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs=2, default=(8, 16))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--steps", type=int, default=30, help="of one repeat")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    config = TrainConfig(batch_size=options.batch_size, threads=options.threads, widths=tuple(options.widths))
    with World(config) as world:
        count = options.batch_size * options.steps
        noise = Split(torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8), torch.randint(10, (count,)))
        batches = list(TrainBatches(noise, batch_size=options.batch_size, rank=0, world_size=1, seed=0).epoch(0))
        steps = dict(variants(world, config, compile=options.compile))
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(options.repeats + 1):  # the first is warm-up
            for name, step in steps.items():
                began = time.perf_counter()
                for batch in batches:
                    step(batch)
                if repeat:
                    times[name].append(1e3 * (time.perf_counter() - began) / len(batches))
    least = min(next(iter(times.values())))
    print("| step | least, ms | median, ms | ratio |\n|---|---|---|---|")
    for name, each in times.items():
        print(f"| {name} | {min(each):.2f} | {statistics.median(each):.2f} | {min(each) / least:.2f} |")


if __name__ == "__main__":
    main()
