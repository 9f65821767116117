"""One rank of test_distributed.py: writes what only a rank can see as JSON and tensors.

python tests/support/rank_checks.py DATA_ROOT FOLDER      (once per rank, with a launcher's variables)
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import save_file
from torch import Tensor

from ddp_mnist import TrainConfig, fit
from ddp_mnist.data import sources
from ddp_mnist.data.batches import Batches, TensorSet
from ddp_mnist.distributed.context import Context, translate_errors
from ddp_mnist.distributed.launcher import hard_exit
from ddp_mnist.distributed.preemption import StopSignal
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.step import TrainStep
from ddp_mnist.workload import Workload

BATCH = 24
IMAGES = (49, 50, 51, 53)  # in the data set: 1, 2, 3 or 5 are left for the last batch
CLIP = 0.01
# Ways to compute gradients: settings, sizes of the data set. Compiling takes a second for each size of a share.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "whole": ({}, IMAGES),
    "two parts": ({"accumulate": 2}, IMAGES),
    "four parts": ({"accumulate": 4}, IMAGES),
    "compiled": ({"compile": True}, IMAGES[:1]),
    "clipped": ({"grad_clip": CLIP}, IMAGES[:1]),
}
# Whole runs: a rank has no image of an epoch's last batch, or the run stops in the middle of an epoch.
RUNS: dict[str, dict[str, Any]] = {
    "whole": {"batch_size": 60},
    "in parts and clipped": {"batch_size": 12, "accumulate": 2, "grad_clip": 0.5, "max_steps": 40},
    "bf16": {"batch_size": 60, "mixed_precision": "bf16", "threads": 0},
}
STEPS_PER_SECOND = 1024  # by rank 0's clock, where the ranks agree to stop


def gradients(context: Context, data: TensorSet, settings: dict[str, Any], images: int) -> dict[str, Tensor]:
    """Return the gradient of each batch of an epoch, flat, with its norm before clipping and the batch's loss."""
    split = TensorSet(data.inputs[:images], data.targets[:images])
    batches = Batches(split, batch_size=BATCH, rank=context.rank, world_size=context.world_size, seed=0)
    config = TrainConfig(batch_size=BATCH, threads=1, mixed_precision="no", **settings)
    step = TrainStep(config, context, Workload(config).build_network(context, None), classes=10)
    step.rehearse(batches)
    found = {}
    for number, batch in enumerate(batches.epoch(0)):
        loss, _ = step(batch, 0.0)  # at this rate the weights stay
        gradient = [each.grad.flatten() for each in step.network.parameters() if each.grad is not None]
        found[f"{images}/{number}"] = torch.cat(gradient)
        found[f"{images}/{number}/norm"] = step.gradient_norm().reshape(1)
        found[f"{images}/{number}/loss"] = context.sum(loss.reshape(1))
    step.close()
    return found


def failure(context: Context, error: Exception) -> dict[str, Any]:
    """Return how an action ends on this rank that fails on the last rank alone."""

    def action() -> None:
        if context.rank == context.world_size - 1:
            raise error

    try:
        context.run_on_all_ranks(action)
    except Exception as caught:
        attributes = {name: getattr(caught, name, None) for name in ("exit_code", "stop_reason")}
        return {"type": type(caught).__name__, "message": str(caught), **attributes}
    raise AssertionError("it did not fail")


def stop(context: Context, signals: dict[int, tuple[int, int]]) -> list[Any]:
    """Return why and after which of 800 steps this rank stops. `signals`: rank → (step, signal) that it gets.

    Rank 0's clock counts the steps, those of the others stand still.
    """
    clock = time.monotonic
    at, number = signals.get(context.rank, (-1, 0))
    with StopSignal() as stop:
        for step in range(800):
            now = step / STEPS_PER_SECOND if context.is_main else 0.0
            time.monotonic = lambda now=now: now  # type: ignore[misc]
            if step == at:
                os.kill(os.getpid(), number)
            reason = stop.agreed(context, step)
            if reason is not None:
                break
        time.monotonic = clock
        stop.close()
    return [reason, step]


def alone(context: Context) -> dict[str, Any]:
    """Return how things end on this rank whose last peer has ended. What comes first waits for that."""
    stop = StopSignal()
    actions: dict[str, Callable[[], Any]] = {
        "sum": lambda: context.sum(torch.ones(1)),
        "stop": lambda: [stop.agreed(context, step) for step in (0, 1)],
        "bug": lambda: torch.nn.Linear(2, 1)(torch.ones(1, 3)),
    }
    found = {}
    for name, action in actions.items():
        try:
            with translate_errors(context):
                action()
        except (JobError, RuntimeError) as error:
            found[name] = [type(error).__name__, getattr(error, "stop_reason", None)]
    return found


def whole_runs(root: Path, folder: Path) -> dict[str, Any]:
    """Return what this rank has after whole runs: a hash of its weights, its steps and threads."""
    found = {}
    for name, settings in RUNS.items():
        settings = {"threads": 1, "pictures": False, "epochs": 1, **settings}
        result = fit(TrainConfig(dataset="fashion-mnist", data_dir=root, output_dir=folder / name, **settings))
        weights = b"".join(value.numpy().tobytes() for value in result.model.state_dict().values())
        figures = {key: result.summary[key] for key in ("steps", "threads")}
        found[name] = {"weights": hashlib.sha256(weights).hexdigest(), **figures}
    return found


def main(root: Path, folder: Path) -> None:
    train, _ = sources.load_mnist("fashion-mnist", root)
    with Context(TrainConfig(threads=2, mixed_precision="no")) as context:
        rank, size = context.rank, context.world_size
        found: dict[str, Any] = {"threads": torch.get_num_threads()}
        torch.set_num_threads(1)
        tensor = torch.full((2,), float(rank))
        broadcast([tensor])
        found |= {
            "sum": context.sum(torch.tensor([1.0, rank])).tolist(),
            "broadcast": [context.broadcast(f"from rank {rank}"), *tensor.tolist()],
            "run on all": context.run_on_all_ranks(lambda: rank),
            "job error": failure(context, JobError("the disk is gone", stop_reason="disk")),
            "usage error": failure(context, UsageError("a bad value")),
            "bug": failure(context, ZeroDivisionError("a bug")),
            "stop": {
                "never": stop(context, {}),
                "one rank": stop(context, {size - 1: (77, signal.SIGUSR2)}),
                "at once": stop(context, {0: (0, signal.SIGTERM)}),
                "two reasons": stop(context, {0: (50, signal.SIGINT), size - 1: (50, signal.SIGTERM)}),
            },
        }
        # The compiler but for its last stage, which needs a C++ compiler: what it has traced runs as it is.
        torch.compile = functools.partial(torch.compile, backend="eager")
        tensors = {
            f"{name}/{key}": value
            for name, (settings, sizes) in VARIANTS.items()
            for images in sizes
            for key, value in gradients(context, train, settings, images).items()
        }
        save_file(tensors, folder / f"rank-{rank}.safetensors")

    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    os.sched_setscheduler = forbidden  # as in some containers
    found["runs"] = whole_runs(root, folder)
    with Context(TrainConfig(threads=1, mixed_precision="no")) as context:
        if rank < size - 1:  # the last one ends
            found["alone"] = alone(context)
    (folder / f"rank-{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
    hard_exit(0)
