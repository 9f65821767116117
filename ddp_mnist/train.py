"""The entry point: flags → job → exit code. `trainer.py` has the loop.

Flags are parsed before torch is imported, so `--help` is instant and a wrong flag fails at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from ddp_mnist.config import parse
from ddp_mnist.errors import JobError
from ddp_mnist.mirror import Mirror
from ddp_mnist.preemption import StopSignal
from ddp_mnist.process import (
    code_of,
    each_machine_tells,
    imports,
    leave,
    rank_from_environment,
    show_warnings,
    tell,
    world_size_from_environment,
)

if TYPE_CHECKING:
    from torch import nn

    from ddp_mnist.data import Pair


def run(
    *,
    model: Callable[[], nn.Module] | None = None,
    data: Callable[[], Pair] | None = None,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """The whole command, flags, messages and exit codes included, for a network and data of the caller's own.

    As `fit`, but `data` is a function that makes the pair, called when the flags are known to be right.
    """
    leave(main(argv, model=model, data=data))


def main(
    argv: Sequence[str] | None = None,
    *,
    model: Callable[[], nn.Module] | None = None,
    data: Callable[[], Pair] | None = None,
) -> int:
    """Run one rank's part of the job; returns its exit code: 0 done, 75 stopped with a checkpoint, 1 or 2 failed."""
    stop = StopSignal()
    try:
        show_warnings(main=rank_from_environment() == 0)
        with each_machine_tells():
            config = parse(argv)
            config.check_world(world_size_from_environment())
        stop.__enter__()  # for good: a signal may come as late as the exit
        with contextlib.ExitStack() as meanwhile:
            mirror = meanwhile.enter_context(Mirror(config, is_main=rank_from_environment() == 0))  # imports wandb
            if data is None:
                from ddp_mnist.files import read_early

                meanwhile.enter_context(read_early(config.dataset, config.data_dir))
            with imports():
                from ddp_mnist.trainer import attempt  # imports torch

            pair = data() if data else None
            result = attempt(config, model=model, data=pair, stop=stop, mirror=mirror)
        return code_of(result.exit_code)
    except JobError as error:
        return tell(error)
    finally:
        stop.ignore_from_now_on()


if __name__ == "__main__":
    run()
