"""Pictures of a run: curves, confusion matrix, worst mistakes, and one page that holds all of it.

`python -m ddp_mnist.report RUN_DIR ...` draws at any time, also while the run is going. It reads what the run wrote
and, for the mistakes, the test images. torch is never imported, matplotlib (0.5 s) when a picture is drawn.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import html
import io
import json
import logging
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddp_mnist import files, rundir
from ddp_mnist.config import OWN, default_data_dir
from ddp_mnist.errors import JobError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

log = logging.getLogger(__name__)

CURVES, CONFUSION, MISTAKES, PAGE = "curves.png", "confusion.png", "mistakes.png", "report.html"
HIDDEN = ("output_dir", "data_dir", "threads", "wandb", "progress", "pictures", "log_every")
"""Settings that are no result's cause; names that begin with one of these, such as wandb_name, are none either."""
DRAWN = ("test_confusion", "test_mistakes")
"""Numbers in the summary that are pictures on the page."""
TITLES = {
    "mnist": "MNIST",
    "fashion-mnist": "Fashion-MNIST",
    "synthetic": "GENERATED DIGITS (NOT MNIST)",
}
# Okabe and Ito's colours, which the colour-blind tell apart, less yellow, which is faint on white. Seven colours and
# four styles have no common divisor: the first 28 runs look different.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
LEGIBLE = 30
"""Classes up to which the confusion matrix has numbers: for 200 they take a minute to draw and nobody can read them."""
GREY, ALARM = "#666666", "#B00020"


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
    def steps_per_epoch(self) -> float:
        """From the last change of epoch in the lines; before there is one, from the size of the training set."""
        for last, line in reversed(list(zip(self.lines, self.lines[1:], strict=False))):
            if line["epoch"] > last["epoch"]:
                return last["step"] / line["epoch"]
        if self.ended and self.summary.get("finished"):
            return self.summary["steps"] / self.summary["epochs"]
        return math.ceil(60_000 / self.settings.get("batch_size", 64))

    def missing(self) -> list[str]:
        """What cannot be drawn or told yet, and why; a sentence each."""
        found = []
        if not self.settings:
            found.append(f"{rundir.CONFIG} is missing or damaged: the settings are not known.")
        if not self.summary:
            found.append(f"There is no {rundir.SUMMARY} yet: the run is still going, or was killed.")
        elif not self.ended:
            found.append(f"The run has gone on past its {rundir.SUMMARY}, or was killed after it.")
        if not self.series("train/loss")[0]:
            found.append(f"{rundir.METRICS} has no loss yet: no curves.")
        if not self.scored:
            found.append("There is no test score before the end of an epoch: no confusion matrix, no mistakes.")
        elif not self.scored.get("test/confusion"):
            found.append(f"{rundir.METRICS} has no test/confusion: no confusion matrix.")
        return found


def read_run(path: Path) -> RunLog:
    """Raises: UsageError for a place where no run is; JobError where metrics.jsonl is damaged."""
    if not path.is_dir():
        found = "a file" if path.exists() else "not there"
        raise UsageError(f"{path} is {found}; expected a run directory. Name what training was given as --output-dir.")
    config, summary = rundir.read_json(path / rundir.CONFIG), rundir.read_json(path / rundir.SUMMARY)
    if not isinstance(config.get("settings"), dict):
        config = {}  # another program's, or damaged
    has_metrics = (path / rundir.METRICS).is_file()
    if not config and not has_metrics and "stop_reason" not in summary:
        raise UsageError(
            f"{path} is not a run directory of ddp_mnist: it has neither a {rundir.CONFIG} with settings nor a "
            f"{rundir.METRICS}. Name what training was given as --output-dir."
        )
    return RunLog(path, config, summary, _read_metrics(path / rundir.METRICS) if has_metrics else [])


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


# Runs beside each other


