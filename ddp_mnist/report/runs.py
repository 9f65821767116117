"""Read and compare what runs have written so far: from files alone, without torch."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_mnist.config import RESUME_FIELDS
from ddp_mnist.errors import JobError
from ddp_mnist.storage.directory import CONFIG, METRICS, SUMMARY, format_setting, read_json

# The settings that a result may follow from; the others say how a run is run.
CAUSES = (*RESUME_FIELDS, "recipe", "mixed_precision", "compile", "max_steps")


@dataclass(frozen=True)
class RunLog:
    """Hold what the files of one run say so far."""

    path: Path
    config: dict[str, Any]  # {}, as also the other dictionaries, where there is nothing yet
    settings: dict[str, Any]
    dataset: str
    summary: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl, and the last test score where summary.json alone has it
    step: int | None  # the newest that is known
    score: dict[str, Any]  # the line with the newest test score

    @property
    def state(self) -> str:
        """Return how the run has ended, or that this is not known."""
        if self.summary:
            return "finished" if self.summary.get("finished") else f"stopped: {self.summary.get('stop_reason')}"
        return "no summary yet" if self.settings or self.lines else "not started"

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Return the steps and values of the lines that have the key."""
        lines = [line for line in self.lines if line.get(key) is not None]
        return [line["step"] for line in lines], [line[key] for line in lines]


def read_runs(paths: Sequence[Path]) -> list[RunLog]:
    """Read one run, or several, of which some may not have started; the best score first. Raises: JobError."""
    runs = [_read_run(path) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        if not path.is_dir() or (len(runs) == 1 and run.state == "not started"):
            raise JobError(f"{path} is not a run directory of ddp_mnist. Name what training was given as --output-dir.")

    def order(run: RunLog) -> tuple[float, float]:
        accuracy, loss = run.score.get("test/accuracy"), run.score.get("test/loss")
        return -(accuracy or 0), math.inf if loss is None else loss

    return sorted(runs, key=order)


def _read_run(path: Path) -> RunLog:
    config, summary, lines = read_json(path / CONFIG), read_json(path / SUMMARY), _read_metrics(path / METRICS)
    settings = config.get("settings", {})
    step = summary.get("steps", lines[-1]["step"] if lines else None)
    score: dict[str, Any] = next((line for line in reversed(lines) if "test/loss" in line), {})
    if summary.get("test_loss") is not None and score.get("step") != step:  # --max-steps within an epoch
        score = {name.replace("_", "/", 1): value for name, value in summary.items() if name.startswith("test_")}
        score["step"] = step
        lines.append(score)
    return RunLog(path, config, settings, settings.get("dataset", "unknown data"), summary, lines, step, score)


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    try:
        for row in path.read_bytes().split(b"\n")[:-1]:  # what follows the last line's end is half written
            line = json.loads(row)
            lines.append(line | {"step": int(line["step"])})
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise JobError(f"{path}: line {len(lines) + 1} is damaged or cannot be read: {error}.") from error
    return lines


def comparison(runs: Sequence[RunLog]) -> list[list[str]]:
    """Return the heads and a row for each run, with a column for each setting of CAUSES in which the runs differ."""
    known = [run.settings for run in runs if run.settings]
    names = [name for name in CAUSES if len({json.dumps(each.get(name)) for each in known}) > 1]
    rows = [["run", "test accuracy", "test loss", "steps", *(name.replace("_", "-") for name in names), "state"]]
    for run in runs:
        accuracy, loss = run.score.get("test/accuracy"), run.score.get("test/loss")
        scores = ["-" if accuracy is None else f"{accuracy:.2%}", "-" if loss is None else f"{loss:.4f}"]
        settings = map(format_setting, [run.step, *map(run.settings.get, names)])
        rows.append([str(run.path), *scores, *settings, run.state])
    return rows


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
