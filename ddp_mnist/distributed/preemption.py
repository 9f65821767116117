"""Signals, a time limit or a dead launcher → one flag → agreed by all ranks. The training touches `signal` here only.

A handler only sets the flag: a save or a collective inside one could meet the model half-way through a step. The
ranks add up their flags at step boundaries, about every 100 ms; one rank having seen a signal is enough.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddp_mnist.distributed.context import Context

REASONS = ("SIGTERM", "SIGINT", "SIGUSR2", "max_minutes", "launcher_died")
INTERVAL_SECONDS = 0.1
MAX_INTERVAL = 1000
"""Steps between two agreements, at most."""


class StopSignal:
    """Install it before torch is imported: a signal during start-up then waits for the first step boundary."""

    def __init__(self) -> None:
        self._reason: str | None = None
        self._interrupted = False
        self._deadline = float("inf")
        self._parent = os.getppid()
        # Without a launcher (a shell, nohup, a notebook) a parent may well leave first.
        self._launched = any(name in os.environ for name in ("WORLD_SIZE", "ACCELERATE_MIXED_PRECISION"))
        self._alone = os.environ.get("WORLD_SIZE", "1") == "1"
        self._previous: dict[int, Any] = {}
        self._interval = 1
        self._next_step = 0
        self._asked: tuple[float, int] | None = None
        self._pending: Any = None

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def limit(self, minutes: float) -> None:
        """Stop after so many minutes from now; 0: never."""
        if minutes:
            self._deadline = time.monotonic() + 60 * minutes

    def ignore_from_now_on(self) -> None:
        """The run is being left: nothing may cut the exit short, not even while the interpreter winds down."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def agreed(self, context: Context, step: int) -> str | None:
        """Why to stop, the same answer on every rank at the same `step`; None to go on. Every rank calls it."""
        if context.size == 1:
            return self._local_reason()
        if step < self._next_step:
            return None
        answer = self._collect()
        if answer is None:
            self._ask(context, step)
        return answer

    def close(self) -> None:
        """Wait for a question that is still under way, so that the process group can be closed."""
        if self._pending is not None:
            work, self._pending = self._pending[0], None
            work.wait()

    def _collect(self) -> str | None:
        """The answer to the last question, asked one interval ago: nobody had to wait for it."""
        if self._pending is None:
            return None
        (work, votes), self._pending = self._pending, None
        work.wait()
        *flags, interval = votes.tolist()
        self._interval = max(1, interval)
        return next((reason for reason, flag in zip(REASONS, flags, strict=True) if flag), None)

    def _ask(self, context: Context, step: int) -> None:
        import torch
        import torch.distributed as dist

        now = time.monotonic()
        steps = 1  # until rank 0 knows how long a step takes
        if self._asked is not None:
            then, since = self._asked
            seconds = max(now - then, 1e-6) / (step - since)
            steps = min(int(INTERVAL_SECONDS / seconds), 2 * self._interval, MAX_INTERVAL)
        self._asked = (now, step)
        reason = self._local_reason()
        votes = [int(reason == name) for name in REASONS] + [max(1, steps) if context.is_main else 0]
        tensor = torch.tensor(votes, dtype=torch.int32).to(context.device, non_blocking=True)
        self._pending = (dist.all_reduce(tensor, async_op=True), tensor)
        self._next_step = step + self._interval

    def _local_reason(self) -> str | None:
        if self._reason is None and time.monotonic() >= self._deadline:
            self._reason = "max_minutes"
        if self._reason is None and self._launched and os.getppid() != self._parent:
            self._reason = "launcher_died"
        return self._reason

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self._reason is None:
            self._reason = signal.Signals(number).name
        if number == signal.SIGINT and self._alone:
            if self._interrupted:
                os._exit(130)
            self._interrupted = True
            # Ctrl-C also ends the `tee` that stderr may lead to: what is raised here would end the run unsaved.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping at the next step; Ctrl-C again leaves at once, without saving\n")
