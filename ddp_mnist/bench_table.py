"""The benchmark's files and their table, in Markdown that is also readable as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddp_mnist.errors import JobError

MOST = 60_000
"""Images: all of MNIST."""
NOT_MEASURED = "not measured"


def read_report(path: Path) -> dict[str, Any]:
    """A file that --json has written. Raises: JobError."""
    try:
        report = json.loads(path.read_text())
        if not (isinstance(report, dict) and {"machine", "data", "rows", "scaling"} <= report.keys()):
            raise ValueError("it lacks machine, data, rows or scaling")
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise JobError(f"--table {path} is not what `--json` writes: {why}.") from error
    return report


def table(reports: Sequence[dict[str, Any]]) -> str:
    """Markdown: a block of facts, one line for each quantity with three columns for each report, the estimates.

    Without a report from a GPU a last column says that it was not measured.
    """
    lines = [_facts(report) for report in reports]
    names = [device(report) for report in reports]
    header = ["what", "unit", "against"]
    for name in names:
        header += [f"ours, {name}", "other", "ours / other"]
    on_gpu = any(report["machine"]["gpu"] for report in reports)
    rows = [[*header, *([] if on_gpu else ["GPU"])]]
    quantities = {(row["what"], row["unit"], row["against"]): None for report in reports for row in report["rows"]}
    for key in quantities:
        cells = [key[0], key[1], key[2] or ""]
        for report in reports:
            row = next((row for row in report["rows"] if (row["what"], row["unit"], row["against"]) == key), None)
            cells += _cells(row) if row else [NOT_MEASURED, "", ""]
        rows.append(cells if on_gpu else [*cells, NOT_MEASURED])
    if quantities:
        lines += ["", *_markdown(rows)]
    for report, name in zip(reports, names, strict=True):
        if report["scaling"]:
            lines += ["", *_estimate(report["scaling"], name)]
    return "\n".join(lines)


def device(report: dict[str, Any]) -> str:
    """What it was measured on, in words."""
    return report["machine"]["gpu"] or f"CPU, {report['machine']['cores']} cores"


def _facts(report: dict[str, Any]) -> str:
    machine, data, settings = report["machine"], report["data"], report["settings"]
    digits = {"mnist": "MNIST", "synthetic": "generated digits, NOT MNIST"}[data["name"]]
    if data["train_images"] < MOST:
        digits = f"a slice of {digits}: accuracies and ratios are not those of the whole"
    commit = (machine["git"] or {}).get("commit", "no checkout")[:12] + (
        " + changes" if (machine["git"] or {}).get("dirty") else ""
    )
    versions = machine["versions"]
    return (
        f"{device(report)} ({machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads), "
        f"torch {versions['torch']}, accelerate {versions['accelerate']}, commit {commit}, {machine['date']}, "
        f"load average {machine['load_average'][0]} at the start. {data['train_images']:,} training and "
        f"{data['test_images']:,} test images of {digits}. Median (min-max) of {settings['repeats']} in turn, of more "
        "where times vary by more; "
        f"mean ± sd where it says ±, over {settings['seeds']} seeds to 99 %."
        + (f" Stopped before {', '.join(report['missing'])}." if report.get("missing") else "")
    )


def _cells(row: dict[str, Any]) -> list[str]:
    """ours, other, ratio"""
    sides = [_side(row[side], row["shown"], row["unit"]) if row[side] else "" for side in ("ours", "other")]
    if row["ratio"] is None or row["unit"] == "%":
        return [*sides, ""]
    spread = f" ({_number(row['ratio_min'])}-{_number(row['ratio_max'])})" if row["ours"]["n"] > 1 else ""
    return [*sides, f"{_number(row['ratio'])}{spread}"]


def _side(figures: dict[str, Any], shown: str, unit: str) -> str:
    show = (lambda value: f"{value:.2f}") if unit == "%" else _number
    if figures["n"] == 1:
        return show(figures[shown])
    if shown == "mean":
        return f"{show(figures['mean'])} ± {show(figures['sd'])}"
    return f"{show(figures['median'])} ({show(figures['min'])}-{show(figures['max'])})"


def _number(value: float) -> str:
    """Three digits, four where they are whole."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _estimate(scaling: dict[str, Any], name: str) -> list[str]:
    exchange = scaling["all_reduce"]
    lines = [
        f"Scaling, an ESTIMATE, not a measurement, from {name}: {scaling['how']}. Measured: an all-reduce of "
        f"{exchange['bytes']:,} bytes over {exchange['ranks']} ranks ({exchange['backend']}) "
        f"{1e3 * exchange['seconds']:.3g} ms; one step "
        + ", ".join(f"{1e3 * seconds:.3g} ms on {size}" for size, seconds in scaling["step_seconds"].items())
        + " images"
        # Older files have one step for both.
        + ("; of one rank alone " if scaling.get("alone_seconds") else "")
        + ", ".join(f"{1e3 * each:.3g} ms on {size}" for size, each in scaling.get("alone_seconds", {}).items())
        + ".",
        "",
    ]
    ranks = list(scaling["batches"][0]["images_per_second"])
    rows = [["global batch", *(f"{count} rank{'' if count == '1' else 's'}" for count in ranks)]]
    for batch in scaling["batches"]:
        speeds, efficiency = batch["images_per_second"], batch["efficiency"]
        rows.append(
            [f"{batch['batch']}, images/s", *(f"{speeds[count]:,.0f} ({efficiency[count]:.0%})" for count in ranks)]
        )
    lines += [*_markdown(rows), ""]
    for batch in scaling["batches"]:
        enough = batch["enough_ranks"]
        lines.append(
            f"Batch {batch['batch']}: twice as many ranks as {enough} would bring less than 10 % more images/s."
            if str(2 * enough) in ranks
            else f"Batch {batch['batch']}: {enough} ranks still help; nothing beyond was estimated."
        )
    return lines


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A table that is also readable as it is: columns of one width each."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    padded = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [padded[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *padded[1:]]
