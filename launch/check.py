"""What can be known before a job starts: are the flags good, does the world size fit, are the data files there?

`python -m launch.check --world-size 4 -- --epochs 20` answers in a second, on the login node or in front of the
ranks; exit code 0: yes. Imports no torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from ddp_mnist.config import TrainConfig, parse
from ddp_mnist.errors import JobError, UsageError

OURS = "-m ddp_mnist.train"


def check(flags: Sequence[str], world_size: int, program: str = OURS) -> TrainConfig:
    """The configuration that these training flags give. Raises: JobError; SystemExit 2 (0 after --help), as argparse.

    Data files are unpacked where only the .gz are there, but not downloaded: compute nodes seldom can. `program`: as
    PROGRAM of slurm/train.sh; one of the user's own has the flags of `run`, and mostly data of its own.
    """
    check_program(program)
    config = parse(flags, quiet=False)
    config.check_world_size(world_size)
    if program == OURS and config.dataset not in ("auto", "synthetic"):  # others can be made on the spot
        from ddp_mnist import files  # numpy

        try:
            for split in files.NAMES:
                files.read_split(config.dataset, config.data_dir, split, fetch=False)
        except files.DataError as error:
            words = ["python -m ddp_mnist.data fetch"]
            words += [f"--dataset {config.dataset}"] if config.dataset != "mnist" else []
            words += [f"--data-dir {config.data_dir}"] if config.data_dir != TrainConfig().data_dir else []
            found = next(each for each in files.verify(config.dataset, config.data_dir) if each.status != "ok")
            raise JobError(
                f"the {config.dataset} files are not staged, {found.path} is {found.status}: run "
                f"`{' '.join(words)}` on the login node, compute nodes seldom have internet access."
            ) from error
    return config


def check_program(program: str) -> None:
    """Raises: UsageError where Python could not run it."""
    kind, _, module = program.partition(" ")
    try:
        found = find_spec(module.strip()) is not None if kind == "-m" else Path(program).is_file()
    except (ImportError, ValueError):  # of the package around it; no name at all
        found = False
    if not found:
        raise UsageError(
            f"PROGRAM is {program!r}, which cannot be run in {Path.cwd()}; expected a script that uses ddp_mnist.run, "
            "such as PROGRAM=mine.py, or PROGRAM='-m package.module'. Its flags stand behind slurm/train.sh."
        )


def split_flags(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words before and after the first `--`."""
    words = list(argv)
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at + 1 :]


def main(argv: Sequence[str] | None = None) -> int:
    own, flags = split_flags(sys.argv[1:] if argv is None else argv)
    usage = "%(prog)s [--world-size N] [--program=PROGRAM] -- TRAINING_FLAGS"
    parser = argparse.ArgumentParser(prog="python -m launch.check", usage=usage)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--program", default="", help=f"as PROGRAM of slurm/train.sh; empty: {OURS}")
    options = parser.parse_args(own)
    try:
        check(flags, options.world_size, options.program or OURS)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
