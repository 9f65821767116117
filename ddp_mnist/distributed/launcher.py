"""One process of a job: which rank it is, what it prints, and how it ends."""

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
from typing import NoReturn, ParamSpec

import psutil

from ddp_mnist.errors import JobError, UsageError

log = logging.getLogger(__name__)
P = ParamSpec("P")


def from_environment(name: str) -> int:
    """Return RANK, WORLD_SIZE or another number that launchers set; without a launcher, a single rank's value.

    TORCHELASTIC_RESTART_COUNT is how often `torchrun --max-restarts` has started its ranks again. Raises UsageError:
    the variable is no such number.
    """
    smallest = int("WORLD_SIZE" in name)
    text = os.environ.get(name, str(smallest))
    ranks = os.environ.get("WORLD_SIZE", "1")
    most = max(int(ranks), 1) - 1 if name == "RANK" and ranks.isdecimal() else sys.maxsize
    if not text.isdecimal() or not smallest <= int(text) <= most:
        raise UsageError(
            f"the environment says {name}={text}; expected a whole number from {smallest}, and RANK below WORLD_SIZE, "
            f"as accelerate launch, torchrun and slurm/rank.sh set them. Type  unset {name}  if no launcher has.",
            local=name.endswith("RANK"),  # a rank without a number cannot leave the message to rank 0
        )
    return int(text)


def is_first_on_its_machine() -> bool:
    """Return True on rank 0 and on the first rank of every other machine."""
    return from_environment("RANK") == 0 or os.environ.get("LOCAL_RANK") == "0"


@contextlib.contextmanager
def report_once_per_host() -> Iterator[None]:
    """Let each machine's first rank report a JobError: before the ranks meet, rank 0 knows only its own machine."""
    try:
        yield
    except JobError as error:
        error.local |= is_first_on_its_machine() or wait_for_first_rank_to_exit()  # if it stays, it has no such error
        raise


def check_environment(*, gloo: bool = False) -> None:
    """Raise UsageError if a launcher's variable is wrong or asks for more than DDP. `gloo`: check gloo's interface."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        from_environment(name)
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
            raise UsageError(
                f"the environment says {name}={os.environ[name]}, perhaps by a default config of accelerate; this job "
                "is DDP. Start it with a file of launch/, such as --config_file launch/multi_gpu.yaml, or torchrun."
            )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() not in ("", "no") and from_environment("RANK") == 0:
        log.warning("ACCELERATE_DYNAMO_BACKEND=%s is ignored; --compile compiles the network.", backend)
    present = psutil.net_if_addrs()
    for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if gloo else ():
        if name and name not in present:
            raise UsageError(
                f"the environment says GLOO_SOCKET_IFNAME={name}, which {socket.gethostname()} does not have; there "
                f"are: {', '.join(present)}. Type  unset GLOO_SOCKET_IFNAME  or name one of these."
            )


def entry_point(main: Callable[P, int]) -> Callable[P, int]:
    """Decorate a main function that returns the job's exit code: report its JobError, return this rank's exit code."""

    @functools.wraps(main)
    def run(*args: P.args, **kwargs: P.kwargs) -> int:
        for stream in (sys.stdout, sys.stderr):  # escape what the console cannot encode, as in a file's name
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
        finally:  # flush before Python's exit, which would print a traceback for `--help | head`
            try:
                sys.stdout.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            except (AttributeError, OSError, ValueError):  # stdout is None or closed, or the disk is full
                pass

    return run


def report_error(error: JobError) -> int:
    """Print the error, unless it was printed before or another rank prints it. Return the error's exit code."""
    # Read RANK now, not at the start: under mpirun it is known only after Accelerate has set it.
    if not error.reported and (error.local or from_environment("RANK") == 0):
        with contextlib.suppress(OSError):  # full disk or closed pipe: the exit code says it, too
            print(f"error: {error}", file=sys.stderr, flush=True)
    error.reported = True
    return error.exit_code


def exit_code_for_rank(summary_code: int) -> int:
    """Return the job's exit code on rank 0 and 0 on the others: srun kills all ranks when the first one fails."""
    return summary_code if from_environment("RANK") == 0 else 0


@functools.cache  # the body runs once in a process
def install_excepthook() -> None:
    """Let an uncaught JobError end a script as it ends our commands: one message and its exit code."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if isinstance(error, JobError):
            sys.stderr = sys.__stderr__  # torch.distributed's hook has put a buffer there to label lines
            code = report_error(error)
            wait_for_first_rank_to_exit()
            hard_exit(code)
        previous(kind, error, trace)

    sys.excepthook = hook


def wait_for_first_rank_to_exit(timeout: float = 10.0) -> bool:
    """Let this machine's first rank, which reports for the others, leave before them. Return True if it stays.

    Launchers kill all ranks when the first one fails. So after an error the rank that reports leaves first; after a
    stop it leaves last, see `Context.wait_for_peers_to_exit`. The ranks may not have met yet: look for the first rank
    among the launcher's processes.
    """
    if "0" in (os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK")):
        return False
    with contextlib.suppress(ValueError):  # not in the main thread
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # or srun would report SIGTERM as the job's exit code
    first = []
    for each in psutil.process_iter(["ppid", "environ"]):
        given = each.info["environ"] or {}  # the variables at its start: submitit sets LOCAL_RANK later
        if each.info["ppid"] == os.getppid() and given.get("LOCAL_RANK", given.get("SLURM_LOCALID")) == "0":
            first.append(each)
    return bool(psutil.wait_procs(first, timeout)[1])


def hard_exit(code: int) -> NoReturn:
    """End the process without Python's shutdown, during which gloo's threads may abort it.

    pytorch#179291, #190489: exit code 134 after a good run, in 7 of 25 runs of 4 ranks on a busy machine.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, AttributeError, ValueError):  # None: closed before Python started
            stream.flush()
    os._exit(code)


def limit_spinning() -> None:
    """Let OpenMP's waiting threads give up the CPU sooner, to other ranks and runs. Call it before importing torch."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def show_warnings(*, main: bool) -> None:
    """Print what is logged: warnings on the `main` rank, errors on all."""
    logging.basicConfig(level=logging.WARNING if main else logging.ERROR, format="warning: %(message)s")


@contextlib.contextmanager
def suppress_output() -> Iterator[None]:
    """Print nothing inside the block: another rank prints the same, such as the error of a wrong flag."""
    with Path(os.devnull).open("w") as null, contextlib.redirect_stdout(null), contextlib.redirect_stderr(null):
        yield
