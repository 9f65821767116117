"""The result of a sweep: one row per run, best first, with the settings in which the runs differ.

    python -m launch.table runs/slurm-123_*

Reads only what the runs wrote. Runs that are not finished are listed too, with the state they are in.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ddp_mnist.distributed.launcher import escape_unencodable_output
from ddp_mnist.report.runs import comparison, state
from ddp_mnist.run.directory import CONFIG, SUMMARY, read_json


def table(run_dirs: Sequence[Path]) -> str:
    runs = []
    for path in run_dirs:
        settings = read_json(path / CONFIG).get("settings", {})
        summary = read_json(path / SUMMARY)
        runs.append((path.name, settings, summary, state(summary, settings)))
    cells = comparison(runs)
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    escape_unencodable_output()
    parser = argparse.ArgumentParser(prog="python -m launch.table", description="One row per run, best first.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    run_dirs = parser.parse_args(argv).run_dirs
    if absent := [str(path) for path in run_dirs if not path.is_dir()]:
        print(f"error: no run directory {', '.join(absent)}; the job may not have started yet", file=sys.stderr)
        return 2
    print(table(run_dirs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
