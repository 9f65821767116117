"""The entry point: flags → job → exit code. `trainer.py` has the loop.

Flags are parsed before torch is imported, so `--help` is instant and a wrong flag fails at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from ddp_mnist.config import parse, rank_from_environment, world_size_from_environment
from ddp_mnist.errors import JobError
from ddp_mnist.preemption import StopSignal


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank's part of the job; returns its exit code: 0 done, 75 stopped with a checkpoint, 1 or 2 failed."""
    rank = rank_from_environment()
    logging.basicConfig(level=logging.WARNING if rank == 0 else logging.ERROR, format="warning: %(message)s")
    stop = StopSignal()
    try:
        config = parse(argv)
        config.check_world(world_size_from_environment())
        stop.__enter__()  # for good: a signal may come as late as the exit
        from ddp_mnist.trainer import fit  # imports torch

        code = fit(config, stop)["exit_code"]
        # srun --kill-on-bad-exit ends the others with the first rank that fails, so one alone tells the news.
        return code if rank == 0 else 0
    except JobError as error:
        # Every rank raises the same error, one tells it; except where the others cannot know.
        # Asked again: where mpirun has started them, only Accelerate has learned which rank this is.
        if rank_from_environment() == 0 or error.local:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    finally:
        stop.ignore_from_now_on()


def leave(code: int) -> NoReturn:
    """End the process without taking Python down, which gloo's threads do not survive.

    They outlive the process group that DDP has used, and one that lets go of a tensor while Python ends aborts the
    process (pytorch#179291, #190489): exit code 134 after a good run, in 7 of 25 runs of 4 ranks on a busy machine.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(code)


if __name__ == "__main__":
    leave(main())
