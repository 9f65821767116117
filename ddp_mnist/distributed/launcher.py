"""One process of a job: which rank its launcher made it, what it prints, and how it ends."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, ParamSpec

import psutil

from ddp_mnist.errors import STOPPED, JobError, UsageError

if TYPE_CHECKING:
    from ddp_mnist.distributed.context import Context

log = logging.getLogger(__name__)
P = ParamSpec("P")


def rank_from_environment() -> int:
    """Return this process's rank."""
    return _number("RANK")


def world_size_from_environment() -> int:
    """Return how many ranks the launcher has started."""
    return _number("WORLD_SIZE")


def local_world_size_from_environment() -> int:
    """Return how many ranks the launcher has started on this machine."""
    return _number("LOCAL_WORLD_SIZE")


def restart_count() -> int:
    """Return how often `torchrun --max-restarts` has started its ranks again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def is_first_on_its_machine() -> bool:
    """Return True on rank 0 and on the first rank of every other machine."""
    return rank_from_environment() == 0 or os.environ.get("LOCAL_RANK") == "0"


@contextlib.contextmanager
def report_once_per_host() -> Iterator[None]:
    """Let each machine's first rank report a JobError: before the ranks meet, rank 0 knows its own machine only."""
    try:
        yield
    except JobError as error:
        error.local |= is_first_on_its_machine()
        raise


def check_environment(*, gloo: bool = False) -> None:
    """Raise UsageError if a rank variable is no number, or another one asks Accelerate for more than DDP."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        _number(name)
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
            raise UsageError(
                f"the environment says {name}={os.environ[name]}, perhaps by a default config of accelerate; this job "
                "is DDP. Start it with a file of launch/, such as --config_file launch/multi_gpu.yaml, or torchrun."
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no") and rank_from_environment() == 0:
        log.warning("ACCELERATE_DYNAMO_BACKEND=%s is ignored; --compile compiles the network.", backend)
    internet = {socket.AF_INET, socket.AF_INET6}
    usable = [name for name, found in psutil.net_if_addrs().items() if internet & {each.family for each in found}]
    for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if gloo else ():
        if name and name not in usable:
            raise UsageError(
                f"the environment says GLOO_SOCKET_IFNAME={name}, which is no interface of {socket.gethostname()} with "
                f"an address; there are: {', '.join(usable)}. Type  unset GLOO_SOCKET_IFNAME  or name one of these."
            )


def _number(name: str) -> int:
    smallest = 0 if name.endswith("RANK") else 1  # also the value where no launcher has set it
    text = os.environ.get(name, str(smallest))
    if not text.isdecimal() or int(text) < smallest:
        raise UsageError(
            f"the environment says {name}={text}; expected a whole number from {smallest}, as accelerate launch, "
            f"torchrun and slurm/rank.sh set it. Type  unset {name}  if no launcher has.",
            local=name.endswith("RANK"),  # a rank that does not know its number cannot leave it to rank 0
        )
    return int(text)


def entry_point(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate a main function that returns the job's exit code: report its JobError, return this rank's exit code."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        for stream in (sys.stdout, sys.stderr):  # print what the console cannot encode, as in a file's name, as escapes
            with contextlib.suppress(AttributeError, ValueError, OSError):  # None, or a stream without an encoding
                stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
        try:
            return exit_code_for_rank(main(*args, **kwargs))
        except JobError as error:
            code = report_error(error)
            wait_for_first_rank_to_exit()
            return code
        except SystemExit as error:
            if error.code:  # a wrong flag, on all ranks
                wait_for_first_rank_to_exit()
            raise
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            return 1
        finally:  # not at Python's exit, which would print a traceback for `--help | head`
            try:
                sys.stdout.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            except (AttributeError, OSError, ValueError):  # None, a full disk, or closed
                pass

    return run


def report_error(error: JobError) -> int:
    """Print the error, unless that is done or another rank's task. Return its exit code."""
    # Read now and not at the start: under mpirun the rank is known only once Accelerate has set it.
    if not error.reported and (error.local or rank_from_environment() == 0):
        with contextlib.suppress(OSError):  # full disk or closed pipe: the exit code says it, too
            print(f"error: {error}", file=sys.stderr, flush=True)
    error.reported = True
    return error.exit_code


