"""The page of a run, or of several beside each other, with its pictures. Imports no torch, and matplotlib to draw."""

import argparse
import base64
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ddp_mnist.config import default_data_dir
from ddp_mnist.data import mnist
from ddp_mnist.distributed.launcher import entry_point
from ddp_mnist.errors import JobError
from ddp_mnist.report.runs import RunLog, comparison, format_table, read_runs
from ddp_mnist.storage.directory import format_setting, translate_write_errors, write_atomic

log = logging.getLogger(__name__)


def try_to_draw(run_dir: Path, data_dir: Path) -> None:
    """Draw a finished run; warn where that fails: no picture is worth its exit code."""
    try:
        draw([run_dir], data_dir=data_dir)
    except Exception as error:
        again = f"python -m ddp_mnist.report {shlex.quote(str(run_dir))}"
        log.warning("the pictures could not be drawn (%s: %s); try  %s", type(error).__name__, error, again)


def draw(run_dirs: Sequence[Path], *, output: Path | None = None, data_dir: Path | None = None) -> list[str]:
    """Write the pictures and the page of one run, or the curves and the page of several; fetch nothing.

    `output` defaults to the one run's directory, else `report`; `data_dir`, for the test images, to the run's. Return
    what could not be drawn, which the page says too, and which files were written. Raises: JobError.
    """
    import jinja2  # like matplotlib only to draw

    from ddp_mnist.report import figures

    runs = read_runs(run_dirs)
    drawn, notes = {}, []
    if measured := [run for run in runs if run.lines]:
        drawn["curves.png"] = figures.curves_figure(measured)
    score = runs[0].score if len(runs) == 1 else {}
    if score.get("test/confusion"):
        drawn["confusion.png"] = figures.confusion_figure(runs[0])
    if score.get("test/mistakes"):
        try:
            drawn["mistakes.png"] = figures.mistakes_figure(runs[0], _test_images(runs[0], data_dir))
        except JobError as error:
            notes.append(f"{runs[0].path}: no picture of the mistakes. {error}")
    files = {name: figures.png(figure) for name, figure in drawn.items()}
    source = Path(__file__).with_name("page.html.j2").read_text()
    template = jinja2.Template(source, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    tools = {"base64": base64.b64encode, "setting": format_setting}
    page = template.render(tools, runs=runs, table=comparison(runs), pictures=files, notes=notes)
    files["report.html"] = page.encode()
    with translate_write_errors(output or (runs[0].path if len(runs) == 1 else Path("report"))) as folder:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomic(folder / name, content)
    return [*notes, *(f"wrote {folder / name}" for name in files)]


def _test_images(run: RunLog, data_dir: Path | None) -> Any:
    """Return the test images of the mistakes, uint8 (N, 28, 28). Raises: JobError."""
    if run.dataset not in mnist.FOLDERS:
        raise JobError(f"This command has no images of the data set {run.dataset}.")
    own = Path(run.settings.get("data_dir", ""))
    root = data_dir or (own if own.is_dir() else default_data_dir())
    images, _ = mnist.read_split(run.dataset, root, "test", fetch=False)
    return images[[mistake["index"] for mistake in run.score["test/mistakes"]]]


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(prog="python -m ddp_mnist.report", description="Draw one run, or compare several.")
    add = parser.add_argument
    add("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    add("--output", type=Path, metavar="DIR", help="folder to write to (default: the run's; for several runs, report/)")
    add("--data-dir", type=Path, metavar="DIR", help="folder of test images (default: the run's, or $DDP_MNIST_DATA)")
    add("--table", action="store_true", help="draw nothing; print a table of the runs, best test accuracy first")
    options = parser.parse_args(argv)
    if options.table:
        lines = format_table(comparison(read_runs(options.run_dirs)))
    else:
        lines = draw(options.run_dirs, output=options.output, data_dir=options.data_dir)
    print(*lines, sep="\n")
    return 0
