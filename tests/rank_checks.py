"""One rank of tests/test_distributed.py: looks at what only a rank can see and leaves it as JSON and tensors.

python tests/rank_checks.py DATA_ROOT FOLDER      (once per rank, with a launcher's variables)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from ddp_mnist import data, trainer
from ddp_mnist.config import TrainConfig
from ddp_mnist.data import Split, TrainBatches
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.evaluate import evaluate
from ddp_mnist.model import CNN
from ddp_mnist.process import leave
from ddp_mnist.step import TrainStep
from ddp_mnist.world import World

BATCH = 24
GRADIENT_IMAGES = {"one left": 49, "two left": 50, "three left": 51, "five left": 53}  # images in the data set
PARTS = (1, 2, 4)
CLIP = 0.01


@dataclass(frozen=True)
class Exchange:
    """A way to come to the gradients of all ranks."""

    settings: dict[str, Any] = field(default_factory=dict)
    changes: tuple[Callable[[TrainStep], object], ...] = ()
    images: Collection[str] = tuple(GRADIENT_IMAGES)
    parts: Collection[int] = PARTS


EXCHANGES = {
    "ours": Exchange(),
    "DDP's": Exchange(changes=(lambda step: hooked_on_the_last_rank(step),)),
    # As on GPUs: nothing of the network is written out.
    "DDP's, by torch's layers": Exchange(changes=(lambda step: by_torchs_layers(step),)),
    # It takes a second for each size of a share.
    "DDP's, compiled": Exchange({"compile": True}, images=["one left", "five left"], parts=PARTS[:2]),
}
ROUTES: dict[str, tuple[dict[str, Any], list[Callable[[TrainStep], object]]]] = {
    "whole": ({}, []),
    "two parts": ({"accumulate": 2}, []),
    "four parts": ({"accumulate": 4}, []),
    "clipped": ({"grad_clip": CLIP}, []),
    "the usual order in memory": ({}, [lambda step: usual_order(step)]),
}


def gradients(world: World, images: Tensor, labels: Tensor, exchange: Exchange) -> dict[str, Tensor]:
    """The network's gradients of every step of an epoch, flat, and their norm; also with the batch split into parts."""
    found = {}
    for name in exchange.images:
        split = Split(images[: GRADIENT_IMAGES[name]], labels[: GRADIENT_IMAGES[name]])
        batches = TrainBatches(split, batch_size=BATCH, rank=world.rank, world_size=world.size, seed=0)
        for parts in exchange.parts:
            step = TrainStep(TrainConfig(batch_size=BATCH, accumulate=parts, threads=1, **exchange.settings), world)
            for change in exchange.changes:
                change(step)
            step.settle(batches)
            for number, batch in enumerate(batches.epoch(0)):
                loss, _ = step.gradients(batch)
                found[f"{name}/{parts}/{number}/loss"] = world.sum(loss.reshape(1))
                found[f"{name}/{parts}/{number}/norm"] = step.gradient_norm().reshape(1)
                flat = [value.grad.flatten() for value in step.net.parameters() if value.grad is not None]
                found[f"{name}/{parts}/{number}"] = torch.cat(flat)
            step.close()
    return found


def digest(net: torch.nn.Module) -> str:
    return hashlib.sha256(
        b"".join(value.contiguous().numpy().tobytes() for value in net.state_dict().values())
    ).hexdigest()


def settling(world: World, split: Split) -> dict[str, Any]:
    """What two uncounted passes before the first step leave behind."""
    batches = TrainBatches(split, batch_size=BATCH, rank=world.rank, world_size=world.size, seed=0)
    step = TrainStep(TrainConfig(batch_size=BATCH, threads=1), world)
    before = digest(step.net)
    step.settle(batches)
    wrapped = [type(step.model).__name__]
    step.close()
    wrapped.append(type(step.model).__name__)
    gradient = sum(value.grad.abs().sum().item() for value in step.net.parameters() if value.grad is not None)
    return {
        "before": before,
        "after": digest(step.net),
        "gradient": gradient,
        "optimizer": len(step.optimizer.state),
        "wrapped": wrapped,
    }


def clipped(world: World, split: Split) -> list[float]:
    """The norm of the gradient that a step with clipping used, and of the one before clipping."""
    few = Split(split.images[: GRADIENT_IMAGES["one left"]], split.labels[: GRADIENT_IMAGES["one left"]])
    batches = TrainBatches(few, batch_size=BATCH, rank=world.rank, world_size=world.size, seed=0)
    step = TrainStep(TrainConfig(batch_size=BATCH, threads=1, grad_clip=CLIP), world)
    step(next(batches.epoch(0)), 1e-3)
    used = torch.cat([value.grad.flatten() for value in step.net.parameters() if value.grad is not None]).norm()
    return [used.item(), step.gradient_norm().item()]


def fifty_steps(
    world: World, split: Split, *changes: Callable[[TrainStep], object], **settings: Any
) -> tuple[dict[str, bool | None], Tensor]:
    """What became of the weights; every third batch is small: in turn, some ranks have no image of it, or fewer."""
    count = GRADIENT_IMAGES["one left"], GRADIENT_IMAGES["five left"]
    splits = [Split(split.images[:images], split.labels[:images]) for images in count]
    one, other = (TrainBatches(few, batch_size=BATCH, rank=world.rank, world_size=world.size, seed=0) for few in splits)
    epochs = (batches.epoch(epoch) for epoch in itertools.count() for batches in (one, other))
    step = TrainStep(TrainConfig(batch_size=BATCH, threads=1, **settings), world)
    for change in changes:
        change(step)
    step.settle(one)
    for batch in itertools.islice(itertools.chain.from_iterable(epochs), 50):
        step(batch, 1e-3)
    weights = torch.cat([value.detach().flatten() for value in step.net.parameters()])
    alike = world.all(world.broadcast(digest(step.net)) == digest(step.net))
    step.close()
    return {"by_hand": step.by_hand, "alike": alike}, weights


