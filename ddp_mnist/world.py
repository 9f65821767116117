"""The processes of a run: how many there are, which one this is, and how they agree."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, patch_environment
from torch import Tensor

from ddp_mnist.config import TrainConfig
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.process import (
    check_environment,
    is_first_on_its_machine,
    local_world_size_from_environment,
    rank_from_environment,
    world_size_from_environment,
)

T = TypeVar("T")


class World:
    """All ranks of this run, started through Accelerate; leaving the `with` block closes the process group.

    Raises: JobError when the ranks cannot find each other or launcher and Accelerate disagree on how many there
    are; UsageError for fp16 without a GPU.
    """

    def __init__(self, config: TrainConfig) -> None:
        check_environment()
        self.size = world_size_from_environment()
        on_cpu = not _has_accelerator(self.size)
        if on_cpu and config.mixed_precision == "fp16":
            raise UsageError(
                f"--mixed-precision fp16 needs a GPU and there is none on {socket.gethostname()}: use bf16 or no.",
                local=is_first_on_its_machine(),
            )
        self.threads = config.threads or default_threads()
        # The thread count decides speed and bits. Launchers set OMP_NUM_THREADS=1 or leave it alone, and Accelerate
        # obeys it or takes all cores: the job sets it itself, so that it is the same under all of them.
        os.environ["OMP_NUM_THREADS"] = str(self.threads)
        torch.set_num_threads(self.threads)
        _keep_freed_memory()
        self._environment = contextlib.ExitStack()
        if _shares_gpus():
            # Accelerate would tell DDP that rank 1 has the machine's second GPU: without this it asks the weights.
            self._environment.enter_context(patch_environment(ACCELERATE_BYPASS_DEVICE_MAP="true"))
        limit, backend = timedelta(minutes=config.timeout_minutes), _backend()
        by_gloo = self.size > 1 and (on_cpu or backend == "gloo")
        try:
            with _patient_threads() if by_gloo else contextlib.nullcontext():
                if self.size > 1:
                    _meet_again(self.size, "gloo" if on_cpu else backend, limit)
                self.accelerator = Accelerator(
                    mixed_precision=config.mixed_precision,
                    # Without cpu=True each of several ranks on a machine without a GPU believes it is alone.
                    cpu=on_cpu,
                    kwargs_handlers=[
                        InitProcessGroupKwargs(backend=backend, timeout=limit),
                        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
                    ],
                )
        except (RuntimeError, ValueError) as error:  # a busy port, an unreachable address, a missing variable
            self.close()
            raise JobError(
                f"the {self.size} ranks could not be brought together on {socket.gethostname()}: {error} "
                "Check MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE, or start with accelerate launch or torchrun.",
                local=True,
            ) from error
        assert torch.get_num_threads() == self.threads
        self.rank: int = self.accelerator.process_index
        self.device: torch.device = self.accelerator.device
        if self.accelerator.num_processes != self.size:
            found = self.accelerator.num_processes
            self.close()
            raise JobError(
                f"the launcher says WORLD_SIZE={self.size}, Accelerate counts {found}: the ranks would each train "
                "alone. Start with accelerate launch or torchrun, which set RANK, LOCAL_RANK and WORLD_SIZE."
            )
        _remember_meeting()

    @property
    def shares_gpus(self) -> bool:
        """Other ranks of this machine use the same GPU."""
        return self.device.type == "cuda" and _shares_gpus()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        self._environment.close()
        _reset_accelerate()

    def sum(self, values: Tensor) -> Tensor:
        """Elementwise sum over all ranks, in place; returns `values`."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def all(self, yes: bool) -> bool:
        """Whether every rank says yes."""
        if self.size == 1:
            return yes  # a CUDA graph is being recorded, perhaps
        return self.size == int(self.sum(torch.tensor(int(yes), device=self.device)))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's values, on every rank, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def broadcast(self, value: T) -> T:
        """Rank 0's value, on every rank."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def let_others_leave(self, patience: float = 10.0) -> None:
        """Returns on rank 0 when all other ranks' processes are gone, on these at once; `patience` in seconds.

        srun --kill-on-bad-exit ends the other ranks with the first that fails, and the step gets their code: so rank
        0 must be the last to leave. The kernel closes a dead process's sockets, which is what rank 0 waits for.
        """
        if self.size == 1:
            return
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        server = socket.create_server(("", 0)) if self.is_main else None
        port = self.broadcast(server.getsockname()[1] if server else 0)
        deadline = time.monotonic() + patience
        if server is None:
            with contextlib.suppress(OSError):  # a firewall: rank 0 then waits for its patience to end
                # Nobody's to close but the kernel's: as an object's, it would close with it, before the process ends.
                socket.create_connection((host, port), timeout=patience).detach()
            return
        with server, contextlib.suppress(OSError):
            lines = []
            for _ in range(self.size - 1):
                server.settimeout(max(0.01, deadline - time.monotonic()))
                lines.append(server.accept()[0])
            for line in lines:
                line.settimeout(max(0.01, deadline - time.monotonic()))
                line.recv(1)

    def agree(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if it fails on any, the same JobError is raised on all of them.

        The ranks then end together with one message, instead of some waiting in a collective for one that left.
        """
        result: Any = None
        failure: BaseException | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        report = None
        if failure is not None:
            message = str(failure) if isinstance(failure, JobError) else repr(failure)
            kind = failure if isinstance(failure, JobError) else JobError
            report = (message, kind.exit_code, kind.stop_reason)
        reports: list[tuple[str, int, str] | None] = [report]
        if self.size > 1:
            reports = [None] * self.size
            dist.all_gather_object(reports, report)
        if failure is not None and not isinstance(failure, JobError):
            raise failure  # a bug keeps its traceback, on the rank that has it
        for rank, found in enumerate(reports):
            if found is not None:
                message, code, reason = found
                where = "" if rank == 0 else f"rank {rank}: "
                raise (UsageError if code == 2 else JobError)(where + message, stop_reason=reason) from failure
        return result


