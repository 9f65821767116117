"""The result of a sweep: one row per run, best first, with the settings in which the runs differ.

    python -m launch.table runs/slurm-123_*

Reads only what the runs wrote. Runs that are not finished are listed too, with the state they are in.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddp_mnist.rundir import read_json

HIDDEN = ("output_dir", "data_dir", "threads", "wandb", "progress", "log_every")
"""Settings that are no result's cause."""


def rows(run_dirs: Sequence[Path]) -> list[dict[str, Any]]:
    """Best test accuracy first; runs without one last."""
    found = []
    for path in run_dirs:
        summary, settings = read_json(path / "summary.json"), read_json(path / "config.json").get("settings", {})
        found.append({"run": path.name, "settings": settings, "state": _state(summary, settings), **_scores(summary)})
    return sorted(found, key=lambda row: (row["accuracy"] is None, -(row["accuracy"] or 0), row["run"]))


def table(run_dirs: Sequence[Path]) -> str:
    found = rows(run_dirs)
    known = [row["settings"] for row in found if row["settings"]]
    names = dict.fromkeys(name for settings in known for name in settings if name not in HIDDEN)
    differing = [name for name in names if len({json.dumps(settings.get(name)) for settings in known}) > 1]
    head = ["run", "test accuracy", "test loss", "steps", *(name.replace("_", "-") for name in differing), "state"]
    cells = [head]
    for row in found:
        cells.append(
            [
                row["run"],
                "-" if row["accuracy"] is None else f"{row['accuracy']:.2%}",
                "-" if row["loss"] is None else f"{row['loss']:.4f}",
                "-" if row["steps"] is None else str(row["steps"]),
                *(_words(row["settings"].get(name)) for name in differing),
                row["state"],
            ]
        )
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells)
    return "\n".join(lines)


def _scores(summary: dict[str, Any]) -> dict[str, Any]:
    return {
        "accuracy": summary.get("test_accuracy"),
        "loss": summary.get("test_loss"),
        "steps": summary.get("steps"),
    }


def _state(summary: dict[str, Any], settings: dict[str, Any]) -> str:
    if not summary:
        return "no summary yet" if settings else "not started"
    return "finished" if summary.get("finished") else f"stopped: {summary.get('stop_reason')}"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)


def main(argv: Sequence[str] | None = None) -> int:
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
