"""One rank of test_preemption.py: asks at every step whether to stop, and leaves what it was told as JSON.

python tests/support/stop_checks.py FOLDER      (once per rank, with a launcher's variables)
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ddp_mnist.config import TrainConfig
from ddp_mnist.distributed import preemption
from ddp_mnist.distributed.context import Context
from ddp_mnist.distributed.preemption import StopSignal

STEPS = 800
SECONDS = (1 / 1024, 1 / 32)  # a step's, by rank 0's clock, in the first and the second half


def ask(context: Context, signals: dict[int, tuple[int, int]]) -> dict[str, Any]:
    """`signals`: rank → (step, signal) that it gets. Time passes only as this says: rank 0's clock counts the steps,
    those of the others stand still."""
    now = [0.0]
    preemption.time.monotonic = lambda: now[0]  # type: ignore[assignment]
    asked: list[int] = []
    all_reduce = dist.all_reduce
    found: dict[str, Any] = {"asked": asked, "reason": None}
    with StopSignal() as stop:
        for step in range(STEPS):

            def note(*arguments: Any, step: int = step, **options: Any) -> Any:
                asked.append(step)
                return all_reduce(*arguments, **options)

            number = signals.get(context.rank, (-1, 0))
            if number[0] == step:
                os.kill(os.getpid(), number[1])
            dist.all_reduce = note  # type: ignore[assignment]
            answer = stop.agreed(context, step)
            dist.all_reduce = all_reduce
            if answer is not None:
                found |= {"reason": answer, "step": step}
                break
            if context.is_main:
                now[0] += SECONDS[step >= STEPS // 2]
        stop.close()
    return found


def main(folder: Path) -> None:
    with Context(TrainConfig(threads=1)) as context:
        found = {
            "never": ask(context, {}),
            "rank 2": ask(context, {2: (77, signal.SIGUSR2)}),
            "at once": ask(context, {1: (0, signal.SIGTERM)}),
            "two reasons": ask(context, {0: (50, signal.SIGINT), 1: (50, signal.SIGTERM), 2: (50, signal.SIGUSR2)}),
        }
        (folder / f"rank-{context.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
