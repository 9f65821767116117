"""What `bench` measures, a function a row. Each takes both sides in turn, so that a machine that slows down or warms up
does so to both, and calls this job as its users do: the very steps, batches, scores and commands, no speed copy.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ddp_mnist import reference
from ddp_mnist.bench_clock import timed
from ddp_mnist.bench_rank import RANK_BATCHES
from ddp_mnist.bench_setup import Setup, child, cpu_ranks, on_cpu, rank_variables, run_ranks, run_together
from ddp_mnist.checkpoint import Checkpoints, Snapshot, TrainState
from ddp_mnist.data import Batch, TrainBatches, to_float
from ddp_mnist.evaluate import evaluate
from ddp_mnist.reference import Tutorial
from ddp_mnist.step import TrainStep
from ddp_mnist.world import World

TO_98 = "fast"
TO_99 = "record"
RANKS = (1, 2, 4, 8, 16, 32, 64)
HELPS = 1.1  # twice the ranks are worth having where they bring 10 % more images/s
TUTORIAL = "the tutorial's loop"


@dataclass
class Line:
    """One line of the table: the same quantity on both sides."""

    what: str
    unit: str
    against: str | None = None
    """The other side; None: there is none."""
    mean: bool = False
    """Show mean ± sd over the seeds, not the median and its spread over the repeats."""
    ours: list[float] = field(default_factory=list)
    other: list[float] = field(default_factory=list)


def in_turn(repeats: int, ours: Callable[[int], None], other: Callable[[int], None]) -> None:
    """Both sides so often, each first every second time."""
    for number in range(repeats):
        for side in (ours, other) if number % 2 == 0 else (other, ours):
            side(number)


def loader(setup: Setup) -> list[Line]:
    line = Line("loader alone, one epoch, fp32 on the device", "images/s", TUTORIAL)
    theirs, _ = reference.tutorial_loaders(setup.dataset, setup.root)
    with World(setup.config()) as world:
        train = setup.train.to(world.device)
        batches = TrainBatches(train, batch_size=reference.TUTORIAL_BATCH, rank=0, world_size=1, seed=0)

        def ours(number: int) -> None:
            def read() -> None:
                for batch in batches.epoch(number):
                    _ = to_float(batch.images), batch.labels

            line.ours.append(len(train) / timed(read))

        def other(number: int) -> None:
            def read() -> None:
                for images, labels in theirs:
                    images.to(world.device), labels.to(world.device)

            line.other.append(len(train) / timed(read))

        in_turn(setup.repeats, ours, other)
    return [line]


def step(setup: Setup) -> list[Line]:
    line = Line("step alone, batch 64, same images", "ms", "the tutorial's step")
    config = setup.config()
    with World(config) as world:
        batches = few_batches(setup, world, config.batch_size)
        floats = [(to_float(batch.images), batch.labels) for batch in batches]
        train_step, tutorial = TrainStep(config, world), Tutorial()
        floats = [(images.to(tutorial.device), labels.to(tutorial.device)) for images, labels in floats]

        def take_ours() -> None:
            for batch in batches:
                train_step(batch, config.lr)

        def take_theirs() -> None:
            for images, labels in floats:
                tutorial.step(images, labels)

        take_ours()  # the first steps choose kernels and, on a GPU, capture
        take_theirs()
        in_turn(
            setup.repeats,
            lambda _: line.ours.append(1e3 * timed(take_ours) / len(batches)),
            lambda _: line.other.append(1e3 * timed(take_theirs) / len(batches)),
        )
    return [line]


def few_batches(setup: Setup, world: World, size: int) -> list[Batch]:
    """`setup.steps` whole batches of that size, in the order of an epoch; repeated where the data set is smaller. What
    a batch holds is gathered already, but for a step that is a CUDA graph, which gathers for itself."""
    batches = TrainBatches(setup.train.to(world.device), batch_size=size, rank=0, world_size=1, seed=0)
    whole = list(itertools.islice(batches.epoch(0), min(setup.steps, len(setup.train) // size)))
    for batch in whole:
        _ = batch.images, batch.labels
    return list(itertools.islice(itertools.cycle(whole), setup.steps))


def epoch(setup: Setup) -> list[Line]:
    line = Line("training, one epoch, batch 64, Adam 1e-3", "images/s", TUTORIAL)
    compiled = Line("the same with --compile", "images/s", TUTORIAL)
    lines = [line, compiled] if torch.cuda.is_available() else [line]  # on a CPU it loses: variants.py
    theirs, _ = reference.tutorial_loaders(setup.dataset, setup.root)

    def ours(number: int) -> None:
        for each in lines:
            summary = setup.job(epochs=1, seed=number, compile=each is compiled)
            each.ours.append(summary["samples_seen"] / summary["train_seconds"])

    def other(number: int) -> None:
        setup.as_the_tutorial()
        tutorial = Tutorial(number)
        line.other.append(len(setup.train) / timed(lambda: tutorial.epoch(theirs)))

    in_turn(setup.repeats, ours, other)
    compiled.other = line.other
    return lines


def to_98(setup: Setup) -> list[Line]:
    """The fast recipe's one epoch against the tutorial's five; the accuracies say whether that was enough."""
    epochs = reference.TUTORIAL_EPOCHS
    seconds = Line(f"training until 98 %: --recipe {TO_98} --epochs 1", "s", f"the tutorial's {epochs} epochs")
    accuracy = Line("its test accuracy", "%", seconds.against, mean=True)
    train, test = reference.tutorial_loaders(setup.dataset, setup.root)

    def ours(number: int) -> None:
        summary = setup.job(TO_98, epochs=1, seed=number)
        seconds.ours.append(summary["train_seconds"])
        accuracy.ours.append(100 * summary["test_accuracy"])

    def other(number: int) -> None:
        setup.as_the_tutorial()
        tutorial = Tutorial(number)
        seconds.other.append(sum(timed(lambda: tutorial.epoch(train)) for _ in range(epochs)))
        correct, count = tutorial.score(test)
        accuracy.other.append(100 * correct / count)

    in_turn(setup.repeats, ours, other)
    return [seconds, accuracy]


def to_99(setup: Setup) -> list[Line]:
    seconds = Line(f"training until a mean of 99 %: --recipe {TO_99}", "s", "the published fast recipe", mean=True)
    accuracy = Line("its test accuracy", "%", seconds.against, mean=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train = reference.published_tensors(setup.train.images, setup.train.labels, device)
    test = reference.published_tensors(setup.test.images, setup.test.labels, device)

    def ours(number: int) -> None:
        summary = setup.job(TO_99, seed=number)
        seconds.ours.append(summary["train_seconds"])
        accuracy.ours.append(100 * summary["test_accuracy"])

    def other(number: int) -> None:
        setup.as_the_tutorial()
        nets: list[reference.PublishedNet] = []
        seconds.other.append(timed(lambda: nets.append(reference.train_published(*train, number))))
        accuracy.other.append(100 * reference.published_accuracy(nets[0], *test))

    in_turn(setup.seeds, ours, other)
    return [seconds, accuracy]


def evaluation(setup: Setup) -> list[Line]:
    line = Line("scoring both sets", "s", "the tutorial's check")
    loaders = reference.tutorial_loaders(setup.dataset, setup.root)
    config = setup.config()
    with World(config) as world:
        splits = [setup.train.to(world.device), setup.test.to(world.device)]
        net, tutorial = TrainStep(config, world).net, Tutorial()
        evaluate(net, splits[1], world)  # the first call chooses kernels
        in_turn(
            setup.repeats,
            lambda _: line.ours.append(timed(lambda: [evaluate(net, split, world) for split in splits])),
            lambda _: line.other.append(timed(lambda: [tutorial.score(loader) for loader in loaders])),
        )
    return [line]


def checkpoint(setup: Setup) -> list[Line]:
    """As `Trainer.save` does it: read from the device, verify, write, flush, rename, remove the oldest."""
    seconds, size = Line("one checkpoint, published", "ms"), Line("its size", "bytes")
    config = setup.config()
    with World(config) as world, tempfile.TemporaryDirectory(dir=setup.scratch) as folder:
        train_step, state = TrainStep(config, world), TrainState()
        checkpoints = Checkpoints(Path(folder), config.keep_checkpoints)
        for batch in few_batches(setup, world, config.batch_size)[: setup.repeats]:
            train_step(batch, config.lr)
            state.advance(batch.global_size)
            written: list[Path] = []

            def save() -> None:
                weights, optimizer, scaler = train_step.snapshot()
                snapshot = Snapshot(state, config.to_dict(), weights, optimizer, scaler, metrics_bytes=0)
                written.append(checkpoints.publish(snapshot))  # noqa: B023 - called in this very turn

            seconds.ours.append(1e3 * timed(save))
            size.ours.append(sum(path.stat().st_size for path in written[0].iterdir()))
    return [seconds, size]


def start_up(setup: Setup) -> list[Line]:
    """From the command to the end of the first step, in fresh processes."""
    stages = {
        "launch": "start: Python itself",
        "imports": "start: flags and imports",
        "world": "start: ranks, device and threads",
        "data": "start: data read and verified",
        "first_step": "start: network built, first step",
    }
    lines = {name: Line(what, "s") for name, what in stages.items()}
    total = Line("start: all of it, python -m", "s", "accelerate launch -m")
    alone = ("--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "-m")
    launchers = {"python": ("-m",), "accelerate": ("-m", "accelerate.commands.launch", *alone)}

    def start(launcher: str) -> dict[str, float]:
        flags = ("--dataset", setup.dataset, "--data-dir", str(setup.root))
        return child(setup, (*launchers[launcher], "ddp_mnist.bench_rank", "startup", str(time.time()), *flags))

    def ours(_: int) -> None:
        marks = start("python")
        for name, line in lines.items():
            line.ours.append(marks[name])
        total.ours.append(sum(marks.values()))

    in_turn(setup.repeats, ours, lambda _: total.other.append(sum(start("accelerate").values())))
    return [*lines.values(), total]


def command(setup: Setup) -> list[Line]:
    script = "the tutorial's whole script"
    line = Line(f"the whole command, {reference.TUTORIAL_EPOCHS} epochs and all scores", "s", script)
    bare = Line("the same with --wandb disabled --no-pictures", "s", script)
    flags = ("--dataset", setup.dataset, "--data-dir", str(setup.root))

    def seconds(*more: str) -> float:
        with tempfile.TemporaryDirectory(dir=setup.scratch) as folder:
            words = ("-m", "ddp_mnist.train", *flags, *more, "--output-dir", folder)
            return timed(lambda: run_together(setup, [words], [{}]))

    def ours(_: int) -> None:
        line.ours.append(seconds("--wandb", "offline"))
        bare.ours.append(seconds("--wandb", "disabled", "--no-pictures"))

    def other(_: int) -> None:
        line.other.append(timed(lambda: run_together(setup, [("-m", "ddp_mnist.reference", *flags)], [{}])))

    in_turn(setup.repeats, ours, other)
    bare.other = line.other
    return [line, bare]


def ranks(setup: Setup) -> list[Line]:
    """On the CPU also where there is a GPU: two ranks on one GPU would only wait for each other. How long two on a CPU
    do varies by more than other rows, with what else the host does: many short turns, not few long ones."""
    found = {
        batch: Line(f"CPU: 2 ranks x 1 thread, batch {batch}", "images/s", "1 rank x 2 threads")
        for batch in RANK_BATCHES
    }

    def measure(world_size: int, threads: int) -> dict[str, float]:
        return on_cpu(setup, world_size, "ranks", threads, 1)

    def ours(_: int) -> None:
        for batch, speed in measure(2, 1).items():
            found[int(batch)].ours.append(speed)

    def other(_: int) -> None:
        for batch, speed in measure(1, 2).items():
            found[int(batch)].other.append(speed)

    in_turn(more_turns(setup), ours, other)
    return list(found.values())


def more_turns(setup: Setup) -> int:
    return setup.repeats if setup.repeats == 1 else 3 * setup.repeats


def overhead(setup: Setup) -> list[Line]:
    """The default command without its scores, from the first line of its log to its last file, against its very batches
    and steps alone; every run in processes of its own. A few percent need more turns than the other rows: on a CPU,
    whose times vary by more, there are some, and lines that have both sides from one run. A GPU is done with five
    epochs in so little time that two checkpoints are some percent: there, a line has ten times as many."""
    alone, inside = "its batches and steps alone", "its batches and steps, in the same run"
    epochs = f"{setup.epochs} epoch{'s' if setup.epochs > 1 else ''}"
    one = Line(f"training with checkpoints, tracking, stop agreement: {epochs}", "s", alone)
    unmirrored = Line("the same with --wandb disabled", "s", alone)
    if torch.cuda.is_available():
        long = Line("the first of them, ten times the epochs", "s", alone)
        against_steps(setup, one, unmirrored)
        against_steps(dataclasses.replace(setup, epochs=10 * setup.epochs), long)
        return [one, unmirrored, long]
    own = Line("the first of them, by its own clock", "s", inside)
    two = Line("the first of them on the CPU, 2 ranks x 1 thread", "s", alone)
    two_own = Line("that one, by rank 0's own clock", "s", inside)
    turns = dataclasses.replace(setup, repeats=more_turns(setup))
    against_steps(turns, one, unmirrored, own)
    against_steps(turns, two, own=two_own, environments=cpu_ranks(2), threads=1)
    return [one, unmirrored, own, two, two_own]


def against_steps(
    setup: Setup,
    full: Line,
    unmirrored: Line | None = None,
    own: Line | None = None,
    environments: Sequence[dict[str, str]] = ({},),
    threads: int = 0,
) -> None:
    """Whole runs, and such that time their own steps, in turn with the steps alone."""

    def ours(seed: int) -> None:
        full.ours.append(full_seconds(setup, environments, threads, seed))
        if unmirrored is not None:
            unmirrored.ours.append(full_seconds(setup, environments, threads, seed, wandb="disabled"))
        if own is not None:
            found = run_ranks(setup, environments, "inside", threads, seed)
            own.ours.append(found["all"])
            own.other.append(found["steps"])

    def other(seed: int) -> None:
        full.other.append(run_ranks(setup, environments, "bare", threads, seed)["seconds"])

    in_turn(setup.repeats, ours, other)
    if unmirrored is not None:
        unmirrored.other = full.other


def full_seconds(
    setup: Setup, environments: Sequence[dict[str, str]], threads: int, seed: int, wandb: str = "offline"
) -> float:
    """Wall seconds of a run without its scores: steps, log, metrics.jsonl, W&B, checkpoints, agreement, summary."""
    with tempfile.TemporaryDirectory(dir=setup.scratch) as folder:
        words = [
            *("-m", "ddp_mnist.train", "--dataset", setup.dataset, "--data-dir", str(setup.root), "--seed", str(seed)),
            *("--epochs", str(setup.epochs), "--threads", str(threads), "--wandb", wandb, "--no-pictures"),
            *("--output-dir", folder),
        ]
        run_together(setup, [words] * len(environments), environments)
        summary = json.loads(Path(folder, "summary.json").read_text())
        return summary["wall_seconds"] - summary["eval_seconds"]


def scaling(setup: Setup) -> dict[str, Any]:
    """Images/s at 1 ... 64 ranks, estimated from what one rank and one all-reduce take here."""
    gpus = torch.cuda.device_count()
    # A rank on a CPU is one core: what a machine of so many cores would give each of them.
    threads = 0 if gpus else 1
    alone = share_seconds(setup, set(RANK_BATCHES), threads=threads)
    shares = {batch // ranks for batch in RANK_BATCHES for ranks in RANKS if ranks > 1}
    steps = share_seconds(setup, shares, threads=threads, alone=False)
    setup.as_the_tutorial()
    world_size = gpus if gpus > 1 else 2
    if gpus > 1:
        environments = rank_variables(world_size)
        exchange = run_ranks(setup, environments, "all-reduce", 0, setup.steps)
    else:
        exchange = on_cpu(setup, world_size, "all-reduce", 1, setup.steps)
    return {
        "estimate": True,
        "how": "global batch / (one rank's step on its share + the all-reduce x log2(ranks) / log2(measured ranks)); "
        "one GPU or one CPU core for each rank, nothing overlaps, a network between machines is slower"
        + ("; among several ranks a step is launched kernel by kernel, and DDP's own work is left out" if gpus else "")
        + ("; the all-reduce is of two processes on CPUs" if gpus == 1 else ""),
        "device": "cuda" if gpus else "cpu",
        "alone_seconds": {str(size): float(f"{seconds:.4g}") for size, seconds in alone.items()},
        "step_seconds": {str(size): float(f"{seconds:.4g}") for size, seconds in steps.items()},
        "all_reduce": exchange,
        "batches": [
            estimate(batch, alone[batch], steps, exchange["seconds"] / math.log2(world_size)) for batch in RANK_BATCHES
        ],
    }


def share_seconds(setup: Setup, sizes: Collection[int], *, threads: int, alone: bool = True) -> dict[int, float]:
    """Median seconds of one rank's step, by images. Not `alone`: as several ranks have it, without CUDA graphs and, on
    CPUs, with what their exchange has to do besides waiting."""
    config = setup.config(threads=threads, cuda_graphs=alone)
    steps = {}
    with World(config) as world:
        for size in sorted(sizes):
            batches = few_batches(setup, world, size)
            train_step = TrainStep(config.replace(batch_size=size), world)
            train_step(batches[0], config.lr)

            def run(train_step: TrainStep = train_step, batches: list[Batch] = batches) -> None:
                for batch in batches:
                    train_step(batch, config.lr)
                    if train_step.by_hand and not alone:
                        train_step._exchange()

            steps[size] = statistics.median(timed(run) / len(batches) for _ in range(setup.repeats))
    return steps


def estimate(batch: int, alone: float, steps: dict[int, float], exchange: float) -> dict[str, Any]:
    """Of one global batch. `alone`: seconds of one rank on all of it; `steps`: by images of a share; `exchange`: of an
    all-reduce of 2 ranks."""
    seconds = {size: steps[batch // size] + exchange * math.log2(size) for size in RANKS if size > 1} | {1: alone}
    speeds = {size: batch / seconds[size] for size in RANKS}
    # The first number of ranks that twice as many do not outdo by much.
    enough = next((n for n in RANKS[:-1] if speeds[2 * n] < HELPS * speeds[n]), RANKS[-1])
    return {
        "batch": batch,
        "enough_ranks": enough,
        "images_per_second": {str(size): round(speed, 1) for size, speed in speeds.items()},
        "efficiency": {str(size): round(speed / size / speeds[1], 4) for size, speed in speeds.items()},
    }


ROWS: dict[str, Callable[[Setup], list[Line]]] = {
    "loader": loader,
    "step": step,
    "epoch": epoch,
    "time-to-98": to_98,
    "time-to-99": to_99,
    "evaluation": evaluation,
    "checkpoint": checkpoint,
    "start-up": start_up,
    "command": command,
    "ranks": ranks,
    "overhead": overhead,
}
