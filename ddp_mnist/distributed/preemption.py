"""Turn signals, a time limit or a dead launcher into one flag, and let all ranks agree on it at a step boundary.

A handler only sets the flag: a save or a collective inside a handler could meet a half-done step. The ranks
exchange their flags about every 100 ms, and one rank with a reason to stop is enough.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from types import FrameType
from typing import TYPE_CHECKING, Any, Self

import psutil

from ddp_mnist.distributed import launcher
from ddp_mnist.errors import STOPPED

if TYPE_CHECKING:
    from ddp_mnist.distributed.context import Context

log = logging.getLogger(__name__)

# In this order: a lost terminal; SGE and LSF (USR1, XCPU); SLURM and submitit (USR2); Ctrl-C; scancel and most others.
SIGNALS = ("SIGHUP", "SIGUSR1", "SIGXCPU", "SIGUSR2", "SIGINT", "SIGTERM")
REASONS = (None, "launcher_died", "max_minutes", *SIGNALS)  # to stop; if ranks differ, the later in this list counts
INTERVAL_SECONDS = 0.1
LAUNCHER_MARKS = {"TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "DDP_MNIST_LAUNCHER"}
"""Variables that launchers set. A user who sets RANK by hand does not set them."""


class StopSignal:
    """Catch signals in a `with` block. Enter it before torch is imported, so that no signal during start-up is lost."""

    def __init__(self, *, ignore_afterwards: bool = False) -> None:
        """`ignore_afterwards`: ignore signals after the block, so that they cannot cut the process's exit short."""
        self._after = signal.SIG_IGN if ignore_afterwards else None
        self._previous: dict[int, Any] = {}
        self._reason: str | None = None
        self._interrupted = self._waiting = False
        self._deadline = float("inf")
        self._alone = launcher.from_environment("WORLD_SIZE") == 1
        # Without a launcher (a shell, nohup, a notebook) the parent may exit before the run.
        self._parent = None if LAUNCHER_MARKS.isdisjoint(os.environ) else os.getppid()
        self._interval_steps = 1
        self._last_question = time.monotonic(), -1
        self._pending: Any = None

    def __enter__(self) -> Self:
        if threading.current_thread() is not threading.main_thread():
            log.warning("started in a thread, where signals cannot be caught: one ends the run without a checkpoint.")
            return self
        for name in SIGNALS:
            number = signal.Signals[name]
            if name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, self._after or handler)

    def limit(self, minutes: float) -> None:
        """Stop `minutes` from now; if torchrun has restarted the ranks, count from torchrun's start. 0: never."""
        if minutes:
            self._deadline = time.monotonic() + 60 * minutes
            if launcher.from_environment("TORCHELASTIC_RESTART_COUNT"):
                self._deadline -= time.time() - psutil.Process(os.getppid()).create_time()

    def wait_for_peers(self, meet: Callable[[], None]) -> None:
        """Run `meet`, which waits in C++ for the other ranks. With a reason to stop, exit with 75 if they stay away."""
        pool = ThreadPoolExecutor(1)  # Python runs no signal handler while its main thread is in C++
        met = pool.submit(meet)
        pool.shutdown(wait=False)
        self._waiting = True
        # Seconds. If the signal came before this wait, the others got it too, and may still come: then all can save.
        patience = 20 if self._local_reason() else 1
        while not met.done():
            reason = self._local_reason()
            wait([met], patience if reason else 0.1)
            if reason and not met.done():
                rank = launcher.from_environment("RANK")
                with contextlib.suppress(OSError):
                    print(f"stopped by {reason} while rank {rank} waited for the others", file=sys.stderr)
                launcher.hard_exit(STOPPED)
        self._waiting = False
        met.result()

    def agreed(self, context: "Context", step: int) -> str | None:
        """Return why to stop, or None to go on; the same on all ranks. Collective: call it at every step.

        On several ranks the answer is one interval old, about 100 ms.
        """
        if context.world_size == 1:
            return self._local_reason()
        if step < self._last_question[1] + self._interval_steps:
            return None
        reason = self._answer()
        if reason is None:
            self._ask(context, step)
        return reason

    def close(self) -> None:
        """Wait for a question that is under way, so that the process group can be closed."""
        self._answer()

    def _answer(self) -> str | None:
        """Return the answer to the question of one interval ago, which has mostly arrived by now."""
        if self._pending is None:
            return None
        (work, tensor), self._pending = self._pending, None
        work.wait()
        index, self._interval_steps = tensor.tolist()
        return REASONS[index]

    def _ask(self, context: "Context", step: int) -> None:
        """Start to exchange the reasons, and rank 0's number of steps until the next question."""
        import torch

        now, (then, last_step) = time.monotonic(), self._last_question
        steps_per_second = (step - last_step) / max(now - then, 1e-6)
        # An interval is at most twice the last one: the first steps of a run are slow.
        interval = min(int(INTERVAL_SECONDS * steps_per_second), 2 * self._interval_steps)
        self._last_question = now, step
        question = [REASONS.index(self._local_reason()), max(1, interval) if context.is_main else 0]
        tensor = torch.tensor(question, dtype=torch.int32).to(context.device, non_blocking=True)
        self._pending = torch.distributed.all_reduce(tensor, torch.distributed.ReduceOp.MAX, async_op=True), tensor

    def _local_reason(self) -> str | None:
        if self._reason is None and time.monotonic() >= self._deadline:
            self._reason = "max_minutes"
        if self._reason is None and self._parent is not None and os.getppid() != self._parent:
            self._reason = "launcher_died"
        return self._reason

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        self._reason = self._reason or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        if self._interrupted and (self._alone or self._waiting):
            os._exit(130)
        self._interrupted = True
        if self._alone:
            # Ctrl-C also ends a `tee` that reads stderr: then an OSError here would end the run unsaved.
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping at the next step; Ctrl-C again leaves at once, without saving\n")
