"""Pictures of a run, and one page that holds all of it; or several runs, one over the other.

`python -m ddp_mnist.report RUN_DIR ...` draws at any time, also while the run is going. It reads what the run wrote
and, for the mistakes, the test images. torch is never imported, matplotlib (0.5 s) when a picture is drawn.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddp_mnist.config import USER_DATA_PREFIX, default_data_dir
from ddp_mnist.data import mnist
from ddp_mnist.distributed.launcher import escape_unencodable_output
from ddp_mnist.errors import JobError
from ddp_mnist.report.figures import TITLES, confusion_figure, curves_figure, mistakes_figure, percent, png, ticks
from ddp_mnist.report.runs import RunLog, comparison, labels, read_run, words
from ddp_mnist.run import directory

log = logging.getLogger(__name__)

CURVES, CONFUSION, MISTAKES, PAGE = "curves.png", "confusion.png", "mistakes.png", "report.html"
DRAWN = ("test_confusion", "test_mistakes")
"""Numbers in the summary that are pictures on the page."""


def try_to_draw(run_dir: Path, data_dir: Path) -> None:
    """Draw a run that is done and saved; warn where that fails: no picture is worth its exit code."""
    try:
        draw(run_dir, data_dir=data_dir)
    except Exception as error:
        command = f"python -m ddp_mnist.report {shlex.quote(str(run_dir))}"
        log.warning("the pictures could not be drawn (%s: %s); try  %s", type(error).__name__, error, command)


def draw(
    run_dir: Path,
    *,
    data_dir: Path | None = None,
    output: Path | None = None,
    say: Callable[[str], object] = log.info,
) -> list[Path]:
    """Write the run's pictures and page into its directory, or into `output`; returns their paths.

    `data_dir`: torchvision's root with the test images; default: the run's own, else DDP_MNIST_DATA. Nothing is ever
    downloaded. What cannot be drawn is said on the page and through `say`. Raises: JobError.
    """
    run = read_run(run_dir)
    notes = run.missing()
    losses, confusion = run.series("train/loss")[0], run.scored.get("test/confusion")
    mistakes = run.scored.get("test/mistakes") or []
    pictures = {}
    if losses:
        pictures[CURVES] = png(curves_figure([run]))
    if confusion:
        pictures[CONFUSION] = png(confusion_figure(confusion, run.dataset, run.name))
    if mistakes:
        try:
            images = _test_images(run, mistakes, data_dir)
            pictures[MISTAKES] = png(mistakes_figure(images, mistakes, run.dataset, run.name))
        except JobError as error:
            notes.append(f"The mistakes are listed without their images. {error}")
    for note in notes:
        say(f"{run.path}: {note}")
    body = [_tiles(run), *map(_note, notes), *(_picture(name, content) for name, content in pictures.items())]
    if mistakes and MISTAKES not in pictures:
        body.append(_mistakes_table(mistakes, run.dataset))
    body.append(_facts(run))
    page = _page(run.name, [run.dataset], f"{run.state}, step {run.result.get('steps') or 0:,}", body)
    folder = output or run.path
    # What has no numbers yet, there may be an old picture of: of the run that --fresh has set aside.
    for name, numbers in (CURVES, losses), (CONFUSION, confusion), (MISTAKES, mistakes):
        if not numbers:
            directory.remove(folder / name)
    return _write(folder, pictures | {PAGE: page})


def draw_comparison(run_dirs: Sequence[Path], output: Path, *, say: Callable[[str], object] = log.info) -> list[Path]:
    """Write the curves of several runs in one picture, and a page with their table, into `output`. Raises: JobError."""
    runs = [read_run(path) for path in run_dirs]
    rows = [(label, run.settings, run.result, run.state) for label, run in zip(labels(runs), runs, strict=True)]
    curves = png(curves_figure(runs))
    notes = [f"{run.path}: {note}" for run in runs for note in run.missing()]
    for note in notes:
        say(note)
    body = [_table(comparison(rows)), _picture(CURVES, curves), *map(_note, notes)]
    page = _page(f"{len(runs)} runs", list(dict.fromkeys(run.dataset for run in runs)), "best first", body)
    return _write(output, {CURVES: curves, PAGE: page})


def _test_images(run: RunLog, mistakes: Sequence[Mapping[str, Any]], data_dir: Path | None) -> Any:
    """uint8 (N, 28, 28): the images of the mistakes. Raises: JobError."""
    if run.dataset == "synthetic":
        from ddp_mnist.data.synthetic import make_digits

        images, truth = make_digits("test")  # the same on every machine: 0.6 s, and no folder comes into being
    elif run.dataset.startswith(USER_DATA_PREFIX):
        raise JobError("They are of the data of a script of its own.")
    else:
        own = Path(run.settings.get("data_dir", default_data_dir()))
        images, truth = _first_readable(run.dataset, [data_dir] if data_dir else [own, default_data_dir()])
    rows = [mistake["index"] for mistake in mistakes]
    if max(rows) >= len(truth) or [*truth[rows]] != [mistake["label"] for mistake in mistakes]:
        raise JobError("The test images found are not those that the run was scored on. Name theirs with --data-dir.")
    return images[rows]


def _first_readable(dataset: str, places: Sequence[Path]) -> tuple[Any, Any]:
    """The test set. Raises: JobError, which tells of the first place."""
    try:
        return mnist.read_split(dataset, places[0], "test", fetch=False)
    except JobError:
        for place in places[1:]:
            with contextlib.suppress(JobError):
                return mnist.read_split(dataset, place, "test", fetch=False)
        raise


def _write(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            directory.write_atomic(folder / name, content)
    except OSError as error:
        raise JobError(f"{folder} cannot be written: {error.strerror}. Choose another place with --output.") from error
    return [folder / name for name in contents]


# --- The page ---------------------------------------------------------------------------------------------------------

STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8882 }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }
h1 { margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 1.5rem 0 .5rem }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem; margin: 1rem 0 }
.tiles div { background: var(--soft); border-radius: 8px; padding: .6rem .8rem; font-size: .85rem }
.tiles b { display: block; font-size: 1.5rem }
.alarm { background: #b00020; color: #fff; border-radius: 8px; padding: .6rem .8rem; font-weight: bold }
.note { border-left: 4px solid #e69f00; padding: .1rem .8rem; overflow-wrap: anywhere }
img { width: 100%; height: auto; background: #fff; border-radius: 8px; margin: .75rem 0 }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { text-align: left; vertical-align: top; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line) }
.columns { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); gap: 0 2rem }
.columns td { overflow-wrap: anywhere }
"""
ALTERNATIVES = {
    CURVES: "Loss and accuracy of training and test over the steps",
    CONFUSION: "Confusion matrix and accuracy of each class",
    MISTAKES: "The wrongly read test images that the network was most sure of",
}


