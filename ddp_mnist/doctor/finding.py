"""What the doctor finds, and how it says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

TOPICS = ("packages", "launch", "batch", "device", "precision", "cpu", "data", "output", "wandb", "slurm", "ranks")

Status = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing the doctor has looked at, in a line."""

    status: Status
    """problem: the job would not start."""
    topic: str
    text: str
    advice: str = ""
    """What to type or to change."""


def in_order(findings: Sequence[Finding]) -> list[Finding]:
    return sorted(findings, key=lambda each: TOPICS.index(each.topic))


def as_text(findings: Sequence[Finding]) -> str:
    lines = []
    for each in findings:
        lines.append(f"{each.status:8} {each.topic:9}  {each.text}")
        if each.advice:
            lines.append(f"{'':20}-> {each.advice}")
    problems = sum(each.status == "problem" for each in findings)
    warned = sum(each.status == "warning" for each in findings)
    extra = f", {count(warned, 'warning')}" if warned else ""
    verdict = f"would not start: {count(problems, 'problem')}" if problems else "would start"
    return "\n".join([*lines, f"The job {verdict}{extra}."])


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def number(env: Mapping[str, str], *names: str, default: int) -> int:
    """The first of these variables that holds a whole number."""
    return next((int(env[name]) for name in names if env.get(name, "").isdecimal()), default)
