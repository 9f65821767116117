"""The command that stages data files for nodes without internet: `python -m ddp_mnist.data fetch|verify`."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from ddp_mnist.config import default_data_dir
from ddp_mnist.data import mnist
from ddp_mnist.distributed.launcher import entry_point


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0 when all four files are good, 1 when one is bad or could not be fetched."""
    parser = argparse.ArgumentParser(
        prog="python -m ddp_mnist.data",
        description="fetch: download data files that are missing or damaged. verify: check them, change nothing.",
    )
    parser.add_argument("command", choices=["fetch", "verify"])
    parser.add_argument("--dataset", choices=sorted(mnist.FOLDERS), default="mnist")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="default: $DDP_MNIST_DATA, else data")
    parser.add_argument("--timeout", type=float, default=30.0, metavar="S", help="seconds to wait for a server")
    options = parser.parse_args(argv)
    if not 0 < options.timeout < float("inf"):
        parser.error(f"--timeout is {options.timeout}; expected seconds above 0")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    root = options.data_dir or default_data_dir()
    if options.command == "fetch":
        for split in mnist.NAMES:
            mnist.read_split(options.dataset, root, split, timeout=options.timeout)
    states = mnist.verify(options.dataset, root)
    for path, state in states.items():
        print(f"{path}: {state}")
    return int(any(state != "ok" for state in states.values()))


if __name__ == "__main__":
    sys.exit(main())