def _page(title: str, datasets: Sequence[str], line: str, body: Sequence[str]) -> bytes:
    """One file that needs no other and no network."""
    data = " + ".join(TITLES.get(dataset, dataset) for dataset in datasets)
    alarm = '<p class="alarm">Generated digits are not MNIST: accuracies on them compare with nothing else.</p>'
    parts = [
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(data)}; {html.escape(line)}</p>",
        *([alarm] if "synthetic" in datasets else []),
        *body,
    ]
    return ("\n".join(parts) + "\n</html>\n").encode()


def _tiles(run: RunLog) -> str:
    """The figures that one asks for first."""
    result, scored = run.result, run.scored
    tiles = []
    if (accuracy := result.get("test_accuracy")) is not None:
        when = f" at step {scored['step']:,}" if scored and scored["step"] < run.step else ""
        tiles.append((percent(accuracy), f"test accuracy{when}"))
    if (loss := result.get("test_loss")) is not None:
        tiles.append((f"{loss:.4f}", "test loss"))
    if result.get("train_accuracy") is not None:
        tiles.append((percent(result["train_accuracy"]), "training accuracy"))
    if run.lines:
        tiles.append((_duration(run.lines[-1].get("wall_seconds", 0)), "in all"))
    speed = result.get("images_per_second") or (run.series("train/images_per_second")[1] or [0])[-1]
    if speed:
        tiles.append((f"{speed:,.0f}", "images a second"))
    cells = (f"<div><b>{html.escape(value)}</b>{html.escape(what)}</div>" for value, what in tiles)
    return f'<div class="tiles">{"".join(cells)}</div>'


def _facts(run: RunLog) -> str:
    """What the run has said about itself, name by name."""
    sections = []
    for title, facts in (
        ("Summary", run.summary),
        ("Settings", run.settings),
        ("Versions", (run.config.get("versions") or {}) | (run.config.get("git") or {})),
        ("Launch", run.config.get("launch")),
    ):
        if facts:
            rows = [[name, words(value)] for name, value in facts.items() if name not in DRAWN]
            sections.append(f"<section><h2>{title}</h2>{_table(rows, head=False)}</section>")
    return f'<div class="columns">{"".join(sections)}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{html.escape(text)}</p>'


def _duration(seconds: float) -> str:
    minutes = round(seconds) // 60
    return f"{seconds:.0f} s" if seconds < 100 else f"{minutes} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _picture(name: str, content: bytes) -> str:
    data = base64.b64encode(content).decode()
    return f'<img alt="{ALTERNATIVES[name]}" src="data:image/png;base64,{data}">'


def _mistakes_table(mistakes: Sequence[Mapping[str, Any]], dataset: str) -> str:
    names = ticks(dataset, mistakes)
    rows = [["test image", "is", "read as", "probability of that"]]
    for each in mistakes:
        rows.append([str(each["index"]), names[each["label"]], names[each["prediction"]], percent(each["confidence"])])
    return f"<h2>Most confident mistakes</h2>{_table(rows)}"


def _table(rows: Sequence[Sequence[str]], *, head: bool = True) -> str:
    """`head`: the first row has the columns' names; else the first column has the rows'."""
    lines = []
    for number, row in enumerate(rows):
        cells = []
        for column, cell in enumerate(row):
            tag = "th" if (number if head else column) == 0 else "td"
            cells.append(f"<{tag}>{html.escape(cell)}</{tag}>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def main(argv: Sequence[str] | None = None) -> int:
    escape_unencodable_output()
    parser = argparse.ArgumentParser(
        prog="python -m ddp_mnist.report",
        description="Draw one run, or compare several; also runs that are still going.",
    )
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help="where to write (default: the one run's directory, else report/)"
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="where the test images are (default: the run's, else $DDP_MNIST_DATA)",
    )
    options = parser.parse_args(argv)
    try:
        if len(options.run_dirs) == 1:
            written = draw(options.run_dirs[0], data_dir=options.data_dir, output=options.output, say=print)
        else:
            written = draw_comparison(options.run_dirs, options.output or Path("report"), say=print)
    except JobError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    for path in written:
        print(f"wrote {path}")
    return 0
