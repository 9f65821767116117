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

from ddp_mnist.run.provenance import facts


def line(what: str, unit: str, ours: Any, theirs: Any = ("", ()), target: str = "", note: str = "") -> dict[str, Any]:
    """Return one line of the table, as JSON types. `ours`: the figures, in the order of the turns.

    `theirs`: a baseline's name and figures. The ratio is that of the medians; its least and most are over the single
    turns. `target` is for the ratio, or for our median where there is no baseline: ">= 2.5".
    """
    baseline, others = theirs
    sides = {"ours": _statistics(ours), "theirs": _statistics(others)}
    ratio = _statistics([a / b for a, b in zip(ours, others, strict=False)])
    if ratio["n"]:
        ratio["median"] = sides["ours"]["median"] / sides["theirs"]["median"]
    value, met = (ratio if baseline else sides["ours"])["median"], None
    if target and value is not None:
        sign, limit = target.split()
        met = value >= float(limit) if sign == ">=" else value <= float(limit)
    described = {"what": what, "unit": unit, "baseline": baseline, "target": target, "met": met, "note": note}
    return described | sides | {"ratio": ratio}


def _statistics(values: list[float]) -> dict[str, Any]:
    middle = statistics.median(values) if values else None
    found = {"n": len(values), "median": middle, "min": min(values, default=None), "max": max(values, default=None)}
    return found | {"values": [float(f"{value:.6g}") for value in values]}


def machine() -> dict[str, Any]:
    """Return device, CPU, date, load average, versions and commit."""
    cpuinfo = Path("/proc/cpuinfo")  # platform.processor() is empty on many Linuxes
    names = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    cores, found = len(os.sched_getaffinity(0)), facts(1)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {cores} cores",
        "cpu": f"{names[0] if names else platform.machine()}, {cores} cores",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "load_average": round(os.getloadavg()[0], 2),
        "versions": found["versions"],
        "git": found["git"],
    }


def table(report: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    found, quick = report["machine"], report["quick"]
    versions, git = found["versions"], found["git"]
    commit = f", commit {git['commit'][:12]}{' and changes' if git['dirty'] else ''}" if git else ""
    text = (
        f"{found['device']} ({found['cpu']}), torch {versions['torch']}, accelerate {versions['accelerate']}{commit}, "
        f"{found['date']}, load average {found['load_average']} at the start. {report['images']:,} training images of "
        f"{report['dataset']}. Median (min-max; n), the sides in turn."
    )
    text += " --quick: so few images and turns show that it works, and judge no target." if quick else ""
    rows = [["row", "what", "unit", "ours", "baseline", "its figure", "ours / baseline", "target", "note"], ["---"] * 9]
    for row, lines in report["rows"].items():
        for each in lines:
            figures = _show(each["ours"]), each["baseline"], _show(each["theirs"]), _show(each["ratio"])
            verdict = {True: ": met", False: ": MISSED", None: ""}[None if quick else each["met"]]
            rows.append([row, each["what"], each["unit"], *figures, each["target"] + verdict, each["note"]])
    text += "\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return text + "".join(f"\n\nNot measured: {row}: {reason}" for row, reason in report["skipped"].items())


def _show(figures: dict[str, Any]) -> str:
    if not figures["n"]:
        return ""
    values = figures["median"], figures["min"], figures["max"]
    middle, least, most = (f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" for value in values)
    return f"{middle} ({least}-{most}; {figures['n']})"


def write(path: Path, report: dict[str, Any]) -> None:
    """Write the JSON, and the table beside it; in a folder, with a name of device and time."""
    if path.is_dir():
        named = f"{report['machine']['device']} {report['machine']['date']}"
        path /= re.sub(r"[^a-z0-9]+", "-", named.lower()) + ".json"
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")
    path.with_suffix(".md").write_text(table(report) + "\n")