@contextlib.contextmanager
def _patient_threads() -> Iterator[None]:
    """Threads that begin inside, gloo's, never interrupt one that runs when they are woken.

    They wake each other with a lock in hand. Where every CPU is busy, and they are by ranks that train, the woken one
    may take the CPU of the one that holds the lock, and ask for it again and again until its time slice is over: over
    3 ms in a quarter of the steps of two ranks on two CPUs (docs/benchmarks/README.md). By Linux's policy for batch
    jobs, which anybody may choose, a woken thread waits its turn.
    """
    with contextlib.ExitStack() as afterwards:
        with contextlib.suppress(OSError, AttributeError):  # a container forbids it, or it is not Linux
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))  # a new thread has its maker's
                afterwards.callback(os.sched_setscheduler, 0, os.SCHED_OTHER, os.sched_param(0))
        yield


@contextlib.contextmanager
def lost_ranks_told(world: World) -> Iterator[None]:
    """What a collective raises when another rank died or did not answer in time becomes a JobError that says so.

    Anything else is a bug of ours and goes on as it is.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error):
            raise _lost_rank(error, world) from error
        raise


def _lost_rank(error: RuntimeError, world: World) -> JobError:
    # gloo: "[/build/path/pair.cc:561] Connection closed by peer [address]. This is typically caused ..."
    last = str(error).strip().splitlines()[-1].split("] ", 1)[-1].split(". ")[0].rstrip(".")
    return JobError(
        f"rank {world.rank} on {socket.gethostname()} lost contact with another rank, which was killed, crashed or "
        f"did not answer within --timeout-minutes ({last}).",
        local=True,
        stop_reason="lost_rank",
    )


def default_threads() -> int:
    """CPUs this process may use, divided by the ranks on this machine."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, allowed // local_world_size_from_environment())


_met_at: dist.Store | None = None
"""Where the ranks of this process's first world met."""
_meetings = itertools.count(1)


def _remember_meeting() -> None:
    global _met_at
    if _met_at is None and dist.is_initialized():
        _met_at = dist.distributed_c10d._get_default_store()


def _meet_again(size: int, backend: str, timeout: timedelta) -> None:
    """The process group of a second and later world of a process: at the store of its first, under names of its own.

    Under torchrun that store outlives a group, and the next one would find the addresses of the last; elsewhere rank 0
    would have to open the port again that it has just closed, while others already knock at it.
    """
    if _met_at is not None:
        _met_at.set_timeout(timeout)
        store = dist.PrefixStore(f"meeting {next(_meetings)}", _met_at)
        rank = rank_from_environment()
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def _keep_freed_memory() -> None:
    """Let glibc keep what one step frees for the next. By default it gives memory at the top of its heap back to the
    system, and the next step takes new pages, some hundred a step, for as long as small tensors outlive a step there.
    Where another allocator is at work, or the user has tuned this one, nothing changes."""
    if any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ):
        return
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # malloc.h
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        # An old glibc takes no more than 32 MiB here. The order matters: either threshold, once set, freezes both.
        if mallopt(m_mmap_threshold, 256 << 20) or mallopt(m_mmap_threshold, 32 << 20):
            mallopt(m_trim_threshold, 256 << 20)
            mallopt(m_top_pad, 16 << 20)


def _has_accelerator(world_size: int) -> bool:
    if torch.cuda.is_available():
        return True
    return world_size == 1 and torch.backends.mps.is_available()


def _backend() -> str:
    """NCCL, which takes one rank per GPU; gloo where more ranks than that are to share the GPUs of this machine.

    Without a GPU Accelerate takes gloo whatever this says.
    """
    return "gloo" if _shares_gpus() else "nccl"


def _shares_gpus() -> bool:
    return local_world_size_from_environment() > torch.cuda.device_count() > 0


def _reset_accelerate() -> None:
    """Accelerate keeps its state in process-wide singletons; a second `fit` in one process needs fresh ones."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
