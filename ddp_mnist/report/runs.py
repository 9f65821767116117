"""Read and compare what runs have written so far: from files alone, without torch."""

import json
import math
from collections import Counter
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
    """The files of one run; {} or [] where there is nothing yet."""

    path: Path
    name: str
    config: dict[str, Any]
    settings: dict[str, Any]
    dataset: str
    summary: dict[str, Any]
    lines: list[dict[str, Any]]  # of metrics.jsonl, and the last test score where summary.json alone has it

    @property
    def step(self) -> int | None:
        """Return the newest step that is known."""
        return self.summary.get("steps", self.lines[-1]["step"] if self.lines else None)

    @property
    def score(self) -> dict[str, Any]:
        """Return the line with the newest test score; {} before the first."""
        return next((line for line in reversed(self.lines) if "test/loss" in line), {})

    @property
    def state(self) -> str:
        """Return how the run has ended, or that this is not known."""
        if self.summary:
            return "finished" if self.summary.get("finished") else f"stopped: {self.summary.get('stop_reason')}"
        return "no summary yet" if self.config or self.lines else "not started"

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
    runs.sort(key=lambda run: (run.score.get("test/loss") or math.inf, run.name))  # where there is no accuracy
    return sorted(runs, key=lambda run: -(run.score.get("test/accuracy") or 0))


def _read_run(path: Path) -> RunLog:
    config, summary, lines = read_json(path / CONFIG), read_json(path / SUMMARY), _read_metrics(path / METRICS)
    settings = config.get("settings")
    if not isinstance(settings, dict):  # another program's, or damaged
        config, settings = {}, {}
    dataset = settings.get("dataset") or summary.get("dataset") or "unknown data"
    run = RunLog(path, path.resolve().name, config, settings, dataset, summary, lines)
    if summary.get("test_loss") is not None and run.score.get("step") != run.step:  # --max-steps within an epoch
        score = {name.replace("_", "/", 1): value for name, value in summary.items() if name.startswith("test_")}
        lines.append({"step": run.step} | score)
    return run


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    try:
        for row in path.read_bytes().split(b"\n")[:-1]:  # what follows the last line's end is half written
            line = json.loads(row)
            lines.append(line | {"step": int(line["step"])})
    except OSError as error:
        if path.exists():
            raise JobError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise JobError(f"{path} is damaged: line {len(lines) + 1} is not a JSON object with step.") from error
    return lines


def comparison(runs: Sequence[RunLog]) -> list[list[str]]:
    """Return the heads and a row for each run, with a column for each setting of CAUSES in which the runs differ."""
    known = [run.settings for run in runs if run.settings]
    names = [name for name in CAUSES if len({json.dumps(each.get(name)) for each in known}) > 1]
    rows = [["run", "test accuracy", "test loss", "steps", *(name.replace("_", "-") for name in names), "state"]]
    counts = Counter(run.name for run in runs)
    for run in runs:
        label = run.name if counts[run.name] == 1 else str(run.path)
        accuracy, loss = run.score.get("test/accuracy"), run.score.get("test/loss")
        scores = ["-" if accuracy is None else f"{accuracy:.2%}", "-" if loss is None else f"{loss:.4f}"]
        rows.append([label, *scores, *map(format_setting, [run.step, *map(run.settings.get, names)]), run.state])
    return rows


def format_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
