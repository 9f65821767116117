"""The figures of the benchmark: their machine, JSON and the Markdown table."""

import json
import os
import platform
import re
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from ddp_mnist.distributed.machine import allowed_cpus
from ddp_mnist.storage.metrics import provenance


def line(what: str, unit: str, ours: Any, theirs: Any = ("", []), target: str = "", note: str = "") -> dict[str, Any]:
    """Return one line of the table, as JSON types. `ours`: the figures, in the order of the turns.

    `theirs`: a baseline's name and figures. The ratio is that of the medians; `ratios` has those of the single turns.
    `target` is for the ratio, or for our median where there is no baseline: ">= 2.5".
    """
    baseline, others = theirs
    sides = [statistics.median(each) for each in (ours, others) if each]
    ratio = sides[0] / sides[1] if len(sides) == 2 else None
    value, met = (ratio if baseline else sides[0]), None
    if target and value is not None:
        sign, limit = target.split()
        met = value >= float(limit) if sign == ">=" else value <= float(limit)
    ratios = [a / b for a, b in zip(ours, others, strict=False)]
    figures = {"ours": ours, "baseline": baseline, "theirs": others, "ratio": ratio, "ratios": ratios}
    return {"what": what, "unit": unit, **figures, "target": target, "met": met, "note": note}


def machine() -> dict[str, Any]:
    """Return versions, commit, device, date and load average."""
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on many Linuxes
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cpu = f"CPU, {len(allowed_cpus())} cores of {names[0] if names else platform.machine()}"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    found = {name: value for name, value in provenance(1).items() if name != "launch"}
    return found | {"device": device, "date": time.strftime("%Y-%m-%d %H:%M"), "load_average": os.getloadavg()[0]}


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    found, quick = report["machine"], report["quick"]
    versions, git = found["versions"], found["git"]
    commit = f", commit {git['commit'][:12]}{' and changes' if git['dirty'] else ''}" if git else ""
    text = (
        f"{found['device']}, torch {versions['torch']}, accelerate {versions['accelerate']}{commit}, "
        f"{found['date']}, load average {found['load_average']:.2f} at the start. {report['images']:,} training images "
        f"of {report['dataset']}. Median (min-max; n), the sides in turn."
    )
    text += " --quick: so few images and turns show that it works, and judge no target." if quick else ""
    rows = [["row", "what", "unit", "ours", "baseline", "its figure", "ours / baseline", "target", "note"], ["---"] * 9]
    for row, lines in report["rows"].items():
        for each in lines:
            figures = _show(each["ours"]), each["baseline"], _show(each["theirs"]), _show(each["ratios"], each["ratio"])
            verdict = {True: ": met", False: ": MISSED", None: ""}[None if quick else each["met"]]
            rows.append([row, each["what"], each["unit"], *figures, each["target"] + verdict, each["note"]])
    return text + "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _show(figures: list[float], middle: float | None = None) -> str:
    if not figures:
        return ""
    values = middle or statistics.median(figures), min(figures), max(figures)
    median, least, most = (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values)
    return f"{median} ({least}-{most}; {len(figures)})"


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the JSON, and the table beside it; in a folder, with a name of device and time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        named = f"{report['machine']['device']} {report['machine']['date']}"
        path /= re.sub(r"[^a-z0-9]+", "-", named.lower()) + ".json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    path.with_suffix(".md").write_text(table(report) + "\n")
