"""The pictures of a run: curves, confusion matrix, worst mistakes. Import it only to draw: matplotlib takes 0.5 s."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator

from ddp_mnist.data.mnist import class_names
from ddp_mnist.report.runs import RunLog, comparison, format_table

TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "synthetic": "GENERATED DIGITS (NOT MNIST)"}
# Okabe and Ito's colours for the colour-blind. Seven and four have no common divisor: the first 28 runs look different.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES, GREY, ALARM = ("-", "--", "-.", ":"), "#666666", "#B00020"


def curves_figure(runs: Sequence[RunLog]) -> Figure:
    """Draw loss above accuracy, training (thin) and test (with marks), of one run or of several over each other."""
    table = format_table(comparison(runs)) if len(runs) > 1 else []
    figure = _figure(8, 8 + 0.2 * len(table), runs, "loss and accuracy")
    loss, accuracy = figure.subplots(2, sharex=True)
    sizes = [run.config.get("steps_per_epoch", 0) for run in runs]
    for number, run in enumerate(runs):
        for axes, key in (loss, "loss"), (accuracy, "accuracy"):
            _plot(axes, key, run, number, sizes[number] if all(sizes) else 1)
    if table:
        font = {"family": "monospace", "size": min(8.5, 850 / max(map(len, table)))}  # as wide as the figure
        texts, lines = [line.replace("$", r"\$") for line in table], [Line2D([], [], ls=""), *accuracy.lines[1::2]]
        title = "thin: training, with marks: test"
        figure.legend(lines, texts, loc="outside lower left", handlelength=4, prop=font, title=title, alignment="left")
    else:
        for axes, form in (loss, "{:.4f}"), (accuracy, "{:.2%}"):
            for point in np.asarray(axes.lines[1].get_xydata())[-1:]:
                axes.annotate(form.format(point[1]), point, (0, 8), textcoords="offset points", ha="right")
            axes.legend()
    _scale(loss, accuracy)
    accuracy.set_xlabel("epoch" if all(sizes) else "step")
    return figure


def _plot(axes: Axes, key: str, run: RunLog, number: int, scale: int) -> None:
    """Draw the training and test values of the `number`-th run, with `scale` steps to a unit of x."""
    colour, style = (each[number % len(each)] for each in (COLOURS, STYLES))
    steps, values = run.series(f"train/{key}")
    dot = "." if len(steps) == 1 else ""  # a line of one point would not be seen
    axes.plot(np.divide(steps, scale), values, color=colour, lw=0.8, alpha=0.6, marker=dot, label="training")
    steps, values = run.series(f"test/{key}")
    axes.plot(np.divide(steps, scale), values, color=colour, ls=style, lw=2, marker="o", ms=5, label="test")


def _scale(loss: Axes, accuracy: Axes) -> None:
    """Scale both by logarithms, accuracy by the share of errors: 98 and 99 % are as far apart as 80 and 90 %."""
    loss.set(ylabel="loss", yscale="log", xlim=(0, None))
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_minor_locator(LogLocator(subs=()))
    loss.yaxis.set_major_formatter("{x:g}")
    to_height = (lambda a: -np.log10(np.maximum(1.001 - a, 1e-9)), lambda y: 1.001 - np.power(10.0, -y))  # 100 % too
    accuracy.set_yscale("function", functions=to_height)
    lowest = min(0.9, *(value for line in accuracy.lines for value in np.asarray(line.get_ydata())))
    accuracy.set(ylabel="accuracy", yticks=[0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999], ylim=(lowest, 1.0003))
    accuracy.yaxis.set_major_formatter(lambda value, _: f"{100 * value:g}%")
    for axes in loss, accuracy:
        axes.grid(alpha=0.25)


def confusion_figure(run: RunLog) -> Figure:
    """Draw the counts of the newest test score, [label][prediction], with the accuracy of each class on the right."""
    counts = np.asarray(run.score["test/confusion"])
    total, right, classes = counts.sum(1), counts.diagonal(), range(len(counts))
    caption = f"{(total - right).sum():,} of {total.sum():,} wrong. Colour: the error's share of its true class."
    figure = _figure(9, 8.2, [run], "confusion matrix of the test set", caption)
    axes = figure.subplots()
    axes.set(xlabel="predicted", ylabel="true class", facecolor="#ebebeb")  # which the diagonal lets through
    share = np.ma.array(counts / np.maximum(total, 1)[:, None], mask=np.eye(len(counts), dtype=bool))
    norm = PowerNorm(0.5, 0, 1.3 * share.max())
    axes.imshow(share, cmap="Oranges", norm=norm, aspect="auto")
    if len(counts) > 30:  # for 200 classes the numbers take a minute to draw, and nobody can read them
        return figure
    for row, column in zip(*counts.nonzero(), strict=True):
        colour = GREY if row == column else "white" if norm(share[row, column]) > 0.65 else "black"
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center", color=colour)
    names = class_names(run.dataset, len(counts))
    axes.set_xticks(classes, names, fontsize=10 if max(map(len, names)) < 4 else 8)
    axes.set_yticks(classes, names)
    accuracies = axes.secondary_yaxis("right")
    accuracies.set_yticks(classes, [f"{part:.1%}" for part in right / np.maximum(total, 1)])
    accuracies.set_ylabel("accuracy")
    return figure


def mistakes_figure(run: RunLog, images: Any) -> Figure:
    """Draw the mistakes of the newest test score, of which `images` are uint8 (N, 28, 28), five to a row."""
    mistakes = run.score["test/mistakes"]
    names = class_names(run.dataset, 1 + max(max(each["label"], each["prediction"]) for each in mistakes))
    rows = -(-len(mistakes) // 5)
    caption = "True class → answer of the network, with the probability that it gave to that answer."
    figure = _figure(8, 1 + 1.62 * rows, [run], "most confident mistakes on the test set", caption)
    axes = figure.subplots()  # one pair for all: a pair for each costs more than all that is drawn into them
    axes.set_axis_off()
    for number, (image, mistake) in enumerate(zip(images, mistakes, strict=True)):
        left, top = 1.4 * (number % 5), 1.48 * (number // 5)
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255, extent=(left, left + 1, top + 1, top))
        axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor="#cccccc"))
        text = f"{names[mistake['label']]} → {names[mistake['prediction']]}\n{mistake['confidence']:.2%}"
        axes.text(left + 0.5, top - 0.05, text, fontsize=9, ha="center", va="bottom")
    axes.set(xlim=(-0.2, 6.8), ylim=(1.48 * rows - 0.43, -0.43))
    return figure


def _figure(width: float, height: float, runs: Sequence[RunLog], what: str, caption: str = "") -> Figure:
    """Make an empty figure, in inches, with a title that names the data."""
    figure = Figure((width, height), dpi=150, layout="constrained")
    name = runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
    data = " + ".join(dict.fromkeys(TITLES.get(run.dataset, run.dataset) for run in runs))
    colour = ALARM if any(run.dataset == "synthetic" for run in runs) else "black"
    figure.suptitle(f"{name}\n{data}: {what}", x=0.02, ha="left", weight="bold", color=colour, parse_math=False)
    figure.supxlabel(caption, x=0.02, ha="left", fontsize=10, color=GREY)
    return figure


def png(figure: Figure) -> bytes:
    """Return the picture's file. Not by `savefig`, which draws all of it twice."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
