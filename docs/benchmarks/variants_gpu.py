"""Ways to write the training step that were tried on a GPU, each against the one in use, in turn, in one process.

    python docs/benchmarks/variants_gpu.py [--batch-size 64] [--widths 8 16] [--mixed-precision bf16] [--repeats 5]

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
from torch import Tensor

from ddp_mnist import CNN, TrainConfig, kernels
from ddp_mnist.data import Batch, Split, TrainBatches
from ddp_mnist.step import TrainStep
from ddp_mnist.world import World

Step = Callable[[Batch], Any]


class TorchLinear(CNN):
    """Layers of Triton's, and torch's linear layer."""

    def forward(self, images: Tensor) -> Tensor:
        hidden = images
        for convolution in (self.conv1, self.conv2):
            hidden = kernels.layer(hidden, convolution.weight, convolution.bias)  # type: ignore[arg-type]
        return self.fc1(hidden.flatten(1))


class ReluFirst(CNN):
    """The tutorial's order."""

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


def without_loss(world: World, config: TrainConfig) -> Step:
    step = TrainStep(config, world)
    step.triton = False
    return lambda batch: step(batch, 1e-3)


def with_flags(step: Step, **flags: bool) -> Step:
    def taken(batch: Batch) -> Any:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=True, **flags):
            return step(batch)

    return taken


def variants(world: World, config: TrainConfig) -> Iterator[tuple[str, Step]]:
    plain = config.replace(triton=False)
    torchs = partial(job, world, plain)
    yield "the job's own step", job(world, config)
    yield "the same with --compile", job(world, config.replace(compile=True))
    yield "the same with --no-cuda-graphs", job(world, config.replace(cuda_graphs=False))
    yield "torch's linear layer", job(world, config, TorchLinear)
    yield "torch's loss and count", without_loss(world, config)
    yield "--no-triton", torchs()
    yield "--no-triton --compile", job(world, plain.replace(compile=True))
    yield "--no-triton --no-cuda-graphs", job(world, plain.replace(cuda_graphs=False))
    yield "--no-triton, channels_last", torchs(channels_last=True)
    yield "--no-triton, the tutorial's order: bias in the convolution, ReLU before pooling", torchs(ReluFirst)
    yield "--no-triton, cuDNN's deterministic kernels", with_flags(torchs(), deterministic=True, benchmark=False)
    yield (
        "--no-triton, cuDNN's fastest kernels, as it measures them",
        with_flags(torchs(), deterministic=False, benchmark=True),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs=2, default=(8, 16))
    parser.add_argument("--mixed-precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="of one repeat")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here")
    config = TrainConfig(
        batch_size=options.batch_size, widths=tuple(options.widths), mixed_precision=options.mixed_precision
    )
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
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, batch {config.batch_size}, {config.widths}")
    print("| step | least, us | median, us | ratio |\n|---|---|---|---|")
    for name, each in times.items():
        print(f"| {name} | {min(each):.0f} | {statistics.median(each):.0f} | {min(each) / least:.2f} |")


if __name__ == "__main__":
    main()
