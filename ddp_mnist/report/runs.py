"""What runs have written so far, and how they stand beside each other. Reads files alone; imports no torch."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddp_mnist.config import RESUME_FIELDS
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.run import directory

CAUSES = (*RESUME_FIELDS, "recipe", "mixed_precision", "compile", "max_steps")
"""The settings that a result may follow from; what else is set says how a run is run."""


@dataclass(frozen=True)
class RunLog:
    """What a run has written so far."""

    path: Path
    config: dict[str, Any]
    """config.json; {} where there is none."""
    summary: dict[str, Any]
    """summary.json; {} before the run's end."""
    lines: list[dict[str, Any]]
    """metrics.jsonl"""

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def settings(self) -> dict[str, Any]:
        return self.config.get("settings", {})

    @property
    def dataset(self) -> str:
        return str(self.settings.get("dataset") or self.summary.get("dataset") or "unknown data")

    @property
    def step(self) -> int:
        return self.lines[-1]["step"] if self.lines else 0

    @property
    def ended(self) -> bool:
        """False also for a continued run that has gone past the summary of its last attempt."""
        return bool(self.summary) and self.step <= (self.summary.get("steps") or 0)

    @property
    def scored(self) -> dict[str, Any]:
        """The newest test score as a line of metrics.jsonl; {} before the first. A run that --max-steps has stopped
        within an epoch may have told it in the summary alone."""
        scored = (line for line in reversed(self.lines) if line.get("test/accuracy") is not None)
        line: dict[str, Any] = next(scored, {})
        if not self.ended or self.summary.get("test_accuracy") is None or self.summary["steps"] == line.get("step"):
            return line
        names = ("accuracy", "loss", "confusion", "mistakes")
        return {"step": self.summary["steps"]} | {f"test/{name}": self.summary.get(f"test_{name}") for name in names}

    @property
    def result(self) -> dict[str, Any]:
        """The summary, or in its words what is known without it."""
        known = {"test_accuracy": self.scored.get("test/accuracy"), "test_loss": self.scored.get("test/loss")}
        if not self.ended:
            return known | {"steps": self.step}
        return self.summary | {name: value for name, value in known.items() if self.summary.get(name) is None}

    @property
    def state(self) -> str:
        return state(self.summary if self.ended else {}, self.settings)

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """(steps, values) of the lines that have the key, and of the newest test score."""
        scored = self.scored
        lines = self.lines if scored in self.lines else [*self.lines, scored]
        found = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        return [step for step, _ in found], [value for _, value in found]

    @property
    def steps_per_epoch(self) -> int:
        """As config.json has it; where that is lost, or older, those of MNIST, in batches of 64 unless it says."""
        return self.config.get("steps_per_epoch", math.ceil(60_000 / self.settings.get("batch_size", 64)))

    def missing(self) -> list[str]:
        """What cannot be drawn or told yet, and why; a sentence each."""
        found = []
        if not self.settings:
            found.append(f"{directory.CONFIG} is missing or damaged: the settings are not known.")
        if not self.summary:
            found.append(f"There is no {directory.SUMMARY} yet: the run is still going, or was killed.")
        elif not self.ended:
            found.append(f"The run has gone on past its {directory.SUMMARY}, or was killed after it.")
        if not self.series("train/loss")[0]:
            found.append(f"{directory.METRICS} has no loss yet: no curves.")
        if not self.scored:
            found.append("There is no test score before the end of an epoch: no confusion matrix, no mistakes.")
        elif not self.scored.get("test/confusion"):
            found.append(f"{directory.METRICS} has no test/confusion: no confusion matrix.")
        return found


def read_run(path: Path) -> RunLog:
    """Raises: UsageError for a place where no run is; JobError where metrics.jsonl is damaged."""
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise UsageError(f"{path} is {found}; expected a run directory. Name what training was given as --output-dir.")
    config, summary = directory.read_json(path / directory.CONFIG), directory.read_json(path / directory.SUMMARY)
    if not isinstance(config.get("settings"), dict):
        config = {}  # another program's, or damaged
    has_metrics = (path / directory.METRICS).is_file()
    if not config and not has_metrics and "stop_reason" not in summary:
        raise UsageError(
            f"{path} is not a run directory of ddp_mnist: it has neither a {directory.CONFIG} with settings nor a "
            f"{directory.METRICS}. Name what training was given as --output-dir."
        )
    return RunLog(path, config, summary, _read_metrics(path / directory.METRICS) if has_metrics else [])


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise JobError(f"{path} cannot be read: {error.strerror}.") from error
    rows = content.split(b"\n")
    lines = []
    for number, row in enumerate(rows, start=1):
        try:
            line = json.loads(row)
            if not all(isinstance(line[key], int) for key in ("step", "epoch")):
                raise TypeError
        except (ValueError, TypeError, KeyError) as error:
            if number == len(rows):  # empty, or the run is just writing it
                break
            raise JobError(
                f"{path} is damaged: line {number} is {row[:40].decode(errors='replace')!r}, expected a JSON object "
                "with step and epoch. Remove that line to draw the rest."
            ) from error
        lines.append(line)
    return lines


# --- Runs beside each other -------------------------------------------------------------------------------------------


def state(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if not summary:
        return "no summary yet" if settings else "not started"
    return "finished" if summary.get("finished") else f"stopped: {summary.get('stop_reason')}"


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings in which the runs differ. Runs that have not started ({}) do not count."""
    known = [each for each in settings if each]
    names = dict.fromkeys(name for each in known for name in each if name in CAUSES)
    return [name for name in names if len({json.dumps(each.get(name)) for each in known}) > 1]


def comparison(runs: Sequence[tuple[str, dict[str, Any], dict[str, Any], str]]) -> list[list[str]]:
    """The heads and one row for each (name, settings, summary, state): best test accuracy first, none last."""
    names = differing([settings for _, settings, _, _ in runs])
    cells = [["run", "test accuracy", "test loss", "steps", *(name.replace("_", "-") for name in names), "state"]]
    for name, settings, summary, ending in sorted(
        runs, key=lambda run: (run[2].get("test_accuracy") is None, -(run[2].get("test_accuracy") or 0), run[0])
    ):
        accuracy, loss, steps = (summary.get(key) for key in ("test_accuracy", "test_loss", "steps"))
        cells.append(
            [
                name,
                "-" if accuracy is None else f"{accuracy:.2%}",
                "-" if loss is None else f"{loss:.4f}",
                "-" if steps is None else str(steps),
                *(words(settings.get(each)) for each in names),
                ending,
            ]
        )
    return cells


def words(value: Any) -> str:
    """A setting as a user would type it."""
    return " ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)


def labels(runs: Sequence[RunLog]) -> list[str]:
    """Directory names, with the parent's where two are the same."""
    counts = Counter(run.name for run in runs)
    return [run.name if counts[run.name] == 1 else str(Path(*run.path.resolve().parts[-2:])) for run in runs]
