"""The pictures of a run: curves, confusion matrix, worst mistakes. matplotlib (0.5 s) is imported when one is drawn."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddp_mnist.data import mnist
from ddp_mnist.report.runs import RunLog, differing, labels, words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

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


def curves_figure(runs: Sequence[RunLog]) -> Figure:
    """Loss above accuracy, training (thin) and test (with marks). Over steps; over epochs where the runs' steps are
    of different sizes."""
    alone = len(runs) == 1
    texts = [] if alone else _legend(runs)
    figure = _figure(8, 8 + 0.19 * "\n".join(texts).count("\n") + 0.6 * bool(texts))
    loss, accuracy = figure.subplots(2, sharex=True)
    per_epoch = {run.steps_per_epoch for run in runs}
    by_step = len(per_epoch) == 1
    drawn = [
        _curves(loss, accuracy, run, number, 1.0 if by_step else run.steps_per_epoch, alone=alone)
        for number, run in enumerate(runs)
    ]
    _loss_axis(loss)
    _accuracy_axis(
        accuracy, [value for run in runs for key in ("train", "test") for value in run.series(f"{key}/accuracy")[1]]
    )
    _step_axes(loss, accuracy, per_epoch.pop() if by_step else None)
    figure.align_ylabels()
    if alone:
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
    _heading(figure, runs[0].name if alone else f"{len(runs)} runs", datasets, "loss and accuracy")
    return figure


def _curves(loss: Axes, accuracy: Axes, run: RunLog, number: int, scale: float, *, alone: bool) -> Line2D:
    """Draw one run, the `number`-th; returns the line that stands for it in a legend. `scale`: steps to a unit of x."""
    test_colour = COLOURS[number % len(COLOURS)]
    train_colour = GREY if alone else test_colour
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
        if alone and values:
            _annotate_end(axes, steps[-1], values[-1], _value(key, values[-1]), look["color"])
    return test


def _loss_axis(loss: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator

    loss.set_yscale("log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    loss.yaxis.set_minor_locator(LogLocator(subs=()))
    loss.set_ylabel("loss")


def _accuracy_axis(accuracy: Axes, seen: Sequence[float]) -> None:
    """By the share of errors, on a logarithm: 98 and 99 % are as far apart as 80 and 90 %. `seen`: what is drawn."""
    from matplotlib.ticker import FuncFormatter

    accuracy.set_yscale(
        "function",
        functions=(
            lambda a: -np.log10(np.maximum(1.001 - a, 1e-9)),  # 0.001 keeps 100 % finite
            lambda y: 1.001 - np.power(10.0, -y),
        ),
    )
    accuracy.set_yticks([0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1])
    accuracy.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    best, worst = max(seen, default=0.99), min([0.9, *seen])
    accuracy.set_ylim(1.001 - (1.001 - worst) * 1.1, 1.001 - (1.001 - best) / 1.8)
    accuracy.set_ylabel("accuracy")


def _step_axes(loss: Axes, accuracy: Axes, size: float | None) -> None:
    """Steps below and epochs of `size` steps on top; None: epochs below, of runs whose steps differ in size."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    accuracy.set_xlabel("step" if size else "epoch (the runs' steps differ in size)")
    accuracy.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    if size is not None:
        epochs = loss.secondary_xaxis("top", functions=(lambda x: np.divide(x, size), lambda x: np.multiply(x, size)))
        epochs.xaxis.set_major_locator(MaxNLocator(10, integer=True, min_n_ticks=1))
        epochs.set_xlabel("epoch")
    for axes in loss, accuracy:
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    loss.set_xlim(left=0)


def _legend(runs: Sequence[RunLog]) -> list[str]:
    """One text a run: name, settings in which it differs, test accuracy; wrapped to the figure's width."""
    names = differing([run.settings for run in runs])
    texts = []
    for label, run in zip(labels(runs), runs, strict=True):
        facts = [f"{name.replace('_', '-')} {words(run.settings.get(name))}" for name in names if run.settings]
        score = run.scored.get("test/accuracy")
        said = [] if score is None else [f"test {percent(score)}"]
        texts.append(textwrap.fill(_plain(f"{label}: {', '.join([*said, *facts])}".removesuffix(": ")), 108))
    return texts


def confusion_figure(confusion: Sequence[Sequence[int]], dataset: str, name: str = "") -> Figure:
    """`confusion`: [label][prediction] counts. Errors are coloured by their share of the label's images, so that a
    diagonal of thousands does not drown them; beside it the accuracy of each class."""
    counts = np.asarray(confusion)
    figure = _figure(9, 7.6)
    matrix, beside = figure.subplots(1, 2, sharey=True, width_ratios=[5, 1])
    _matrix(matrix, counts, mnist.class_names(dataset, len(counts)))
    _class_accuracies(beside, counts)
    wrong = counts.sum() - counts.diagonal().sum()
    caption = f"{wrong:,} of {counts.sum():,} wrong. Colour: the error's share of its true class."
    _heading(figure, name, [dataset], "confusion matrix of the test set", caption)
    return figure


def _matrix(matrix: Axes, counts: NDArray[np.int64], names: Sequence[str]) -> None:
    """`counts`: [label][prediction]; `names`: of the classes."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    classes = len(counts)
    share = counts / np.maximum(counts.sum(1), 1)[:, None]
    diagonal = np.eye(classes, dtype=bool)
    norm = PowerNorm(0.5, 0, share[~diagonal].max(initial=0) or 1)
    cells = colormaps["Oranges"](0.85 * norm(np.where(diagonal, 0, share)))
    cells[counts == 0] = 1
    cells[diagonal] = (0.92, 0.92, 0.92, 1)
    matrix.imshow(cells, aspect="auto")
    matrix.set_xlabel("predicted")
    matrix.set_ylabel("true class")
    matrix.tick_params(which="both", length=0)
    if classes > LEGIBLE:
        return
    for label, prediction in zip(*counts.nonzero(), strict=True):
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
    slant: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if _long(names) else {}
    matrix.set_xticks(range(classes), names, **slant)
    matrix.set_yticks(range(classes), names)
    matrix.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
    matrix.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
    matrix.grid(which="minor", color="#dddddd", lw=0.5)


def _class_accuracies(beside: Axes, counts: NDArray[np.int64]) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    totals = counts.sum(1)
    seen = totals > 0
    accuracy = counts.diagonal()[seen] / totals[seen]
    rows = np.arange(len(counts))[seen]
    beside.plot(accuracy, rows, "o", color=COLOURS[0])
    low = accuracy.min() - max(0.2 * (1 - accuracy.min()), 0.001)
    beside.set_xlim(low, 1 + 0.1 * (1 - low))
    beside.xaxis.set_major_locator(MaxNLocator(2))
    beside.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    beside.grid(axis="both", alpha=0.25)
    beside.spines[["top", "right", "left"]].set_visible(False)
    beside.tick_params(axis="y", which="both", length=0)
    beside.set_xlabel("accuracy")
    for row, value in zip(rows, accuracy, strict=True) if len(counts) <= LEGIBLE else ():
        beside.annotate(percent(value, 1), (1.02, row), xycoords=("axes fraction", "data"), va="center")


def mistakes_figure(images: Any, mistakes: Sequence[Mapping[str, Any]], dataset: str, name: str = "") -> Figure:
    """`images`: uint8 (N, 28, 28), the test images of `mistakes`, which are as in metrics.jsonl; five to a row."""
    from matplotlib.patches import Rectangle

    rows = max(1, math.ceil(len(mistakes) / 5))
    names = ticks(dataset, mistakes)
    long = _long(names)
    # In images' sides, of which one takes `side` inches: a place's width; its height, with room for the words.
    wide = 1.75 if long else 1.35
    side = 7.7 / (5 * wide)
    high = 1.1 + (0.55 if long else 0.4) / side
    figure = _figure(8, 1.0 + side * high * rows)
    axes = figure.subplots()  # one pair for all: a pair for each costs more than all that is drawn into them
    axes.set_axis_off()
    for number, (image, mistake) in enumerate(zip(images, mistakes, strict=False)):
        left, top = wide * (number % 5), high * (number // 5)
        axes.imshow(image, cmap="gray_r", vmin=0, vmax=255, extent=(left, left + 1, top + 1, top))
        axes.add_patch(Rectangle((left, top), 1, 1, fill=False, edgecolor="#cccccc"))
        true, said = names[mistake["label"]], names[mistake["prediction"]]
        between = "\n" if long else ", "
        said = f"is {true}{between}read as {said}\n{percent(mistake['confidence'])}"
        axes.text(left + 0.5, top - 0.05, said, fontsize=9, ha="center", va="bottom")
    axes.set_xlim(0.5 - wide / 2, 0.5 + 4.5 * wide)
    axes.set_ylim(high * (rows - 1) + 1.05, 1.05 - high)
    caption = "Percentages: the probability that the network gave to its wrong answer." if mistakes else "No mistakes."
    _heading(figure, name, [dataset], "most confident mistakes on the test set", caption)
    return figure


def ticks(dataset: str, mistakes: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """What the classes are called, up to the highest among the mistakes."""
    highest = max((mistake[key] for mistake in mistakes for key in ("label", "prediction")), default=0)
    return mnist.class_names(dataset, highest + 1)


def _long(names: Sequence[str]) -> bool:
    """Words, not digits: they need room."""
    return max(map(len, names)) > 3


def png(figure: Figure) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    figure.set_dpi(150)
    # Not `savefig`, which goes through all that is drawn once more beforehand, for the layout; the picture is the same.
    FigureCanvasAgg(figure).print_png(buffer)
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
    return f"{value:.4f}" if key == "loss" else percent(value)


def percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %"


def _plain(text: str) -> str:
    """A directory may be called `a$b$c`, which is a formula to matplotlib."""
    return text.replace("$", r"\$")
