"""Say what a launch will do here: a line for each topic, and where it is not ok, what to type.

    python -m ddp_mnist.doctor [training flags]
    torchrun --nproc-per-node 4 -m ddp_mnist.doctor --dataset mnist

Start it as the job would be started. It trains nothing and leaves nothing behind; rank 0 prints. Exit code 0: the job
would start. 1: it would not. 2: a mistake in the flags.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from ddp_mnist.distributed.launcher import check_environment, entry_point, hard_exit, is_first_on_its_machine
from ddp_mnist.errors import JobError, UsageError


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank's part of the doctor and return its exit code. Rank 0 alone reports problems, with code 1."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_mnist.doctor",
        description="What will a launch do here? Start it as the job would be started.",
        epilog="All flags of python -m ddp_mnist.train are taken too, and judged as the job would judge them.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="wait so long for the other ranks")
    options, flags = parser.parse_known_args(argv)
    logging.basicConfig(level=logging.ERROR, format="warning: %(message)s")
    # A rank that waits in vain would print 60 lines of C++ frames around its one message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    if not 3 <= options.timeout <= 86_400:
        raise UsageError(f"--timeout is {options.timeout:g}; expected seconds from 3 to 86400.")
    check_environment()
    try:
        from ddp_mnist.config import parse

        config = parse(flags).replace(timeout_minutes=options.timeout / 60)
        from ddp_mnist.doctor.checks import examine  # takes seconds: a mistake in the flags comes first
    except (ImportError, OSError) as error:
        text = f"{sys.executable} cannot import the job: {error}. Type make install, and then python -m pip check."
        raise JobError(text, local=is_first_on_its_machine()) from error
    findings = examine(config, is_main=is_main())
    if not is_main():
        return 0
    code = int(any(each.status == "problem" for each in findings))
    if options.json:
        print(json.dumps({"exit_code": code, "findings": [asdict(each) for each in findings]}, indent=2))
    else:
        print(*findings, f"The job would {'not ' if code else ''}start.", sep="\n")
    return code


def is_main() -> bool:
    """Return True on rank 0, also where a launcher that is not ours sets no RANK."""
    names = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"


if __name__ == "__main__":
    hard_exit(main())
