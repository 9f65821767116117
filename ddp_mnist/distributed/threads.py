"""The CPU threads of a rank: how many, and what the system makes of them and of their memory."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

from ddp_mnist.distributed.launcher import local_world_size_from_environment


def allowed_cpus() -> frozenset[int]:
    """Return the numbers of the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def default_threads() -> int:
    """Return the number of CPUs this process may use, divided by the ranks on this machine."""
    return max(1, len(allowed_cpus()) // local_world_size_from_environment())


def keep_freed_memory() -> None:
    """Let glibc keep what one step frees: the next would wait for new pages. What the user has tuned stays."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        if mallopt(m_mmap_threshold, 32 << 20):
            mallopt(m_trim_threshold, 256 << 20)
            mallopt(m_top_pad, 16 << 20)


@contextlib.contextmanager
def batch_scheduling() -> Iterator[None]:
    """Start threads inside under Linux's policy for batch jobs: when woken, they do not interrupt a running thread.

    gloo's wake each other with a lock in hand, and would take the CPU from the one that holds it.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError, AttributeError):  # a container forbids it, or it is not Linux
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # a new thread inherits it
                stack.callback(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
        yield
