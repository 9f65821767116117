"""Ways to write the training step that were tried on a GPU, each against the one in use, in turn, in one process.

    python docs/benchmarks/variants_gpu.py [--batch-size 64] [--repeats 5]

Prints microseconds per step (the least and the median of the repeats) and the ratio of the least to the job's own. All
but one are recorded as a CUDA graph, which gathers its images; that one finds them gathered. The images are noise: they
cost what digits cost.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddp_mnist import CNN, TrainConfig
from ddp_mnist.data import Batch, Split, TrainBatches
from ddp_mnist.step import TrainStep
from ddp_mnist.world import World

Step = Callable[[Batch], Any]


def one_sum(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    """The bias's gradient is summed over pixels and pictures at once."""
    pooled = F.max_pool2d(F.conv2d(images, convolution.weight, padding=1), 2)
    return pooled.add_(convolution.bias.view(-1, 1, 1)).relu_()  # type: ignore[union-attr]


class OneProduct(CNN):
    """The linear layer as torch's own."""

    def _classify_in_parts(self, hidden: Tensor) -> Tensor:
        return self.fc1(hidden)


class OneSum(CNN):
    def forward(self, images: Tensor) -> Tensor:
        return self._classify_in_parts(one_sum(self.conv2, one_sum(self.conv1, images)).flatten(1))


class ReluFirst(CNN):
    """The tutorial's order, and torch's own linear layer."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = F.max_pool2d(F.relu(self.conv1(images)), 2)
        hidden = F.max_pool2d(F.relu(self.conv2(hidden)), 2)
        return self.fc1(hidden.flatten(1))


def job(world: World, config: TrainConfig, kind: type[CNN] = CNN, *, channels_last: bool = False) -> Step:
    """The job's own step on another way to write the network."""
    step = TrainStep(config, world)
    if kind is not CNN:
        step.net.__class__ = kind
    if channels_last:
        step.net.to(memory_format=torch.channels_last)
        step.adam.state.clear()
        step.adam.begin()  # its moments in the same layout
    return lambda batch: step(batch, 1e-3)


def with_flags(step: Step, **flags: bool) -> Step:
    def taken(batch: Batch) -> Any:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True, **flags):
            return step(batch)

    return taken


def variants(world: World, config: TrainConfig) -> Iterator[tuple[str, Step]]:
    own = partial(job, world, config)
    yield "the job's own step", own()
    yield "the same with --compile", job(world, config.replace(compile=True))
    yield "the same with --no-cuda-graphs", job(world, config.replace(cuda_graphs=False))
    yield "channels_last", own(channels_last=True)
    yield "the linear layer as one product", own(OneProduct)
    yield "the gradient of a bias in one sum", own(OneSum)
    yield "the tutorial's order: bias in the convolution, ReLU before pooling, one product", own(ReluFirst)
    yield "cuDNN's deterministic kernels", with_flags(own(), deterministic=True, benchmark=False)
    yield "cuDNN's fastest kernels, as it measures them", with_flags(own(), deterministic=False, benchmark=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of one repeat")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    config = TrainConfig(batch_size=options.batch_size)
    with World(config) as world:
        count = options.batch_size * options.steps
        noise = Split(torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8), torch.randint(10, (count,)))
        noise = noise.to(world.device)
        batches = list(TrainBatches(noise, batch_size=options.batch_size, rank=0, world_size=1, seed=0).epoch(0))
        steps = dict(variants(world, config))
        times: dict[str, list[float]] = {name: [] for name in steps}
        for repeat in range(options.repeats + 1):  # the first is warm-up
            for name, step in steps.items():
                torch.cuda.synchronize()
                began = time.perf_counter()
                for batch in batches:
                    step(batch)
                torch.cuda.synchronize()
                if repeat:
                    times[name].append(1e6 * (time.perf_counter() - began) / len(batches))
    least = min(next(iter(times.values())))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {options.batch_size}")
    print("| step | least, us | median, us | ratio |\n|---|---|---|---|")
    for name, each in times.items():
        print(f"| {name} | {min(each):.0f} | {statistics.median(each):.0f} | {min(each) / least:.2f} |")


if __name__ == "__main__":
    main()
