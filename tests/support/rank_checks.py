"""One rank of test_distributed.py: looks at what only a rank can see and leaves it as JSON and tensors.

python tests/support/rank_checks.py DATA_ROOT FOLDER      (once per rank, with a launcher's variables)
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ddp_mnist import trainer
from ddp_mnist.config import TrainConfig
from ddp_mnist.data import sources
from ddp_mnist.data.batches import Batches, Split
from ddp_mnist.distributed.context import Context
from ddp_mnist.distributed.launcher import hard_exit
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.evaluate import evaluate
from ddp_mnist.model import CNN
from ddp_mnist.program import Program
from ddp_mnist.step import TrainStep

BATCH = 24
GRADIENT_IMAGES = {"one left": 49, "two left": 50, "three left": 51, "five left": 53}  # images in the data set
PARTS = (1, 2, 4)
CLIP = 0.01


@dataclass(frozen=True)
class Variant:
    """A way to compute gradients, and the cases in which it is tried."""

    settings: dict[str, Any] = field(default_factory=dict)
    images: Collection[str] = tuple(GRADIENT_IMAGES)
    parts: Collection[int] = PARTS


VARIANTS = {
    "as it is": Variant(),
    # It takes a second for each size of a share.
    "compiled": Variant({"compile": True}, images=["one left", "five left"], parts=PARTS[:2]),
}
FIFTY_STEPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "four parts": {"accumulate": 4},
    "clipped": {"grad_clip": CLIP},
}


def drawing_network() -> nn.Module:
    """A network with buffers that change and with random draws."""
    return nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(784, 10))


def make_step(context: Context, model: Callable[[], nn.Module] | None = None, **settings: Any) -> TrainStep:
    settings = {"mixed_precision": context.accelerator.mixed_precision, **settings}
    config = TrainConfig(batch_size=BATCH, threads=1, **settings)
    return TrainStep(config, context, Program(model).build_network(config, context, None))


def make_batches(context: Context, images: Tensor, labels: Tensor, name: str) -> Batches:
    """The first images, as many as the case `name` has."""
    split = Split(images[: GRADIENT_IMAGES[name]], labels[: GRADIENT_IMAGES[name]])
    return Batches(split, batch_size=BATCH, rank=context.rank, world_size=context.size, seed=0)


def flat_gradients(network: nn.Module) -> Tensor:
    return torch.cat([each.grad.flatten() for each in network.parameters() if each.grad is not None])


def gradients(context: Context, images: Tensor, labels: Tensor, variant: Variant) -> dict[str, Tensor]:
    """The gradients of every step of an epoch, flat, with norm and loss; also with the batch split into parts."""
    found = {}
    for name, parts in itertools.product(variant.images, variant.parts):
        batches = make_batches(context, images, labels, name)
        step = make_step(context, accumulate=parts, **variant.settings)
        step.warm_up(batches)
        for number, batch in enumerate(batches.epoch(0)):
            loss, _ = step(batch, 0.0)  # at this rate the weights stay
            key = f"{name}/{parts}/{number}"
            found[f"{key}/loss"] = context.sum(loss.reshape(1))
            found[f"{key}/norm"] = step.gradient_norm().reshape(1)
            found[key] = flat_gradients(step.network)
        step.close()
    return found


def digest(tensors: Iterable[Tensor]) -> str:
    data = (tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)
    return hashlib.sha256(b"".join(data)).hexdigest()


def state(step: TrainStep) -> dict[str, str]:
    """Hashes of all that a warm-up might change."""
    return {
        "weights": digest(step.network.parameters()),
        "buffers": digest(step.network.buffers()),
        "optimizer": digest(value for each in step.optimizer.state.values() for value in each.values()),
        "random": digest([torch.get_rng_state()]),
    }


def warm_up(context: Context, train: Split) -> dict[str, Any]:
    """What a warm-up in the middle of a run leaves behind."""
    batches = make_batches(context, train.images, train.labels, "one left")
    step = make_step(context, drawing_network)
    step(next(batches.epoch(0)), 1e-3)
    before = state(step)
    step.warm_up(batches)
    without_gradient = all(each.grad is None or not each.grad.any() for each in step.network.parameters())
    found = {"before": before, "after": state(step), "without gradient": without_gradient}
    step.close()
    return found


def clipped(context: Context, train: Split) -> list[float]:
    """The norm of the gradient that a step with clipping used, and of the one before clipping."""
    batches = make_batches(context, train.images, train.labels, "one left")
    step = make_step(context, grad_clip=CLIP)
    step(next(batches.epoch(0)), 1e-3)
    found = [flat_gradients(step.network).norm().item(), step.gradient_norm().item()]
    step.close()
    return found


def fifty_steps(context: Context, train: Split, **settings: Any) -> Tensor:
    """The weights, flat; every third batch is small: in turn, some ranks have no image of it, or fewer."""
    one, other = (make_batches(context, train.images, train.labels, name) for name in ("one left", "five left"))
    epochs = (batches.epoch(epoch) for epoch in itertools.count() for batches in (one, other))
    step = make_step(context, **settings)
    step.warm_up(one)
    for batch in itertools.islice(itertools.chain.from_iterable(epochs), 50):
        step(batch, 1e-3)
    weights = torch.cat([value.detach().flatten() for value in step.network.parameters()])
    step.close()
    return weights


def policies(context: Context) -> dict[str, list[int]]:
    """By which policies Linux schedules gloo's threads, once they have exchanged something, and this one."""
    context.sum(torch.ones(1))
    found: dict[str, list[int]] = {"gloo": [], "own": [os.sched_getscheduler(0)]}
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has ended
            if "gloo" in (thread / "comm").read_text():
                found["gloo"].append(os.sched_getscheduler(int(thread.name)))
    return found


