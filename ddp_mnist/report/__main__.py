"""The command that draws runs and compares them: `python -m ddp_mnist.report RUN_DIR ...`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ddp_mnist.distributed.launcher import entry_point
from ddp_mnist.report.page import draw
from ddp_mnist.report.runs import comparison, format_table, read_runs


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ddp_mnist.report", description="Draw one run, or compare several.")
    add = parser.add_argument
    add("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    add("--output", type=Path, metavar="DIR", help="where to write (default: the one run's directory, else report/)")
    add("--data-dir", type=Path, metavar="DIR", help="test images (default: the run's, else $DDP_MNIST_DATA)")
    add("--table", action="store_true", help="only print a table: one row per run, best test accuracy first")
    options = parser.parse_args(argv)
    if options.table:
        lines = format_table(comparison(read_runs(options.run_dirs)))
    else:
        lines = draw(options.run_dirs, output=options.output, data_dir=options.data_dir)
    print(*lines, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