def exit_code_for_rank(summary_code: int) -> int:
    """Return the job's exit code on rank 0 and 0 on the others: srun ends all ranks with the first one that fails."""
    return summary_code if rank_from_environment() == 0 else 0


@functools.cache  # once in a process
def install_excepthook() -> None:
    """Let an uncaught JobError end a script as it ends our commands: one message and its exit code."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, JobError):
            sys.stderr = sys.__stderr__  # torch.distributed's hook puts a buffer there, to label its lines
            code = report_error(error)
            wait_for_first_rank_to_exit()
            hard_exit(code)
        previous(kind, error, trace)

    sys.excepthook = hook


def wait_for_first_rank_to_exit(timeout: float = 10.0) -> None:
    """Let this machine's first rank, which reports for the others, leave before them.

    Launchers end all ranks with the first one that fails. So after an error the rank that reports leaves first; after a
    stop it leaves last, see `wait_for_peers_to_exit`. The ranks may not have met: look among the launcher's processes.
    """
    if "0" in (os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK")):
        return
    with contextlib.suppress(ValueError):  # this is a thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or srun would show it as the job's exit code
    first = []
    for each in psutil.process_iter(["ppid", "environ"]):
        given = each.info["environ"] or {}  # as it was started: submitit sets LOCAL_RANK later
        if each.info["ppid"] == os.getppid() and given.get("LOCAL_RANK", given.get("SLURM_LOCALID")) == "0":
            first.append(each)
    psutil.wait_procs(first, timeout)


def wait_for_peers_to_exit(context: Context, timeout: float = 10.0) -> None:
    """Wait on rank 0 until the other processes are gone, or one has taken `timeout` seconds. Collective.

    srun --kill-on-bad-exit ends all ranks with the first that fails, and takes the exit code of those that it killed:
    rank 0 must leave last. It waits until the kernel closes the connections of the dead processes.
    """
    if context.world_size == 1:
        return
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    server = socket.create_server(("", 0), family=family, dualstack_ipv6=ipv6) if context.is_main else None
    port = context.broadcast(server.getsockname()[1] if server else 0)
    with contextlib.suppress(OSError):  # a firewall, or the timeout
        if server is None:
            address = os.environ.get("MASTER_ADDR", "127.0.0.1"), port
            socket.create_connection(address, timeout).detach()  # from now on it closes with the process
            return
        server.settimeout(timeout)
        connections = [server.accept()[0] for _ in range(context.world_size - 1)]
        for connection in connections:
            connection.settimeout(timeout)
            connection.recv(1)


def stop_before_start(reason: str) -> NoReturn:
    """End a rank that has waited for others in vain: 75, so that SLURM starts the job again."""
    with contextlib.suppress(OSError):
        print(f"stopped by {reason} while rank {rank_from_environment()} waited for the others", file=sys.stderr)
    hard_exit(STOPPED)


def hard_exit(code: int) -> NoReturn:
    """End the process without Python's shutdown, during which gloo's threads may abort it.

    pytorch#179291, #190489: exit code 134 after a good run, in 7 of 25 runs of 4 ranks on a busy machine.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError, ValueError):  # None: closed before Python started
            stream.flush()
    os._exit(code)


def limit_spinning() -> None:
    """Let OpenMP's waiting threads leave the CPU to other ranks and runs soon. Call it before torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def show_warnings(*, main: bool) -> None:
    """Print what is logged: warnings on the `main` rank, errors on all."""
    logging.basicConfig(level=logging.WARNING if main else logging.ERROR, format="warning: %(message)s")


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Print nothing: one rank shows what all of them would, such as a wrong flag."""
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield
