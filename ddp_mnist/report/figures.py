"""The pictures of a run: curves, confusion matrix, worst mistakes. Import it only to draw: matplotlib takes 0.5 s."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from ddp_mnist.data.mnist import class_names
from ddp_mnist.report.runs import RunLog

# Okabe and Ito's colours for the colour-blind. Seven and four have no common divisor: the first 28 runs look different.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")


def curves_figure(runs: Sequence[RunLog]) -> Figure:
    """Draw the losses of one run or several, above the accuracies if there are any: training thin, test thick.

    Scaled by logarithms where all are positive, accuracy by the share of errors: 98 % is as far from 99 as 80 from 90.
    """
    keys = ["loss", "accuracy"] if any(run.series("train/accuracy")[0] for run in runs) else ["loss"]
    figure = _figure(8, 4 * len(keys) + 0.2 * len(runs), runs, " and ".join(keys))
    sizes = [run.config.get("steps_per_epoch", 0) for run in runs]
    every_axes = figure.subplots(len(keys), sharex=True, squeeze=False)[:, 0]
    for axes, key in zip(every_axes, keys, strict=True):
        for number, (run, size) in enumerate(zip(runs, sizes, strict=True)):
            style = {"color": COLOURS[number % len(COLOURS)], "ls": STYLES[number % len(STYLES)]}
            for part, look in ("train", {"lw": 0.8, "alpha": 0.6, "ls": "-"}), ("test", {"lw": 2, "marker": "o"}):
                steps, values = run.series(f"{part}/{key}")
                heights = np.maximum(1 - np.array(values), 1e-4) if key == "accuracy" else values
                axes.plot(np.divide(steps, size if all(sizes) else 1), heights, **style | look)
        axes.set(ylabel=key, xlim=(0, None))
        if all(np.min(line.get_ydata(), initial=1) > 0 for line in axes.lines):  # a likelihood's loss may be negative
            axes.set_yscale("log")
            locators = {"major_locator": LogLocator(subs=(1, 2, 5)), "minor_locator": NullLocator()}
            axes.yaxis.set(**locators, major_formatter="{x:g}")
        axes.grid(alpha=0.25)
    every_axes[-1].set_xlabel("epoch" if all(sizes) else "step")
    if keys[1:]:
        every_axes[1].yaxis.set(inverted=True, major_formatter=lambda error, _: f"{100 - 100 * error:g}%")
    names, title = [str(run.path).replace("$", r"\$") for run in runs], "thin: training, with marks: test"
    lines = every_axes[0].lines[1::2]
    figure.legend(lines, names, loc="outside lower left", handlelength=4, title=title, alignment="left")
    return figure


def confusion_figure(run: RunLog) -> Figure:
    """Draw the counts of the newest test score, [label][prediction], with the accuracy of each class."""
    counts = np.asarray(run.score["test/confusion"])
    total, right, classes = counts.sum(1), counts.diagonal(), range(len(counts))
    caption = f"{(total - right).sum():,} of {total.sum():,} wrong. Colour: the error's share of its true class."
    figure = _figure(9, 8.2, [run], "confusion matrix of the test set", caption)
    axes = figure.subplots()
    axes.set(xlabel="predicted", ylabel="true class", facecolor="#ebebeb")  # which the diagonal lets through
    share = np.ma.array(counts / np.maximum(total, 1)[:, None], mask=np.eye(len(counts), dtype=bool))
    axes.imshow(share**0.5, cmap="Oranges", vmin=0, vmax=1.6 * share.max() ** 0.5 or 1, aspect="auto")
    if len(counts) > 30:  # the numbers of more take long to draw, and nobody can read them
        return figure
    for row, column in zip(*counts.nonzero(), strict=True):
        axes.text(column, row, f"{counts[row, column]:,}", ha="center", va="center")
    names = class_names(run.dataset, len(counts))
    accuracies = right / np.maximum(total, 1)
    axes.set_xticks(classes, names, fontsize=8)
    axes.set_yticks(classes, [f"{name}\n{part:.1%}" for name, part in zip(names, accuracies, strict=True)])
    return figure


def mistakes_figure(run: RunLog, images: Any) -> Figure:
    """Draw the mistakes of the newest test score, of which `images` are uint8 (N, 28, 28), five to a row."""
    mistakes = run.score["test/mistakes"]
    names = class_names(run.dataset, 1 + max(each[key] for each in mistakes for key in ("label", "prediction")))
    rows = -(-len(mistakes) // 5)
    caption = "True class → answer of the network, with the probability that it gave to that answer."
    figure = _figure(8, 1 + 1.62 * rows, [run], "most confident mistakes on the test set", caption)
    for number, (image, mistake) in enumerate(zip(images, mistakes, strict=True), start=1):
        axes = figure.add_subplot(rows, 5, number)
        axes.set_axis_off()
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255)
        text = f"{names[mistake['label']]} → {names[mistake['prediction']]}\n{mistake['confidence']:.2%}"
        axes.set_title(text, fontsize=9)
    return figure


def _figure(width: float, height: float, runs: Sequence[RunLog], what: str, caption: str = "") -> Figure:
    """Make an empty figure, in inches, with a title that names the data."""
    figure = Figure((width, height), dpi=150, layout="constrained")
    name = runs[0].path.resolve().name if len(runs) == 1 else f"{len(runs)} runs"
    data = " + ".join(dict.fromkeys(run.dataset for run in runs))
    colour = "#B00020" if "synthetic" in data else "black"
    data = data.replace("synthetic", "GENERATED DIGITS (NOT MNIST)")
    figure.suptitle(f"{name}\n{data}: {what}", x=0.02, ha="left", weight="bold", color=colour, parse_math=False)
    figure.supxlabel(caption, x=0.02, ha="left", fontsize=10, color="#666666")
    return figure


def png(figure: Figure) -> bytes:
    """Return the picture's file. Not by `savefig`, which draws all of it twice."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
