"""Check flags, world size and data files before a job starts, in a second and without torch.

    python -m launch.check --world-size 4 -- --epochs 20

slurm/train.sh runs it in front of the ranks, slurm/sweep.sh and launch.submit on the login node. Exit code 0: all good.
"""

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ddp_mnist.config import TrainConfig, parse
from ddp_mnist.distributed.launcher import entry_point
from ddp_mnist.errors import JobError, UsageError

OURS = "-m ddp_mnist.train"


def check(flags: Sequence[str], world_size: int, program: str = OURS) -> TrainConfig:
    """Return the configuration that these training flags give; a `program` of the user's own has data of its own.

    Raises JobError: the job would fail; SystemExit: a flag is wrong (2), or it is --help (0). Data files are verified,
    not downloaded.
    """
    module = program.removeprefix("-m ")
    if not (Path(program).is_file() if module == program else find_spec(module.partition(".")[0])):
        raise UsageError(
            f"PROGRAM is {program!r}, which cannot be run in {Path.cwd()}; expected a script that uses ddp_mnist.run, "
            "such as PROGRAM=mine.py, or PROGRAM='-m package.module'. Its flags stand behind slurm/train.sh."
        )
    config = parse(flags)
    config.check_world_size(world_size)
    if program == OURS and config.dataset not in ("auto", "synthetic"):  # which can be generated on the spot
        from ddp_mnist.data import mnist  # imports numpy

        try:
            for split in mnist.NAMES:
                mnist.read_split(config.dataset, config.data_dir, split, fetch=False)
        except JobError as error:
            text = f"the {config.dataset} files are not staged, which is for the login node. {error}"
            raise JobError(text) from error
    return config


@entry_point
def main() -> int:
    """Run the command. Return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m launch.check", usage="%(prog)s [options] -- TRAINING_FLAGS")
    parser.add_argument("--world-size", type=int, default=1, help="number of ranks (default: 1)")
    parser.add_argument("--program", default="", help=f"the value of PROGRAM for slurm/train.sh; default: {OURS}")
    parser.add_argument("flags", nargs="*", help="training flags, see python -m ddp_mnist.train --help")
    given = parser.parse_args()
    check(given.flags, given.world_size, given.program or OURS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