def state(summary: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if not summary:
        return "no summary yet" if settings else "not started"
    return "finished" if summary.get("finished") else f"stopped: {summary.get('stop_reason')}"


def differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the settings in which the runs differ. Runs that have not started ({}) do not count."""
    known = [each for each in settings if each]
    names = dict.fromkeys(name for each in known for name in each if not name.startswith(HIDDEN))
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


# Figures


def curves_figure(runs: Sequence[RunLog]) -> Figure:
    """Loss above accuracy, training (thin) and test (with marks). Over steps; over epochs where the runs' steps are
    of different sizes."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

    texts = _legend(runs) if len(runs) > 1 else []
    figure = _figure(8, 8 + 0.19 * "\n".join(texts).count("\n") + 0.6 * bool(texts))
    loss, accuracy = figure.subplots(2, sharex=True)
    per_epoch = {run.steps_per_epoch for run in runs}
    by_step = len(per_epoch) == 1
    drawn: list[Line2D] = []
    for number, run in enumerate(runs):
        scale = 1.0 if by_step else run.steps_per_epoch
        test_colour = COLOURS[number % len(COLOURS)]
        train_colour = test_colour if len(runs) > 1 else GREY
        look: dict[str, Any] = {
            "color": test_colour,
            "ls": STYLES[number % len(STYLES)],
            "lw": 2,
            "marker": MARKERS[number % len(MARKERS)],
        }
        for axes, key in (loss, "loss"), (accuracy, "accuracy"):
            steps, values = run.series(f"train/{key}")
            mark = "." if len(steps) < 3 else ""  # a line of one point would not be seen
            (train,) = axes.plot(np.divide(steps, scale), values, color=train_colour, lw=0.8, alpha=0.6, marker=mark)
            train.set_label(_ending("training", key, values))
            steps, values = run.series(f"test/{key}")
            (test,) = axes.plot(np.divide(steps, scale), values, ms=5 if len(steps) <= 40 else 2, **look)
            test.set_label(_ending("test", key, values))
            if len(runs) == 1 and values:
                _annotate_end(axes, steps[-1], values[-1], _value(key, values[-1]), look["color"])
        drawn.append(test)

    loss.set_yscale("log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    loss.yaxis.set_minor_locator(LogLocator(subs=()))
    loss.set_ylabel("loss")
    # By the share of errors, on a logarithm: 98 and 99 % are as far apart as 80 and 90 %. 0.001 keeps 100 % finite.
    accuracy.set_yscale(
        "function",
        functions=(lambda a: -np.log10(np.maximum(1.001 - a, 1e-9)), lambda y: 1.001 - np.power(10.0, -y)),
    )
    accuracy.set_yticks([0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1])
    accuracy.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    seen = [value for run in runs for key in ("train", "test") for value in run.series(f"{key}/accuracy")[1]]
    best = max(seen, default=0.99)
    worst = min([0.9, *seen])
    accuracy.set_ylim(1.001 - (1.001 - worst) * 1.1, 1.001 - (1.001 - best) / 1.8)
    accuracy.set_ylabel("accuracy")
    accuracy.set_xlabel("step" if by_step else "epoch (the runs' steps differ in size)")
    accuracy.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if by_step:
        size = per_epoch.pop()
        epochs = loss.secondary_xaxis("top", functions=(lambda x: x / size, lambda x: x * size))
        epochs.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        epochs.set_xlabel("epoch")
    for axes in loss, accuracy:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    loss.set_xlim(left=0)
    figure.align_ylabels()
    if len(runs) == 1:
        loss.legend(loc="upper right")
        accuracy.legend(loc="lower right")
    else:
        figure.legend(
            *(drawn, texts),
            loc="outside lower left",
            handlelength=4,
            fontsize=9,
            title="thin: training, with marks: test",
            title_fontsize=9,
            alignment="left",
        )
    datasets = list(dict.fromkeys(run.dataset for run in runs))
    _heading(figure, runs[0].name if len(runs) == 1 else f"{len(runs)} runs", datasets, "loss and accuracy")
    return figure


def _legend(runs: Sequence[RunLog]) -> list[str]:
    """One text a run: name, settings in which it differs, test accuracy; wrapped to the figure's width."""
    names = differing([run.settings for run in runs])
    texts = []
    for label, run in zip(labels(runs), runs, strict=True):
        facts = [f"{name.replace('_', '-')} {words(run.settings.get(name))}" for name in names if run.settings]
        score = run.scored.get("test/accuracy")
        said = [] if score is None else [f"test {_percent(score)}"]
        texts.append(textwrap.fill(_plain(f"{label}: {', '.join([*said, *facts])}".removesuffix(": ")), 108))
    return texts


def confusion_figure(confusion: Sequence[Sequence[int]], dataset: str, name: str = "") -> Figure:
    """`confusion`: [label][prediction] counts. Errors are coloured by their share of the label's images, so that a
    diagonal of thousands does not drown them; beside it the accuracy of each class."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    counts = np.asarray(confusion)
    classes = len(counts)
    totals, right = counts.sum(1), counts.diagonal()
    share = counts / np.maximum(totals, 1)[:, None]
    diagonal = np.eye(classes, dtype=bool)
    norm = PowerNorm(0.5, 0, share[~diagonal].max(initial=0) or 1)
    cells = colormaps["Oranges"](0.85 * norm(np.where(diagonal, 0, share)))
    cells[counts == 0] = 1
    cells[diagonal] = (0.92, 0.92, 0.92, 1)

    figure = _figure(9, 7.6)
    matrix, beside = figure.subplots(1, 2, sharey=True, width_ratios=[5, 1])
    matrix.imshow(cells, aspect="auto")
    legible = classes <= LEGIBLE
    for label, prediction in zip(*counts.nonzero(), strict=True) if legible else ():
        on_diagonal = label == prediction
        matrix.text(
            prediction,
            label,
            f"{counts[label, prediction]:,}",
            ha="center",
            va="center",
            color=GREY if on_diagonal else "white" if norm(share[label, prediction]) > 0.75 else "black",
            weight="normal" if on_diagonal else "bold",
        )
    ticks = files.class_names(dataset, classes)
    long = max(map(len, ticks)) > 3
    slant: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if long else {}
    if legible:
        matrix.set_xticks(range(classes), ticks, **slant)
        matrix.set_yticks(range(classes), ticks)
    matrix.set_xlabel("predicted")
    matrix.set_ylabel("true class")
    if legible:
        matrix.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
        matrix.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
        matrix.grid(which="minor", color="#dddddd", lw=0.5)
    matrix.tick_params(which="both", length=0)

    seen = totals > 0
    accuracy = right[seen] / totals[seen]
    rows = np.arange(classes)[seen]
    beside.plot(accuracy, rows, "o", color=COLOURS[0])
    low = accuracy.min() - max(0.2 * (1 - accuracy.min()), 0.001)
    beside.set_xlim(low, 1 + 0.1 * (1 - low))
    beside.xaxis.set_major_locator(MaxNLocator(2))
    beside.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    beside.grid(axis="both", alpha=0.25)
    beside.spines[["top", "right", "left"]].set_visible(False)
    beside.tick_params(axis="y", which="both", length=0)
    beside.set_xlabel("accuracy")
    for row, value in zip(rows, accuracy, strict=True) if legible else ():
        beside.annotate(_percent(value, 1), (1.02, row), xycoords=("axes fraction", "data"), va="center")
    wrong = counts.sum() - right.sum()
    caption = f"{wrong:,} of {counts.sum():,} wrong. Colour: the error's share of its true class."
    _heading(figure, name, [dataset], "confusion matrix of the test set", caption)
    return figure


def mistakes_figure(images: Any, mistakes: Sequence[Mapping[str, Any]], dataset: str, name: str = "") -> Figure:
    """`images`: uint8 (N, 28, 28), the test images of `mistakes`, which are as in metrics.jsonl; five to a row."""
    rows = max(1, math.ceil(len(mistakes) / 5))
    ticks = _ticks(dataset, mistakes)
    long = max(map(len, ticks)) > 3
    figure = _figure(8, 0.9 + (1.95 if long else 1.8) * rows)
    grid = figure.subplots(rows, 5, squeeze=False)
    for axes in grid.flat[len(mistakes) :]:
        axes.set_axis_off()
    for axes, image, mistake in zip(grid.flat, images, mistakes, strict=False):
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_color("#cccccc")
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        true, said = ticks[mistake["label"]], ticks[mistake["prediction"]]
        between = "\n" if long else ", "
        axes.set_title(f"is {true}{between}read as {said}\n{_percent(mistake['confidence'])}", fontsize=9)
    caption = "Percentages: the probability that the network gave to its wrong answer." if mistakes else "No mistakes."
    _heading(figure, name, [dataset], "most confident mistakes on the test set", caption)
    return figure


def _ticks(dataset: str, mistakes: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    highest = max((mistake[key] for mistake in mistakes for key in ("label", "prediction")), default=0)
    return files.class_names(dataset, highest + 1)


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _figure(width: float, height: float) -> Figure:
    """In inches. Not through pyplot, which keeps every figure, has a window system in mind and is for one thread."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))
    FigureCanvasAgg(figure)
    return figure


def _heading(figure: Figure, name: str, datasets: Sequence[str], what: str, caption: str = "") -> None:
    data = " + ".join(TITLES.get(dataset, dataset) for dataset in datasets)
    title = "\n".join([*textwrap.wrap(name, 70), f"{data}: {what}"])
    colour = ALARM if "synthetic" in datasets else "black"
    figure.suptitle(_plain(title), x=0.02, ha="left", weight="bold", color=colour)
    if caption:
        figure.supxlabel(caption, x=0.02, ha="left", fontsize=10, color=GREY)


def _annotate_end(axes: Axes, step: float, value: float, text: str, colour: str) -> None:
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
    axes.annotate(
        text,
        (step, value),
        xytext=(0, 8),
        textcoords="offset points",
        ha="right",
        color=colour,
        weight="bold",
        bbox=box,
    )


def _ending(what: str, key: str, values: Sequence[float]) -> str:
    return f"{what}, last {_value(key, values[-1])}" if values else f"{what}: none yet"


def _value(key: str, value: float) -> str:
    return f"{value:.4f}" if key == "loss" else _percent(value)


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"


def _plain(text: str) -> str:
    """A directory may be called `a$b$c`, which is a formula to matplotlib."""
    return text.replace("$", r"\$")


# Page


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
            rundir.remove(folder / name)
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
        from ddp_mnist.synthetic import make_digits

        images, truth = make_digits("test")  # the same on every machine: 0.6 s, and no folder comes into being
    elif run.dataset.startswith(OWN):
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
        return files.read_split(dataset, places[0], "test", fetch=False)
    except JobError:
        for place in places[1:]:
            with contextlib.suppress(JobError):
                return files.read_split(dataset, place, "test", fetch=False)
        raise


def _write(folder: Path, contents: Mapping[str, bytes]) -> list[Path]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            rundir.write_atomic(folder / name, content)
    except OSError as error:
        raise JobError(f"{folder} cannot be written: {error.strerror}. Choose another place with --output.") from error
    return [folder / name for name in contents]


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
        tiles.append((_percent(accuracy), f"test accuracy{when}"))
    if (loss := result.get("test_loss")) is not None:
        tiles.append((f"{loss:.4f}", "test loss"))
    if result.get("train_accuracy") is not None:
        tiles.append((_percent(result["train_accuracy"]), "training accuracy"))
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
    ticks = _ticks(dataset, mistakes)
    rows = [["test image", "is", "read as", "probability of that"]]
    for each in mistakes:
        rows.append([str(each["index"]), ticks[each["label"]], ticks[each["prediction"]], _percent(each["confidence"])])
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


if __name__ == "__main__":
    sys.exit(main())