def route(world: World, split: Split, *changes: Callable[[TrainStep], object], **settings: Any) -> dict[str, Any]:
    """With gradients that we exchange, and with those that DDP does, as it must on all ranks for the hook that one of
    them has."""
    ours, weights = fifty_steps(world, split, *changes, **settings)
    ddps, others = fifty_steps(world, split, *changes, hooked_on_the_last_rank, **settings)
    return {"ours": ours, "ddps": ddps, "apart": (weights - others).abs().max().item()}


def hooks(world: World, split: Split) -> dict[str, Any]:
    """Which of DDP's were called, and whether steps were taken without autograd all the same."""
    calls: list[str] = []
    of_exchange, _ = fifty_steps(world, split, lambda step: in_the_exchange(step, calls))
    of_network, _ = fifty_steps(world, split, lambda step: around_the_network(step, calls))
    return {"calls": calls, "by_hand": [of_exchange["by_hand"], of_network["by_hand"]]}


def hooked_on_the_last_rank(step: TrainStep) -> None:
    if step.world.rank == step.world.size - 1:
        step.net.conv1.weight.register_hook(lambda gradient: None)


def by_torchs_layers(step: TrainStep) -> None:
    step.net.once = False  # type: ignore[assignment]


def usual_order(step: TrainStep) -> None:
    step.net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def in_the_exchange(step: TrainStep, calls: list[str]) -> None:
    def hook(bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        calls.append("exchange")
        future: torch.futures.Future[Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    if step.world.size > 1:
        step.model.register_comm_hook(None, lambda _, bucket: hook(bucket))


def around_the_network(step: TrainStep, calls: list[str]) -> None:
    step.model.register_forward_hook(lambda *_: calls.append("forward"))


def policies(world: World) -> dict[str, list[int]]:
    """By which policies Linux schedules gloo's threads, once they have exchanged something, and this one."""
    world.sum(torch.ones(1))
    found: dict[str, list[int]] = {"gloo": [], "own": [os.sched_getscheduler(0)]}
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            if "gloo" in (thread / "comm").read_text():
                found["gloo"].append(os.sched_getscheduler(int(thread.name)))
    return found


def agreement(world: World) -> dict[str, Any]:
    """How an action ends that fails on the last rank alone."""

    def failing(error: Exception) -> dict[str, Any]:
        def action() -> str:
            if world.rank == world.size - 1:
                raise error
            return "fine"

        try:
            return {"result": world.agree(action)}
        except JobError as caught:
            return {
                "type": type(caught).__name__,
                "message": str(caught),
                "exit_code": caught.exit_code,
                "stop_reason": caught.stop_reason,
            }

    return {
        "fine": world.agree(lambda: world.rank),
        "world": failing(JobError("the disk is gone", stop_reason="disk")),
        "usage": failing(UsageError("a bad value")),
    }


def trained(root: Path, folder: Path, ports: Sequence[str]) -> list[dict[str, Any]]:
    """The weights every rank holds after whole runs, the last of which stops in the middle of an epoch."""
    found = []
    jobs = {"one-left": {"batch_size": 60}, "two-parts": {"batch_size": 12, "accumulate": 2}}
    for port, (name, changes) in zip(ports, jobs.items(), strict=True):
        os.environ["MASTER_PORT"] = port
        config = TrainConfig(dataset="fashion-mnist", data_dir=root, output_dir=folder / name, threads=1, epochs=1)
        result = trainer.fit(config.replace(max_steps=40, **changes))
        figures = {name: result.summary[name] for name in ("test_correct", "steps")}
        found.append({"weights": digest(result.model), **figures})
    return found


def main(root: Path, folder: Path, ports: Sequence[str]) -> None:
    train, test = data.load("fashion-mnist", root)
    with World(TrainConfig(threads=2)) as world:
        found: dict[str, Any] = {"threads": torch.get_num_threads(), "size": world.size}
        torch.set_num_threads(1)
        torch.manual_seed(0)
        score = evaluate(CNN(), test, world)
        found |= {
            "score": {"confusion": score.confusion, "loss": score.loss, "mistakes": list(map(asdict, score.mistakes))},
            "sum": world.sum(torch.tensor([1.0, world.rank])).tolist(),
            "broadcast": world.broadcast(f"from rank {world.rank}"),
            "agree": agreement(world),
            "policies": policies(world),
            "settle": settling(world, train),
            "clipped": clipped(world, train),
            "routes": {name: route(world, train, *these, **settings) for name, (settings, these) in ROUTES.items()},
            "hooks": hooks(world, train),
        }
        rank = world.rank
        # The compiler but for its last stage, which needs a C++ compiler: what it has traced runs as it is.
        torch.compile = functools.partial(torch.compile, backend="eager")  # type: ignore[assignment]
        for name, exchange in EXCHANGES.items():
            save_file(gradients(world, train.images, train.labels, exchange), folder / f"{name}-{rank}.safetensors")
        _, exact = fifty_steps(world, train)
    with World(TrainConfig(threads=1, mixed_precision="bf16")) as world:
        found["routes"]["bf16"] = route(world, train)
        _, rounded = fifty_steps(world, train)
        found["bf16 from fp32"] = (rounded - exact).norm().item() / exact.norm().item()
    found["trained"] = trained(root, folder, ports)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    leave(0)
