"""The ranks of a job: how many there are, which one this is, what they agree on, and what happens when one is lost.

Call a function that is "Collective" on every rank, in the same order: it waits until all ranks have called it.
"""

import contextlib
import functools
import itertools
import os
import socket
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator, utils
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor

from ddp_mnist.distributed import launcher, machine
from ddp_mnist.errors import JobError, UsageError

if TYPE_CHECKING:
    from ddp_mnist.config import TrainConfig
    from ddp_mnist.distributed.preemption import StopSignal

T = TypeVar("T")
_store: dist.Store | None = None  # kept for the next process group, since the store's port cannot be opened twice
_group_numbers = itertools.count()


class Context(contextlib.AbstractContextManager["Context"]):
    """This rank's link to the other ranks, through Accelerate. Leaving the `with` block closes the process group."""

    def __init__(self, config: "TrainConfig", stop: "StopSignal | None" = None) -> None:
        """Bring the ranks together. Collective. A signal that `stop` catches ends a rank that waits for others.

        Raises JobError: the ranks cannot find each other, or launcher and Accelerate disagree on their number;
        UsageError: fp16 without a GPU, a wrong variable, or the script has a process group of its own.
        """
        self.shares_gpus = launcher.from_environment("LOCAL_WORLD_SIZE") > torch.cuda.device_count() > 0
        self.world_size = launcher.from_environment("WORLD_SIZE")
        on_cpu = not torch.cuda.is_available() and not (self.world_size == 1 and torch.backends.mps.is_available())
        # NCCL allows only one rank per GPU.
        backend, timeout = "gloo" if on_cpu or self.shares_gpus else "nccl", timedelta(minutes=config.timeout_minutes)
        with launcher.report_once_per_host():
            launcher.check_environment(gloo=backend == "gloo" and self.world_size > 1)
            if on_cpu and config.mixed_precision == "fp16":
                host = socket.gethostname()
                raise UsageError(f"--mixed-precision fp16 needs a GPU and there is none on {host}: use bf16 or no.")
            if dist.is_initialized() or PartialState._shared_state:
                raise UsageError(
                    "this process has a process group or an Accelerator, and the job makes and closes its own. Take "
                    "init_process_group and Accelerator() out of the script, or run the job in a process of its own."
                )
        self.threads = machine.use_threads(config.threads)
        if self.shares_gpus:
            # Accelerate would give DDP the GPU number LOCAL_RANK, which may not exist. So DDP uses the weights' GPU.
            os.environ["ACCELERATE_BYPASS_DEVICE_MAP"] = "true"
        handlers: list[Any] = [utils.DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
        try:
            if self.world_size > 1:
                meet = functools.partial(_init_process_group, backend, self.world_size, timeout)
                stop.wait_for_peers(meet) if stop else meet()
                handlers.append(utils.InitProcessGroupKwargs(backend=backend, timeout=timeout))
            # A single rank needs no process group and no DDP, even under torchrun: LOCAL_RANK=-1 tells Accelerate so.
            with contextlib.nullcontext() if self.world_size > 1 else utils.patch_environment(LOCAL_RANK="-1"):
                self.accelerator = Accelerator(
                    mixed_precision=config.mixed_precision,
                    cpu=on_cpu,  # else each of several ranks on a machine without a GPU believes that it is alone
                    # Set here, so that no variable of the environment changes what a step computes.
                    gradient_accumulation_plugin=utils.GradientAccumulationPlugin(num_steps=1),
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
        self.is_main = self.rank == 0
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

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the process group, and forget what Accelerate keeps for the whole process."""
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()

    def has_broken_connection(self) -> bool:
        """Return True if gloo has seen a connection fail or a peer time out. Under NCCL always False."""
        peers = {*range(self.world_size)} - {self.rank} if self.accelerator.state.backend == "gloo" else ()
        try:
            for peer in peers:
                dist.isend(torch.zeros(1), peer)  # raises at once if the link is broken; nobody receives the data
        except RuntimeError:
            return True
        return False

    def sum(self, values: Tensor) -> Tensor:
        """Return the elementwise sum over all ranks. Collective."""
        return self.accelerator.reduce(values, "sum") if self.world_size > 1 else values

    def broadcast(self, value: T) -> T:
        """Return rank 0's value on every rank; it is pickled on the way. Collective."""
        return utils.broadcast_object_list([value])[0]

    def run_on_all_ranks(self, action: Callable[[], T]) -> T:
        """Run `action` on every rank and return its result; if one rank fails, all ranks raise an error. Collective.

        Raises JobError: the lowest rank's. Another exception stays on its own rank; a JobError names it on the others.
        """
        failure: Exception | None = None
        try:
            result = action()
        except Exception as error:
            failure = error
        bug = None if isinstance(failure, JobError) else failure
        for rank, found in enumerate(utils.gather_object([JobError(repr(bug)) if bug else failure])):
            if found is not None:
                if bug is not None:
                    raise bug
                where = f"rank {rank}: " if rank else ""
                raise type(found)(f"{where}{found}", stop_reason=found.stop_reason) from failure
        return result

    def run_on_main(self, action: Callable[[], T]) -> T:
        """Run `action` on rank 0 and return its result on every rank. Collective. Raises: as `run_on_all_ranks`."""
        return self.broadcast(self.run_on_all_ranks(lambda: action() if self.is_main else None))  # type: ignore[return-value]

    def wait_for_peers_to_exit(self, timeout: float = 10.0) -> None:
        """Wait on rank 0 until the other processes are gone, or one needs more than `timeout` seconds. Collective.

        srun --kill-on-bad-exit kills all ranks when the first one fails, and then reports the exit code of the killed
        ones. So rank 0 must exit last: it waits until the kernel closes the connections of the other processes.
        """
        if self.world_size == 1:
            return
        ipv6 = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if ipv6 else socket.AF_INET
        server = socket.create_server(("", 0), family=family, dualstack_ipv6=ipv6) if self.is_main else None
        port = self.broadcast(server.getsockname()[1] if server else 0)
        with contextlib.suppress(OSError):  # a firewall, or the timeout
            if server is None:
                address = os.environ.get("MASTER_ADDR", "127.0.0.1"), port
                socket.create_connection(address, timeout).detach()  # from now on only this process's end closes it
                return
            server.settimeout(timeout)
            connections = [server.accept()[0] for _ in range(self.world_size - 1)]
            for connection in connections:
                connection.settimeout(timeout)
                connection.recv(1)


@contextlib.contextmanager
def translate_errors(context: Context) -> Iterator[None]:
    """Turn an error that comes from a lost rank or from too little memory into a JobError that says so."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        where = f"rank {context.rank} on {socket.gethostname()}"
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
            raise JobError(
                f"{where} has no more memory. Split the batch with --accumulate, which does not change the result, or "
                "take a smaller --batch-size.",
                local=True,
                stop_reason="out_of_memory",
            ) from error
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        # An error in the network's code keeps its traceback, even if a peer died of it. DDP's errors are autograd's.
        callers = ("torch.distributed.", "torch.nn.parallel.", "torch.autograd.", "ddp_mnist.")
        lost = frame.f_globals["__name__"].startswith(callers) and context.has_broken_connection()
        if not (lost or isinstance(error, dist.DistError)):
            raise
        # gloo: "[/build/path/pair.cc:561] Connection closed by peer [address]. This is typically caused ..."
        last = str(error).strip().splitlines()[-1].split("] ", 1)[-1].split(". ")[0].rstrip(".")
        raise JobError(
            f"{where} lost contact with another rank, which was killed, crashed or did not answer within "
            f"--timeout-minutes ({last}).",
            local=True,
            stop_reason="lost_rank",
        ) from error


def _init_process_group(backend: str, size: int, timeout: timedelta) -> None:
    """Create the process group with its own key prefix: the store still has the keys of earlier groups and restarts."""
    global _store
    if _store is None:
        _store, _, _ = next(dist.rendezvous("env://", timeout=timeout))
    _store.set_timeout(timeout)
    store = dist.PrefixStore(
        f"ddp_mnist/{launcher.from_environment('TORCHELASTIC_RESTART_COUNT')}/{next(_group_numbers)}", _store
    )
    machine.choose_interface()
    machine.use_batch_scheduling()  # gloo's threads inherit it; in training, this thread ends here
    rank = launcher.from_environment("RANK")
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
