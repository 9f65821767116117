"""The ranks of a job: how many there are, which one this is, what they agree on, and what happens when one is lost.

A function that is "Collective" is called on every rank, in the same order: it waits until all have done so.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    patch_environment,
)
from torch import Tensor

from ddp_mnist.distributed.launcher import (
    check_environment,
    is_first_on_its_machine,
    local_world_size_from_environment,
    rank_from_environment,
    world_size_from_environment,
)
from ddp_mnist.distributed.threads import batch_scheduling, default_threads, keep_freed_memory
from ddp_mnist.errors import JobError, UsageError

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig

T = TypeVar("T")
_store: dist.Store | None = None
"""Outlives a process group, since its port cannot be opened twice."""
_group_numbers = itertools.count()


class Context:
    """All ranks of this job, started through Accelerate; leaving the `with` block closes the process group."""

    def __init__(self, config: TrainConfig) -> None:
        """Bring the ranks together. Collective.

        Raises:
            JobError: They cannot find each other, or launcher and Accelerate disagree on how many there are.
            UsageError: fp16 without a GPU, or a launcher's variable that is no number.
        """
        check_environment()
        self.world_size = world_size_from_environment()
        on_cpu = not torch.cuda.is_available() and not (self.world_size == 1 and torch.backends.mps.is_available())
        if on_cpu and config.mixed_precision == "fp16":
            raise UsageError(
                f"--mixed-precision fp16 needs a GPU and there is none on {socket.gethostname()}: use bf16 or no.",
                local=is_first_on_its_machine(),
            )
        # The number of threads decides speed and bits. Launchers set OMP_NUM_THREADS=1 or leave it alone, and
        # Accelerate obeys it or takes all cores: the job sets it itself, so that it is the same under all of them.
        self.threads = config.threads or default_threads()
        os.environ["OMP_NUM_THREADS"] = str(self.threads)
        torch.set_num_threads(self.threads)
        keep_freed_memory()
        self._environment = contextlib.ExitStack()
        self.shares_gpus = local_world_size_from_environment() > torch.cuda.device_count() > 0
        if self.shares_gpus:
            # Accelerate would give DDP the GPU number LOCAL_RANK, which is not there. So DDP uses that of the weights.
            self._environment.enter_context(patch_environment(ACCELERATE_BYPASS_DEVICE_MAP="true"))
        # NCCL takes one rank per GPU.
        backend, timeout = "gloo" if on_cpu or self.shares_gpus else "nccl", timedelta(minutes=config.timeout_minutes)
        handlers: list[Any] = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        try:
            if self.world_size > 1:
                _init_process_group(backend, self.world_size, timeout)
                handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timeout))
            self.accelerator = Accelerator(
                mixed_precision=config.mixed_precision,
                cpu=on_cpu,  # without it each of several ranks on a machine without a GPU believes that it is alone
                # Said here, so that no variable of the environment changes what a step computes.
                gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
                dynamo_backend="no",
                kwargs_handlers=handlers,
            )
        except (RuntimeError, ValueError) as error:  # a busy port, an unreachable address, a missing variable
            self.close()
            raise JobError(
                f"the {self.world_size} ranks could not be brought together on {socket.gethostname()}: {error} "
                "Check MASTER_ADDR, MASTER_PORT, RANK and WORLD_SIZE, or start with accelerate launch or torchrun.",
                local=True,
            ) from error
        self.rank: int = self.accelerator.process_index
        self.device: torch.device = self.accelerator.device
        found = self.accelerator.num_processes if self.accelerator.use_distributed else 1
        if found != self.world_size:
            with contextlib.suppress(RuntimeError):
                dist.barrier()  # the others may still be connecting to this rank
            self.close()
            raise JobError(
                f"the launcher says WORLD_SIZE={self.world_size}, Accelerate counts {found}: the ranks would each "
                "train alone. Start with accelerate launch or torchrun, which set RANK, LOCAL_RANK and WORLD_SIZE."
            )

    @property
    def is_main(self) -> bool:
        """Return True on rank 0."""
        return self.rank == 0

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the process group, and forget what Accelerate keeps for the whole process."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self._environment.close()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all ranks. Collective."""
        return self.accelerator.reduce(values, "sum") if self.world_size > 1 else values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank; it is pickled on the way. Collective."""
        return broadcast_object_list([value])[0]

    def broadcast_tensors(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite the tensors with rank 0's. Collective."""
        if self.world_size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank and return its result. Collective.

        The ranks end together, with one message, instead of some waiting for one that has left.

        Raises:
            JobError: It failed on some rank: the lowest rank's error, on all of them. An exception that is no JobError
                is raised unchanged on its own rank.
        """
        failure: Exception | None = None
        report = None
        try:
            result = action()
        except JobError as error:
            failure, report = error, (str(error), error.exit_code, error.stop_reason)
        except Exception as error:
            failure, report = error, (repr(error), JobError.exit_code, JobError.stop_reason)
        for rank, found in enumerate(gather_object([report])):
            if found is not None:
                if failure is not None and not isinstance(failure, JobError):
                    raise failure
                message, code, reason = found
                where = f"rank {rank}: " if rank else ""
                raise (UsageError if code == 2 else JobError)(where + message, stop_reason=reason) from failure
        return result

    def run_on_main(self, action: Callable[[], None]) -> None:
        """Run `action` on rank 0 alone. Collective. Raises JobError: it failed; on all ranks."""
        self.run_on_all_ranks(lambda: action() if self.is_main else None)


@contextlib.contextmanager
def translate_collective_errors(context: Context) -> Iterator[None]:
    """Turn what a collective raises when another rank died or did not answer in time into a JobError that says so."""
    try:
        yield
    except RuntimeError as error:
        if not (isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)):
            raise
        # gloo: "[/build/path/pair.cc:561] Connection closed by peer [address]. This is typically caused ..."
        last = str(error).strip().splitlines()[-1].split("] ", 1)[-1].split(". ")[0].rstrip(".")
        raise JobError(
            f"rank {context.rank} on {socket.gethostname()} lost contact with another rank, which was killed, crashed "
            f"or did not answer within --timeout-minutes ({last}).",
            local=True,
            stop_reason="lost_rank",
        ) from error


def _init_process_group(backend: str, size: int, timeout: timedelta) -> None:
    """Create the process group under a prefix of its own: the store still has the keys of earlier groups and starts."""
    global _store
    if _store is None:
        _store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    _store.set_timeout(timeout)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun --max-restarts
    store = dist.PrefixStore(f"ddp_mnist/{start}/{next(_group_numbers)}", _store)
    with batch_scheduling():  # of gloo's threads
        dist.init_process_group(backend, store=store, rank=rank_from_environment(), world_size=size, timeout=timeout)
