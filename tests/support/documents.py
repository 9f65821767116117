"""What README.md, CONTRIBUTING.md and docs/ say, taken apart: commands, links, headings, flags, figures.

A block that is indented holds commands and nothing else; a fenced one says in its first line what it is: `python`,
`text` for output, `console` for commands after `$ ` with their output.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS.append(ROOT / "benchmarks" / "README.md")
# What stands in backticks, has more than one word, and begins with one of these, is a command.
PROGRAMS = {
    *(
        "accelerate",
        "export",
        "git",
        "make",
        "pip",
        ".venv/bin/pre-commit",
        "pytest",
        "python",
        "source",
        "tail",
        "torchrun",
    ),
    *("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun", "wandb", ".ci/run", "slurm/sweep.sh"),
}
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SET = re.compile(r"^(\w+=\S* )+")  # variables in front of the program
_COMMENT = re.compile(r"(^|\s+)#.*")


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def blocks(path: Path) -> list[tuple[str, str]]:
    """The fenced ones, as (language, content)."""
    return _FENCED.findall(path.read_text())


@cache
def prose(path: Path) -> str:
    """All but the blocks: paragraphs, headings, tables."""
    return re.sub(r"^    .*$", "", _FENCED.sub("", path.read_text()), flags=re.MULTILINE)


def spans(path: Path) -> list[str]:
    """What stands in backticks, on one line or two."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(path))]


@cache
def commands(path: Path) -> list[str]:
    """Each once, without comments, in one line."""
    joined = re.sub(r"\\\n\s*", "", _FENCED.sub("", path.read_text()))
    found = [_COMMENT.sub("", line).strip() for line in re.findall(r"^    (.*)$", joined, re.MULTILINE)]
    for language, content in blocks(path):
        if language == "console":
            found += [line[2:] for line in content.splitlines() if line.startswith("$ ")]
    found += [span for span in spans(path) if " " in span and _SET.sub("", span).split()[0] in PROGRAMS]
    return [" ".join(command.split()) for command in dict.fromkeys(found) if command]


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(path))


@cache
def anchors(path: Path) -> set[str]:
    """Of the headings, as GitHub names them."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def section(path: Path, heading: str) -> str:
    _, _, rest = path.read_text().partition(f"\n## {heading}\n")
    assert rest, f"{name(path)} has no section {heading}"
    return rest.partition("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    """The cells of its tables, without the rulers and the headings above them."""
    lines = [line.strip() for line in [*text.splitlines(), ""]]
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for number, line in enumerate(lines)
        if line.startswith("|") and not line.startswith("|--") and not lines[number + 1].startswith("|--")
    ]
