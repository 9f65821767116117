"""Say what a launch will do here: a line for each topic, and where it is not ok, what to type.

Start it as the job would be started, such as `torchrun --nproc-per-node 4 -m ddp_mnist.doctor --dataset mnist`. It
trains nothing and leaves nothing behind; rank 0 prints. Exit code 0: the job would start. 1: it would not. 2: a mistake
in the flags, or in the number of ranks.
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict

from ddp_mnist.config import parse
from ddp_mnist.distributed.launcher import entry_point, from_environment, hard_exit, show_warnings


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank's part of the doctor and return its exit code; rank 0's says whether the job would start."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_mnist.doctor",
        description="Say what a launch will do here. Start the doctor as you would start the job, with its flags.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="seconds to wait for other ranks (3 to 86400)"
    )
    options, flags = parser.parse_known_args(argv)
    show_warnings(main=False)
    # A rank that waits in vain would print 60 lines of C++ frames around its one message.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    config = parse(flags).replace(timeout_minutes=options.timeout / 60)
    config.check_world_size(from_environment("WORLD_SIZE"))
    from ddp_mnist.doctor.checks import examine  # takes seconds: a mistake in the flags comes first

    findings = examine(config)
    code = int(any(each.status == "problem" for each in findings))
    if options.json and findings:
        print(json.dumps({"exit_code": code, "findings": [asdict(each) for each in findings]}, indent=2))
    elif findings:
        print(*findings, f"The job would {'not ' if code else ''}start.", sep="\n")
    return code


if __name__ == "__main__":
    hard_exit(main())
