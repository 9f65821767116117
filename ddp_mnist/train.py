"""The entry point: flags → job → exit code. `trainer.py` has the loop.

Flags are parsed before torch is imported, so that `--help` is instant and a wrong flag fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from ddp_mnist.config import parse
from ddp_mnist.distributed.launcher import (
    exit_code_for_rank,
    hard_exit,
    rank_from_environment,
    report_error,
    report_once_per_host,
    show_warnings,
    world_size_from_environment,
)
from ddp_mnist.distributed.preemption import StopSignal
from ddp_mnist.errors import JobError

if TYPE_CHECKING:
    from torch import nn

    from ddp_mnist.data.sources import UserData


def run(
    *,
    model: Callable[[], nn.Module] | None = None,
    data: Callable[[], UserData] | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Run the whole command, with all flags, messages and exit codes, for a network and data of your own.

    As `fit`, but `data` is a function that makes the pair; it is called when the flags are known to be right.
    """
    hard_exit(main(argv, model=model, data=data))


def main(
    argv: Sequence[str] | None = None,
    *,
    model: Callable[[], nn.Module] | None = None,
    data: Callable[[], UserData] | None = None,
) -> int:
    """Run one rank's part of the job. Return its exit code: 0 done, 75 stopped with a checkpoint, 1 or 2 failed."""
    stop = StopSignal()
    try:
        show_warnings(main=rank_from_environment() == 0)
        with report_once_per_host():
            config = parse(argv)
            config.check_world_size(world_size_from_environment())
        stop.__enter__()  # never left: a signal may come as late as the exit
        from ddp_mnist.trainer import run_attempt  # imports torch

        result = run_attempt(config, model=model, data=data() if data else None, stop=stop)
        return exit_code_for_rank(result.exit_code)
    except JobError as error:
        return report_error(error)
    finally:
        stop.ignore_from_now_on()


if __name__ == "__main__":
    run()
