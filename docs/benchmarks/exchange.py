"""How long several ranks on CPUs wait for each other's gradients, as DDP exchanges them and as the job does
(`TrainStep._exchange`), with gloo's threads as Linux has them by default and as the job has them
(`world._patient_threads`), in turn, in one start.

    torchrun --nproc-per-node 2 docs/benchmarks/exchange.py [--batch-size 512] [--repeats 10] [--steps 50]

Prints, for each, the milliseconds of a step (the median of the repeats), and how long an exchange took from when the
last rank had its own gradients until the last had the mean: in half, three quarters, 90 and 98 % of the steps. The
images are noise: they cost what digits cost.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before torch looks: these are ranks on CPUs

import torch
import torch.distributed as dist

from ddp_mnist import TrainConfig, world
from ddp_mnist.data import Batch, Split, TrainBatches
from ddp_mnist.process import leave, world_size_from_environment
from ddp_mnist.step import TrainStep

NAMES = {os.SCHED_OTHER: "as Linux has them", os.SCHED_BATCH: "as batch jobs"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=512, help="of all ranks together")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", type=int, default=50, help="of a repeat")
    options = parser.parse_args()
    if world_size_from_environment() < 2:
        parser.error("it takes two ranks: start it by torchrun --nproc-per-node 2")
    config = TrainConfig(threads=1, batch_size=options.batch_size)
    begun: list[float] = []
    done: list[float] = []

    def timed(gradients: torch.Tensor) -> torch.Tensor:
        begun.append(time.monotonic())
        dist.all_reduce(gradients)
        done.append(time.monotonic())
        return gradients

    def hook(_: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        """What DDP does without a hook, but that it waits at the end of the backward pass: here there is one bucket."""
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(timed(bucket.buffer().div_(ranks.size)))
        return future

    with world.World(config) as ranks:
        gloo = [task for task in Path("/proc/self/task").glob("*") if "gloo" in (task / "comm").read_text()]
        split = Split(torch.rand(60_000, 1, 28, 28), torch.randint(10, (60_000,)))
        batches = TrainBatches(split, batch_size=options.batch_size, rank=ranks.rank, world_size=ranks.size, seed=0)
        ways = {"DDP": TrainStep(config, ranks), "the job": TrainStep(config, ranks)}
        # A function without annotations: DDP wants the classes themselves there.
        ways["DDP"].model.register_comm_hook(None, lambda state, bucket: hook(state, bucket))
        endless = forever(batches)

        def seconds(step: TrainStep) -> float:
            dist.barrier()
            started = time.monotonic()
            for _ in range(options.steps):
                step(next(endless), 1e-3)
            return (time.monotonic() - started) / options.steps

        for step in ways.values():
            seconds(step)
        assert [step.by_hand for step in ways.values()] == [False, True]
        ranks.sum = timed  # type: ignore[method-assign]
        rows = list(itertools.product(ways, NAMES))
        steps: dict[tuple[str, int], list[float]] = {row: [] for row in rows}
        exchanges: dict[tuple[str, int], list[float]] = {row: [] for row in rows}
        for _ in range(options.repeats):
            for row in rows:
                way, policy = row
                for thread in gloo:
                    os.sched_setscheduler(int(thread.name), policy, os.sched_param(0))
                begun.clear(), done.clear()
                steps[row].append(seconds(ways[way]))
                last = torch.tensor([begun, done], dtype=torch.float64)  # one clock: the ranks are on one machine
                dist.all_reduce(last, dist.ReduceOp.MAX)
                exchanges[row] += (last[1] - last[0]).tolist()
        for step in ways.values():
            step.close()
        if ranks.is_main:
            print(f"{ranks.size} ranks x 1 thread, {os.cpu_count()} CPUs, batch {options.batch_size}\n")
            titles = ["exchanged by", "gloo's threads", "a step, ms", "an exchange, ms: half", "75 %", "90 %", "98 %"]
            print(f"| {' | '.join(titles)} |\n" + "|---" * len(titles) + "|")
            for way, policy in rows:
                cuts = statistics.quantiles(exchanges[way, policy], n=100)
                figures = [statistics.median(steps[way, policy]), *(cuts[percent - 1] for percent in (50, 75, 90, 98))]
                print(f"| {way} | {NAMES[policy]} | {' | '.join(f'{1e3 * figure:.2f}' for figure in figures)} |")
    leave(0)


def forever(batches: TrainBatches) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from batches.epoch(epoch)
        epoch += 1


if __name__ == "__main__":
    main()