def failures(context: Context) -> dict[str, Any]:
    """How an action ends that fails on the last rank alone."""

    def failing(error: Exception) -> dict[str, Any]:
        def action() -> str:
            if context.rank == context.size - 1:
                raise error
            return "fine"

        try:
            return {"result": context.run_on_all_ranks(action)}
        except JobError as caught:
            return {
                "type": type(caught).__name__,
                "message": str(caught),
                "exit_code": caught.exit_code,
                "stop_reason": caught.stop_reason,
            }
        except ZeroDivisionError as caught:
            return {"type": type(caught).__name__, "message": str(caught)}

    return {
        "none": context.run_on_all_ranks(lambda: context.rank),
        "job": failing(JobError("the disk is gone", stop_reason="disk")),
        "usage": failing(UsageError("a bad value")),
        "bug": failing(ZeroDivisionError("a bug")),
    }


def trained(root: Path, folder: Path) -> list[dict[str, Any]]:
    """The weights every rank holds after whole runs, the last of which stops in the middle of an epoch."""
    found = []
    for name, changes in {"one-left": {"batch_size": 60}, "two-parts": {"batch_size": 12, "accumulate": 2}}.items():
        config = TrainConfig(dataset="fashion-mnist", data_dir=root, output_dir=folder / name, threads=1, epochs=1)
        result = trainer.fit(config.replace(max_steps=40, **changes))
        figures = {name: result.summary[name] for name in ("test_correct", "steps")}
        found.append({"weights": digest(result.model.state_dict().values()), **figures})
    return found


def calls_per_step(root: Path, folder: Path) -> dict[str, list[list[int]]]:
    """How often each step of a whole run calls Accelerator.backward and DistributedDataParallel.forward."""
    counts = [0, 0]
    steps: list[list[int]] = []

    def counted(function: Callable[..., Any], which: int) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            counts[which] += 1
            return function(*arguments, **options)

        return call

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            before = list(counts)
            result = function(*arguments, **options)
            steps.append([now - then for now, then in zip(counts, before, strict=True)])
            return result

        return call

    Accelerator.backward = counted(Accelerator.backward, 0)
    DistributedDataParallel.forward = counted(DistributedDataParallel.forward, 1)  # type: ignore[method-assign]
    TrainStep.__call__ = noted(TrainStep.__call__)  # type: ignore[method-assign]
    found = {}
    for name, model in {"ours": None, "a user's": drawing_network}.items():
        steps.clear()
        config = TrainConfig(dataset="fashion-mnist", data_dir=root, output_dir=folder / name, threads=1, batch_size=60)
        trainer.fit(config.replace(max_steps=30), model=model)
        found[name] = list(steps)
    return found


def main(root: Path, folder: Path) -> None:
    train, test = sources.load("fashion-mnist", root)
    with Context(TrainConfig(threads=2)) as context:
        rank = context.rank
        found: dict[str, Any] = {"threads": torch.get_num_threads(), "size": context.size}
        torch.set_num_threads(1)
        torch.manual_seed(0)
        score = evaluate(CNN(), test, context)
        weights = {name: fifty_steps(context, train, **settings) for name, settings in FIFTY_STEPS.items()}
        found |= {
            "score": {"confusion": score.confusion, "loss": score.loss, "mistakes": list(map(asdict, score.mistakes))},
            "sum": context.sum(torch.tensor([1.0, rank])).tolist(),
            "broadcast": context.broadcast(f"from rank {rank}"),
            "failures": failures(context),
            "policies": policies(context),
            "warm-up": warm_up(context, train),
            "clipped": clipped(context, train),
        }
        # The compiler but for its last stage, which needs a C++ compiler: what it has traced runs as it is.
        torch.compile = functools.partial(torch.compile, backend="eager")
        for name, variant in VARIANTS.items():
            save_file(gradients(context, train.images, train.labels, variant), folder / f"{name}-{rank}.safetensors")
    with Context(TrainConfig(threads=1, mixed_precision="bf16")) as context:
        weights["bf16"] = fifty_steps(context, train)
        exact = weights["plain"]
        found["bf16 from fp32"] = (weights["bf16"] - exact).norm().item() / exact.norm().item()
    found["fifty steps"] = {name: digest([each]) for name, each in weights.items()}
    found["trained"] = trained(root, folder)
    found["calls"] = calls_per_step(root, folder)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    hard_exit(0)
