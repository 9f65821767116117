"""Take README.md, CONTRIBUTING.md and docs/ apart: commands, links, headings, tables.

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
    *("accelerate", "export", "git", "make", "pip", ".venv/bin/pre-commit", "pytest", "python", "source", "tail"),
    *("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun", "torchrun", "wandb", ".ci/run", "slurm/sweep.sh"),
}
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SET = re.compile(r"^(\w+=\S* )+")  # variables in front of the program


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str = r"\w*") -> list[tuple[str, str]]:
    """Return the fenced blocks as (language, content), or those of one language."""
    return [block for block in _FENCED.findall(path.read_text()) if re.fullmatch(language, block[0])]


@cache
def prose(path: Path) -> str:
    """Return all but the blocks: paragraphs, headings, tables."""
    return re.sub(r"^    .*$", "", _FENCED.sub("", path.read_text()), flags=re.MULTILINE)


def spans(path: Path) -> list[str]:
    """Return what stands in backticks, on one line or two."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(path))]


@cache
def commands(path: Path) -> list[str]:
    """Return each command once, without comments, in one line."""
    joined = re.sub(r"\\\n\s*", "", _FENCED.sub("", path.read_text()))
    found = [re.sub(r"(^|\s+)#.*", "", line) for line in re.findall(r"^    (.*)$", joined, re.MULTILINE)]
    for _, content in blocks(path, "console"):
        found += re.findall(r"^\$ (.*)", content, re.MULTILINE)
    found += [span for span in spans(path) if " " in span and _SET.sub("", span).split()[0] in PROGRAMS]
    return [" ".join(command.split()) for command in dict.fromkeys(found) if command.strip()]


def links(path: Path) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(path))


def anchors(path: Path) -> set[str]:
    """Return the names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.*)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(text: str) -> list[list[str]]:
    """Return the cells of the tables, row by row, without the rulers."""
    lines = [line.strip() for line in text.splitlines()]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if re.match(r"\|(?! ?---)", line)]


def section_rows(path: Path, heading: str) -> list[list[str]]:
    """Return the rows of a section's table, without its headings."""
    _, _, rest = path.read_text().partition(f"\n## {heading}\n")
    return rows(rest.partition("\n## ")[0])[1:]
