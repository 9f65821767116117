"""A rank's process: which one it is, as its launcher says, what it prints, and how it ends.

One message from one rank, an exit code, and no interpreter shutdown.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn

from ddp_mnist.errors import JobError, UsageError

if TYPE_CHECKING:
    from ddp_mnist.distributed.context import Context


def rank_from_environment() -> int:
    """This process's rank as its launcher set it; 0 without a launcher. Raises: UsageError."""
    return _number("RANK")


def world_size_from_environment() -> int:
    """How many ranks the launcher has started; 1 without a launcher. Raises: UsageError."""
    return _number("WORLD_SIZE", least=1)


def local_world_size_from_environment() -> int:
    """How many of them on this machine; 1 without a launcher. Raises: UsageError."""
    return _number("LOCAL_WORLD_SIZE", least=1)


def is_first_on_its_machine() -> bool:
    return rank_from_environment() == 0 or os.environ.get("LOCAL_RANK") == "0"


@contextlib.contextmanager
def report_once_per_host() -> Iterator[None]:
    """Before the ranks have met, rank 0 may not know what is wrong on another machine: the first rank there tells."""
    try:
        yield
    except JobError as error:
        error.local |= is_first_on_its_machine()
        raise


def check_environment() -> None:
    """Are a launcher's variables what they should be, Accelerate's among them? Raises: UsageError."""
    rank_from_environment(), world_size_from_environment(), local_world_size_from_environment()
    _number("LOCAL_RANK")


def _number(name: str, *, least: int = 0) -> int:
    """`least`: also what it is without a launcher."""
    text = os.environ.get(name, str(least))
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UsageError(
            f"the environment says {name}={text}; expected a whole number from {least}, as accelerate launch, torchrun "
            f"and slurm/rank.sh set it. Type  unset {name}  if no launcher has.",
            local=name.endswith("RANK"),
        )
    return int(text)


def escape_unencodable_output() -> None:
    """What the console's encoding lacks, in the name of a file say, is written escaped, and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError, OSError):  # None, or nothing that has an encoding
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]


def show_warnings(*, main: bool) -> None:
    """Warnings go to the console from the `main` rank, errors from all of them."""
    escape_unencodable_output()
    logging.basicConfig(level=logging.WARNING if main else logging.ERROR, format="warning: %(message)s")


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Nothing that is printed is seen, such as a wrong flag, which every rank would tell of."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        yield


def report_error(error: JobError) -> int:
    """Print the error where it is due, once; returns its exit code."""
    # Every rank raises the same error, one tells it; except where the others cannot know.
    # Asked now: where mpirun has started the ranks, only Accelerate has learned which one this is.
    if not error.reported and (error.local or rank_from_environment() == 0):
        with contextlib.suppress(OSError):  # a full disk, a closed pipe: the exit code says it as well
            print(f"error: {error}", file=sys.stderr, flush=True)
    error.reported = True
    return error.exit_code


def exit_code_for_rank(summary_code: int) -> int:
    """The exit code of this rank when the job's is `summary_code`.

    srun --kill-on-bad-exit ends the others with the first rank that fails, so one alone tells the news.
    """
    return summary_code if rank_from_environment() == 0 else 0


def install_excepthook() -> None:
    """From now on a JobError that nobody catches is one message and an exit code, as in our own command."""
    before = sys.excepthook
    if getattr(before, "reports_job_errors", False):
        return

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, JobError):
            sys.stderr = sys.__stderr__  # torch.distributed's hook puts a buffer there, to label its lines
            hard_exit(report_error(error))
        before(kind, error, trace)

    hook.reports_job_errors = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def wait_for_peers_to_exit(context: Context, timeout: float = 10.0) -> None:
    """Return on rank 0 when all other processes are gone, on these at once. Collective. `timeout`: seconds.

    srun --kill-on-bad-exit ends the other ranks with the first that fails, and the step gets their exit code: so
    rank 0 must be the last to leave. The kernel closes a dead process's sockets, which is what rank 0 waits for.
    """
    if context.size == 1:
        return
    server = socket.create_server(("", 0)) if context.is_main else None
    port = context.broadcast(server.getsockname()[1] if server else 0)
    deadline = time.monotonic() + timeout
    if server is None:
        with contextlib.suppress(OSError):  # a firewall: rank 0 then waits until its time is over
            # Detached, so that it closes when the process ends and not when the object does.
            address = os.environ.get("MASTER_ADDR", "127.0.0.1"), port
            socket.create_connection(address, timeout=timeout).detach()
        return
    with server, contextlib.suppress(OSError):
        connections = []
        for _ in range(context.size - 1):
            server.settimeout(max(0.01, deadline - time.monotonic()))
            connections.append(server.accept()[0])
        for connection in connections:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            connection.recv(1)


def hard_exit(code: int) -> NoReturn:
    """End the process without taking Python down, which gloo's threads do not survive.

    They outlive the process group that DDP has used, and one that lets go of a tensor while Python ends aborts the
    process (pytorch#179291, #190489): exit code 134 after a good run, in 7 of 25 runs of 4 ranks on a busy machine.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError):  # None: it was closed before Python began
            stream.flush()
    os._exit(code)
