"""One side of a comparison in processes of its own: it takes a turn when it is asked to, and is idle in between.

`run.py` starts it, several ranks by torchrun, as `worker.py SIDE DATASET DIR THREADS`, or `overhead DATASET DIR RUNS`.
A line of JSON on stdin has the arguments of `take_turn`; rank 0 answers with another line.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import baselines
import torch

from ddp_mnist.config import RECIPES, TrainConfig
from ddp_mnist.data.batches import Batches
from ddp_mnist.data.sources import load_mnist
from ddp_mnist.distributed.context import Context
from ddp_mnist.evaluate import evaluate, find_classes
from ddp_mnist.step import TrainStep, rate_factor
from ddp_mnist.trainer import fit
from ddp_mnist.workload import Workload


class Ours:
    """The job's own batches and step as its trainer drives them: losses are collected and read in intervals."""

    def __init__(self, context: Context, defaults: TrainConfig, parts: dict[str, Any]) -> None:
        self.context, self.defaults, self.parts = context, defaults, parts

    def begin(self, seed: int, recipe: str = "tutorial", **settings: Any) -> None:
        """Make a new network and optimizer."""
        config = self.config = self.defaults.replace(**RECIPES[recipe] | {"recipe": recipe, "seed": seed} | settings)
        workload = Workload(config, **self.parts)
        self.batches, self.test = workload.load_data(self.context)
        self.network = workload.build_network(self.context, None)
        self.classes = find_classes(self.network, self.test)
        self.step = TrainStep(config, self.context, self.network, classes=self.classes)
        self.step.rehearse(self.batches)
        self.steps_done = self.epochs_done = 0

    def epoch(self, limit: int | None = None) -> int:
        """Train for one epoch, or its first `limit` steps. Return the number of images of all ranks. Collective."""
        total, count, results = len(self.batches) * self.config.epochs, 0, []
        for batch in islice(self.batches.epoch(self.epochs_done), limit):
            results.append(self.step(batch, rate_factor(self.config, self.steps_done, total)))
            self.steps_done += 1
            count += batch.global_size
            if self.steps_done % self.config.log_every == 0:
                both = [torch.stack(each).float() for each in zip(*results, strict=True)]
                self.context.sum(torch.stack(both)).tolist()
                results = []
        self.epochs_done += 1
        return count

    def accuracy(self) -> float:
        """Return the test accuracy, 0-1. Collective."""
        return evaluate(self.network, self.test, self.context, classes=self.classes).accuracy or 0.0


def take_turn(side: Any, seed: Any, limit: Any = None, epochs: int = 1, target: float = 0, settings: Any = None) -> Any:
    """Train, and return the seconds of that alone: making a network and scoring it are not timed.

    `seed`: of a new network, or None to go on. `limit`: steps of an epoch. `target`: the test accuracy, 0-1, whose
    first epoch is "reached", in the same seconds; 0: do not score.
    """
    if seed is not None:
        side.begin(seed, **(settings or {}))
    seconds, images, accuracy, reached = 0.0, 0, None, None
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    for _ in range(epochs):
        wait()
        started = time.perf_counter()
        images += side.epoch(limit)
        wait()
        seconds += time.perf_counter() - started
        if target and (accuracy := side.accuracy()) >= target:
            reached = reached or seconds
    return {"seed": seed, "seconds": seconds, "images": images, "accuracy": accuracy, "reached": reached}


def overhead(config: TrainConfig, runs: int) -> Iterator[float]:
    """Yield the part of each run, 0-1, that is neither steps nor scores. Collective. For CPUs: a GPU works on later."""
    spent: list[float] = []
    step, epoch = TrainStep.__call__, Batches.epoch

    def timed(action: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = action(*arguments)
        spent.append(time.perf_counter() - started)
        return result

    def timed_epoch(*arguments: Any, **named: Any) -> Iterator[Any]:
        batches = epoch(*arguments, **named)
        return iter(lambda: timed(next, batches, None), None)

    TrainStep.__call__ = lambda *arguments: timed(step, *arguments)  # type: ignore[method-assign]
    Batches.epoch = timed_epoch  # type: ignore[method-assign]
    for seed in range(runs):
        spent.clear()
        summary = fit(config.replace(seed=seed, output_dir=Path(f"overhead-{os.getppid()}-{seed}"))).summary
        yield 1 - sum(spent) / (summary["wall_seconds"] - summary["eval_seconds"])


def main(side: Any, dataset: Any, root: Path, number: int) -> None:
    """Take turns until stdin ends, or measure the overhead."""
    is_main = os.environ.get("RANK", "0") == "0"
    answer = partial(print, file=sys.stdout if is_main else sys.stderr, flush=True)
    sys.stdout = sys.stderr  # a run prints its log
    # A rank waits for the next request while the other side has its turn.
    config = TrainConfig(dataset=dataset, data_dir=root, timeout_minutes=120.0, wandb="disabled", pictures=False)
    if side == "overhead":
        for share in overhead(config, number):
            answer(json.dumps({"share": share}))
        return
    broadcast: Callable[[str], str] = str
    if side == "ours":
        config, parts = config.replace(threads=number, workers=2), {}
        context = Context(config)
        if config.has_user_data:
            parts = {"model": partial(baselines.tutorial_net, 3, 32), "data": (baselines.augmented(root),) * 2}
        side, broadcast = Ours(context, config, parts), context.broadcast
    elif side == "published":
        side = baselines.Published(*((split.inputs, split.targets) for split in load_mnist(dataset, root)))
    else:
        side = (baselines.Tutorial if side == "tutorial" else baselines.AccelerateExample)(dataset, root)
    while line := broadcast(sys.stdin.readline() if is_main else ""):
        answer(json.dumps(take_turn(side, **json.loads(line))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    os._exit(0)  # gloo's threads do not survive Python's shutdown
