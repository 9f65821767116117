"""Take a rank's part of its machine: CPU threads, memory, and the network interface to the other machines."""

import contextlib
import ctypes
import os
import socket
from pathlib import Path

import psutil
import torch

from ddp_mnist.distributed.launcher import from_environment

CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # a container's limit: microseconds of CPU time, and per how many
OUTSIDE = ("192.0.2.1", "2001:db8::1")  # no machine has these (RFC 5737, 3849): only the default route leads there


def allowed_cpus() -> frozenset[int]:
    """Return the numbers of the CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def default_threads() -> int:
    """Return the number of CPUs this process may use, divided by the ranks on this machine."""
    cpus = len(allowed_cpus())
    with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max 100000"
        quota, period = CPU_QUOTA.read_text().split()
        cpus = min(cpus, int(quota) // int(period))
    return max(1, cpus // from_environment("LOCAL_WORLD_SIZE"))


def use_threads(number: int) -> int:
    """Compute with `number` threads; 0: `default_threads`. Return how many.

    The number decides the speed, and how sums are rounded. Launchers set OMP_NUM_THREADS=1 or nothing, and Accelerate
    obeys it or takes all cores. So the job sets the number itself: it is the same under every launcher.
    """
    number = number or default_threads()
    os.environ["OMP_NUM_THREADS"] = str(number)
    torch.set_num_threads(number)
    _keep_freed_memory()
    return number


def _keep_freed_memory() -> None:
    """Let glibc keep memory that one step frees: the next step would wait for new pages. A user's tuning stays."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):  # it is another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(m_mmap_threshold, 32 << 20)
        mallopt(m_trim_threshold, 256 << 20)


def use_batch_scheduling() -> None:
    """Give this thread and those that it starts Linux's batch policy: a woken thread interrupts no running one.

    A thread of gloo wakes another while it holds a lock; the woken thread would take the CPU from the lock's holder.
    """
    with contextlib.suppress(OSError, AttributeError):  # a container forbids it, or it is not Linux
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def choose_interface() -> None:
    """On several machines, let gloo and NCCL use the interface that leads to MASTER_ADDR. What the user has set stays.

    gloo would use the address that this machine's own name resolves to. Debian and Ubuntu write 127.0.1.1 for it into
    /etc/hosts, where the other machines find nobody. NCCL avoids the loopback, but may take a bridge of containers.
    """
    master = os.environ.get("MASTER_ADDR", "localhost")
    on_one_machine = from_environment("WORLD_SIZE") <= from_environment("LOCAL_WORLD_SIZE")
    if on_one_machine or master in ("localhost", "::1") or master.startswith("127."):
        return
    # By its own name the first machine reaches itself through the loopback: then the default route is the best guess.
    for host in (master, *OUTSIDE):
        if name := _interface_to(host):
            os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME") or name
            # NCCL takes a name as a prefix, unless "=" stands before it.
            os.environ["NCCL_SOCKET_IFNAME"] = os.environ.get("NCCL_SOCKET_IFNAME") or f"={name}"
            return


def _interface_to(host: str) -> str | None:
    """Return the interface through which the kernel would send to `host`; None: the loopback, or no route."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            source = probe.getsockname()[0]
    except OSError:  # an unknown name, or no route
        return None
    for name, addresses in psutil.net_if_addrs().items():
        found = [each.address for each in addresses]
        if source in found and "127.0.0.1" not in found:
            return name
    return None
