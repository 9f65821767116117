"""The entry point: flags → job → exit code. `trainer.py` has the loop.

Flags are parsed before torch is imported, so `--help` is instant and a wrong flag fails at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ddp_mnist.config import parse, rank_from_environment, world_size_from_environment
from ddp_mnist.errors import JobError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one rank's part of the job; returns its exit code (0, 1, 2 or 75)."""
    try:
        config = parse(argv)
        config.check_world(world_size_from_environment())
        from ddp_mnist.trainer import fit  # imports torch

        return fit(config)["exit_code"]
    except JobError as error:
        # Every rank raises the same error, one tells it; except where the others cannot know.
        if rank_from_environment() == 0 or error.local:
            print(f"error: {error}", file=sys.stderr, flush=True)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
