"""The entry point: flags → job → exit code. `trainer.py` has the loop.

Flags are parsed before torch is imported, so that `--help` is instant and a wrong flag fails at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from ddp_mnist.config import parse
from ddp_mnist.distributed.launcher import (
    entry_point,
    hard_exit,
    limit_spinning,
    rank_from_environment,
    report_once_per_host,
    show_warnings,
    world_size_from_environment,
)
from ddp_mnist.distributed.preemption import StopSignal

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

    Like `fit`, but `data` is a function that makes the pair; it is called after the flags were checked.
    """
    hard_exit(main(argv, model=model, data=data))


@entry_point
def main(
    argv: Sequence[str] | None = None,
    *,
    model: Callable[[], nn.Module] | None = None,
    data: Callable[[], UserData] | None = None,
) -> int:
    """Run one rank's part of the job. Return its exit code: 0 done, 75 stopped with a checkpoint, 1 or 2 failed."""
    show_warnings(main=rank_from_environment() == 0)
    limit_spinning()
    with report_once_per_host():
        config = parse(argv)
        config.check_world_size(world_size_from_environment())
    with StopSignal(ignore_afterwards=True) as stop:
        from ddp_mnist.trainer import run_attempt  # imports torch

        return run_attempt(config, model=model, data=data() if data else None, stop=stop).exit_code


if __name__ == "__main__":
    run()
