"""What `bench` runs in processes of its own: the start of a job, and jobs of several ranks.

`python -m ddp_mnist.bench_rank {startup,ranks,bare,inside,all-reduce} ...`: rank 0 prints one line of JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig

STARTED = time.time()  # Python is up, with nothing of the package or torch in it
RANK_BATCHES = (512, 64)
WARM_UP = 5


def startup(before: float, flags: Sequence[str]) -> dict[str, float]:
    """Seconds of each stage from the launch, at time.time() `before`, to the end of the first step."""
    marks = [before, STARTED]
    from ddp_mnist.config import parse

    config = parse(flags)
    from ddp_mnist import data, trainer
    from ddp_mnist.bench_clock import synchronize
    from ddp_mnist.world import World

    marks.append(time.time())
    with World(config) as world:
        marks.append(time.time())
        train, test = data.load(config.dataset, config.data_dir)
        train, test = train.to(world.device), test.to(world.device)
        marks.append(time.time())
        batches = data.TrainBatches(
            train, batch_size=config.batch_size, rank=world.rank, world_size=world.size, seed=config.seed
        )
        step = trainer.TrainStep(config, world)
        step(next(batches.epoch(0)), config.lr)
        synchronize()
        marks.append(time.time())
    stages = ("launch", "imports", "world", "data", "first_step")
    return {name: end - begin for name, (begin, end) in zip(stages, pairwise(marks), strict=True)}


def bare_seconds(config: TrainConfig) -> float:
    """Wall seconds of the very same batches and steps, with nothing around them."""
    from ddp_mnist import data
    from ddp_mnist.bench_clock import timed
    from ddp_mnist.step import TrainStep, learning_rate
    from ddp_mnist.world import World

    with World(config) as world:
        train, _ = data.load(config.dataset, config.data_dir)
        batches = data.TrainBatches(
            train.to(world.device),
            batch_size=config.batch_size,
            rank=world.rank,
            world_size=world.size,
            seed=config.seed,
        )
        step = TrainStep(config, world)
        total = len(batches) * config.epochs

        def run() -> None:
            step.settle(batches)
            done = 0
            for epoch in range(config.epochs):
                for batch in batches.epoch(epoch):
                    step(batch, learning_rate(config, done, total))
                    done += 1

        return timed(run)


def inside_seconds(config: TrainConfig) -> dict[str, float]:
    """Wall seconds of a run without its scores, and what its batches and steps have of them, by one clock. For a CPU:
    on a GPU a step is only launched here. What slows the steps themselves is on both sides."""
    from collections.abc import Iterator

    from ddp_mnist import trainer
    from ddp_mnist.data import Batch, TrainBatches
    from ddp_mnist.step import TrainStep

    spent = 0.0

    class Timed(TrainStep):
        def __call__(self, batch: Batch, rate: float) -> Any:
            nonlocal spent
            began = time.perf_counter()
            result = super().__call__(batch, rate)
            spent += time.perf_counter() - began
            return result

    class TimedBatches(TrainBatches):
        def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
            nonlocal spent
            every = super().epoch(epoch, start)
            began = time.perf_counter()
            for batch in every:
                spent += time.perf_counter() - began
                yield batch
                began = time.perf_counter()

    trainer.TrainStep, trainer.TrainBatches = Timed, TimedBatches  # type: ignore[misc]
    with contextlib.redirect_stdout(io.StringIO()):
        summary = trainer.fit(config).summary
    return {"all": summary["wall_seconds"] - summary["eval_seconds"], "steps": spent}


def all_reduce(config: TrainConfig, repeats: int) -> dict[str, Any]:
    """Median seconds of the exchange of one step's gradients, alone."""
    import statistics

    import torch
    import torch.distributed as dist

    from ddp_mnist.bench_clock import timed
    from ddp_mnist.model import CNN
    from ddp_mnist.world import World

    with World(config) as world:
        gradient = torch.zeros(sum(weight.numel() for weight in CNN().parameters()), device=world.device)
        seconds = [timed(lambda: world.sum(gradient)) for _ in range(WARM_UP + repeats)][WARM_UP:]
        return {
            "seconds": statistics.median(seconds),
            "ranks": world.size,
            "bytes": gradient.numel() * gradient.element_size(),
            "backend": dist.get_backend(),
        }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m ddp_mnist.bench_rank", allow_abbrev=False)
    parser.add_argument("what", choices=["startup", "ranks", "bare", "inside", "all-reduce"])
    parser.add_argument(
        "number", type=float, help="startup: time of the launch; ranks: epochs; bare, inside: seed; else: how often"
    )
    options, flags = parser.parse_known_args(argv)
    flags += ["--wandb", "disabled", "--no-progress", "--no-pictures"]
    if options.what == "startup":
        print(json.dumps(startup(options.number, flags)))
        return 0
    from ddp_mnist.config import parse

    config, number = parse(flags), int(options.number)
    assert config.output_dir is not None

    def job(name: str, **changes: Any) -> TrainConfig:
        return config.replace(output_dir=Path(str(config.output_dir), name), **changes)

    found: dict[str, Any] = {}
    if options.what == "all-reduce":
        found = all_reduce(job("all-reduce"), number)
    elif options.what == "bare":
        found = {"seconds": bare_seconds(job("bare", seed=number))}
    elif options.what == "inside":
        found = inside_seconds(job("inside", seed=number, wandb="offline"))
    else:
        from ddp_mnist.trainer import fit

        for batch in RANK_BATCHES:
            with contextlib.redirect_stdout(io.StringIO()):
                summary = fit(job(f"batch-{batch}", batch_size=batch, epochs=number)).summary
            found[str(batch)] = summary["samples_seen"] / summary["train_seconds"]
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    from ddp_mnist.process import leave

    leave(main())
