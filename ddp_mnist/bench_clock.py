"""The benchmark's clock."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed(action: Callable[[], object]) -> float:
    """Seconds until the action is done, on the GPU too: kernels that were only queued are waited for."""
    synchronize()
    started = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - started


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()
