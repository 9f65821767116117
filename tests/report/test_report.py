"""Pictures and page of a run, from what it has written: hand-made runs, so that every number is known."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from ddp_mnist.config import TrainConfig
from ddp_mnist.errors import JobError, UsageError
from ddp_mnist.report import figures
from ddp_mnist.report import page as report
from ddp_mnist.report import runs as runlog

STEPS, PER_EPOCH, EVERY = 30, 15, 5  # two epochs, a line every five steps
SETTINGS = {"dataset": "fashion-mnist", "recipe": "tutorial", "epochs": 2, "batch_size": 64, "lr": 0.001, "seed": 0}
CONFUSION = [[90 if row == column else (row + column) % 3 for column in range(10)] for row in range(10)]
PICTURES = ["curves.png", "confusion.png", "mistakes.png"]


def mistakes(tiny: Path, count: int = 7) -> list[dict[str, Any]]:
    labels = (tiny / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").read_bytes()[8:]
    return [
        {"index": 3 * n, "label": labels[3 * n], "prediction": (labels[3 * n] + 1) % 10, "confidence": 0.99 - n / 100}
        for n in range(count)
    ]


def metrics(test: dict[str, Any], *, steps: int = STEPS, last_loss: float = 0.05) -> list[dict[str, Any]]:
    lines = []
    for step in range(EVERY, steps + 1, EVERY):
        line: dict[str, Any] = {"step": step, "epoch": (step - 1) // PER_EPOCH, "wall_seconds": step / 10, "lr": 0.001}
        line |= {"train/loss": 2 / step, "train/accuracy": 1 - 1 / step, "train/images_per_second": 1000.0 + step}
        if step % PER_EPOCH == 0:
            line |= {"test/loss": last_loss * STEPS / step, "test/accuracy": 1 - 0.2 / step, **test}
        lines.append(line)
    return lines


def make_run(
    path: Path,
    tiny: Path,
    *,
    lines: list[dict[str, Any]] | None = None,
    summary: dict[str, Any] | None = None,
    per_epoch: int = PER_EPOCH,
    **settings: Any,
) -> Path:
    """A finished run; `summary={}`: one that is going."""
    path.mkdir(parents=True)
    content = {
        "settings": SETTINGS | {"data_dir": str(tiny), "output_dir": str(path)} | settings,
        "steps_per_epoch": per_epoch,
    }
    (path / "config.json").write_text(json.dumps(content | {"versions": {"torch": "9.8.7"}, "git": None}))
    if lines is None:
        lines = metrics({"test/confusion": CONFUSION, "test/mistakes": mistakes(tiny)})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = {
        "finished": True,
        "stop_reason": "finished",
        "steps": STEPS,
        "epochs": 2,
        "test_accuracy": 0.9933,
        "test_confusion": CONFUSION,
    }
    if summary is None or summary:
        (path / "summary.json").write_text(json.dumps(ended | {"resumed_from": None} | (summary or {})))
    return path


@pytest.fixture
def run(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DDP_MNIST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path / "first", tiny)


def looks_drawn(content: bytes) -> None:
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG"
    assert min(image.size) > 500
    colours = image.convert("RGB").getcolors(2**24)
    assert colours is not None
    assert len(colours) > 20
    assert max(count for count, _ in colours) < 0.97 * image.width * image.height, "nearly blank"


class Page(HTMLParser):
    """What a page refers to and says."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.text = ""
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.text += data + " "

    def pictures(self) -> list[bytes]:
        prefix = "data:image/png;base64,"
        return [base64.b64decode(each.removeprefix(prefix)) for each in self.references if each.startswith(prefix)]


# One run


def test_a_matrix_of_many_classes_has_colours_only() -> None:
    confusion = [[5 if row == column else 1 for column in range(60)] for row in range(60)]
    matrix, beside = figures.confusion_figure(confusion, "own-123").axes
    assert not matrix.texts and not beside.texts and matrix.images


def test_a_finished_run_has_three_pictures_and_a_page_that_holds_them(run: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert report.draw(run) == [run / name for name in [*PICTURES, "report.html"]]
    for name in PICTURES:
        looks_drawn((run / name).read_bytes())
    page = Page(run / "report.html")
    assert page.pictures() == [(run / name).read_bytes() for name in PICTURES]
    assert "test_confusion" not in page.text
    for text in ("99.33 %", "Fashion-MNIST", "finished", "batch_size", "stop_reason", "9.8.7"):
        assert text in page.text
    assert {path.name for path in run.iterdir()} == {*before, *PICTURES, "report.html"}
    assert all((run / name).read_bytes() == content for name, content in before.items())


@pytest.mark.slow
def test_the_page_needs_no_other_file_and_no_network(run: Path) -> None:
    report.draw(run)
    page = Page(run / "report.html")
    assert len(page.references) == 3
    assert all(each.startswith("data:image/png;base64,") for each in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page.source)
    assert not re.search(r"https?:|//|url\(|@import", text.replace(str(run.parents[0]), ""))
    assert "color-scheme: light dark" in text
    assert "width=device-width" in text


def test_settings_are_text_and_not_markup(tmp_path: Path, tiny: Path) -> None:
    run = make_run(tmp_path / "<b>$_$b", tiny, init_from="<script>alert('x')</script>&amp;", dataset="<i>")
    report.draw(run)
    page = Page(run / "report.html")
    assert not {"script", "i"} & set(page.tags)
    assert "<b>$_$b" not in page.source
    assert "<script>" not in page.source
    assert "<script>alert('x')</script>&amp;" in page.text


def test_the_curves_are_the_lines_of_the_file(run: Path) -> None:
    lines = jobs.read_metrics(run)
    figure = figures.curves_figure([runlog.read_run(run)])
    loss, accuracy = figure.axes
    assert [loss.get_ylabel(), accuracy.get_ylabel(), accuracy.get_xlabel()] == ["loss", "accuracy", "step"]
    for axes, key in (loss, "loss"), (accuracy, "accuracy"):
        train, test = axes.lines
        assert [*zip(*train.get_data(), strict=True)] == [(line["step"], line[f"train/{key}"]) for line in lines]
        scored = [(line["step"], line[f"test/{key}"]) for line in lines if f"test/{key}" in line]
        assert [*zip(*test.get_data(), strict=True)] == scored
        assert (train.get_linewidth(), train.get_color()) != (test.get_linewidth(), test.get_color())
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == [
        "training, last 96.67 %",
        "test, last 99.33 %",
    ]
    assert [text.get_text() for text in loss.texts + accuracy.texts] == ["0.0500", "99.33 %"]
    assert "first\nFashion-MNIST" in figure.get_suptitle()


def test_the_epochs_stand_above_the_steps(run: Path) -> None:
    figure = figures.curves_figure([runlog.read_run(run)])
    figures.png(figure)
    (epochs,) = figure.axes[0].child_axes
    assert epochs.get_xlabel() == "epoch"
    ticks = [tick for tick in epochs.get_xticks() if 0 <= tick <= 2]
    assert ticks == [0, 1, 2]
    assert np.allclose(epochs.get_xlim(), np.divide(figure.axes[0].get_xlim(), PER_EPOCH))


def test_a_run_that_has_lost_its_settings_has_the_epochs_of_mnist(run: Path) -> None:
    (run / "config.json").unlink()
    assert runlog.read_run(run).steps_per_epoch == -(-60_000 // TrainConfig().batch_size)


def test_98_and_99_percent_are_apart_on_the_axis(run: Path) -> None:
    figure = figures.curves_figure([runlog.read_run(run)])
    figures.png(figure)
    accuracy = figure.axes[1]
    heights = accuracy.transAxes.inverted().transform(
        accuracy.transData.transform([(0, share) for share in (0.9, 0.98, 0.99, 0.9933)])
    )[:, 1]
    assert all(np.diff(heights) > 0.05)
    assert 0 <= heights[0] < heights[-1] <= 1


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_accuracies_at_the_ends_are_inside_the_picture(tmp_path: Path, tiny: Path, share: float) -> None:
    lines = [line | {"train/accuracy": share} for line in metrics({})]
    figure = figures.curves_figure([runlog.read_run(make_run(tmp_path / "run", tiny, lines=lines))])
    figures.png(figure)
    low, high = figure.axes[1].get_ylim()
    assert low <= share <= high


def test_a_resumed_run_is_one_curve(tmp_path: Path, tiny: Path) -> None:
    run = make_run(tmp_path / "run", tiny, summary={"resumed_from": 10})
    train, _ = figures.curves_figure([runlog.read_run(run)]).axes[0].lines
    assert list(train.get_xdata()) == [5, 10, 15, 20, 25, 30]


def test_the_confusion_matrix_shows_each_count_and_the_errors_in_colour() -> None:
    figure = figures.confusion_figure(CONFUSION, "mnist", "name")
    matrix, beside = figure.axes
    shown = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in matrix.texts}
    assert shown == {
        (row, column): str(count) for row, line in enumerate(CONFUSION) for column, count in enumerate(line) if count
    }
    (image,) = matrix.images
    colours = np.asarray(image.get_array())[..., :3]
    diagonal = colours[range(10), range(10)]
    assert np.ptp(diagonal) == 0, "the diagonal is grey"
    # An error of 2 is further from white than one of 1, and no error is white.
    white, one, two = (1 - colours[0, column].min() for column in (3, 1, 2))
    assert [CONFUSION[0][column] for column in (3, 1, 2)] == [0, 1, 2]
    assert white == 0 < one < two
    (points,) = beside.lines
    assert np.allclose(points.get_xdata(), [row[label] / sum(row) for label, row in enumerate(CONFUSION)])
    assert [text.get_text() for text in beside.texts] == [
        f"{100 * row[label] / sum(row):.1f} %" for label, row in enumerate(CONFUSION)
    ]
    assert [label.get_text() for label in matrix.get_xticklabels()] == list("0123456789")
    wrong = sum(map(sum, CONFUSION)) - 900
    assert f"{wrong} of {900 + wrong} wrong" in figure.get_supxlabel()
    looks_drawn(figures.png(figure))


@pytest.mark.parametrize("kind", ["curves", "confusion", "mistakes"])
def test_a_picture_is_gone_through_once_and_looks_as_matplotlib_saves_it(
    monkeypatch: pytest.MonkeyPatch, run: Path, tiny: Path, kind: str
) -> None:
    def figure() -> Figure:
        if kind == "curves":
            return figures.curves_figure([runlog.read_run(run)])
        if kind == "confusion":
            return figures.confusion_figure(CONFUSION, "mnist", "a run")
        return figures.mistakes_figure(np.zeros((7, 28, 28), np.uint8), mistakes(tiny), "mnist", "a run")

    drawn: list[Figure] = []
    draw = Figure.draw
    monkeypatch.setattr(Figure, "draw", lambda self, renderer: (drawn.append(self), draw(self, renderer)))
    content = figures.png(figure())
    assert len(drawn) == 1
    saved = io.BytesIO()
    figure().savefig(saved, dpi=150)
    assert np.array_equal(Image.open(io.BytesIO(content)), Image.open(saved))


def test_an_error_weighs_more_in_a_class_of_few_images() -> None:
    counts = np.diag([10, *[1000] * 9])
    counts[0, 1] = counts[1, 0] = 1
    colours = np.asarray(figures.confusion_figure(counts.tolist(), "mnist").axes[0].images[0].get_array())
    assert colours[0, 1, 2] < colours[1, 0, 2] < 1  # orange has less blue than white


def test_a_class_without_images_has_no_accuracy_and_a_perfect_score_is_drawn() -> None:
    perfect = [[9 if row == column else 0 for column in range(10)] for row in range(10)]
    perfect[4] = [0] * 10
    figure = figures.confusion_figure(perfect, "mnist")
    assert list(figure.axes[1].lines[0].get_ydata()) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    looks_drawn(figures.png(figure))


def test_the_mistakes_have_their_images_classes_and_confidence(tiny: Path) -> None:
    found = mistakes(tiny)
    images = np.arange(7 * 784, dtype=np.uint8).reshape(7, 28, 28)
    figure = figures.mistakes_figure(images, found, "mnist", "name")
    (axes,) = figure.axes
    assert len(axes.images) == len(axes.texts) == len(axes.patches) == 7 and not axes.axison
    for drawn, frame, text, image, mistake in zip(axes.images, axes.patches, axes.texts, images, found, strict=True):
        assert (np.asarray(drawn.get_array()) == image).all()
        share = f"{100 * mistake['confidence']:.2f} %"
        assert text.get_text() == f"is {mistake['label']}, read as {mistake['prediction']}\n{share}"
        left, right, bottom, top = drawn.get_extent()
        assert frame.get_xy() == (left, top) and left < text.get_position()[0] < right and text.get_position()[1] < top
        assert axes.viewLim.x0 <= left < right <= axes.viewLim.x1 and axes.viewLim.y1 < top < bottom < axes.viewLim.y0
    assert len({tuple(drawn.get_extent()) for drawn in axes.images}) == 7
    looks_drawn(figures.png(figure))


def test_the_images_come_from_the_test_set(run: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}
    monkeypatch.setattr(
        report, "mistakes_figure", lambda images, *rest: seen.update(images=images) or figures._figure(6, 6)
    )
    report.draw(run)
    pixels = np.fromfile(tiny / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte", np.uint8, offset=16)
    assert (seen["images"] == pixels.reshape(-1, 28, 28)[0:21:3]).all()


def test_fashion_has_names_instead_of_digits(tiny: Path) -> None:
    figure = figures.confusion_figure(CONFUSION, "fashion-mnist")
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert (names[0], names[9]) == ("T-shirt/top", "Ankle boot")
    mistake = {"index": 0, "label": 6, "prediction": 0, "confidence": 0.5}
    figure = figures.mistakes_figure(np.zeros((1, 28, 28), np.uint8), [mistake], "fashion-mnist")
    assert [text.get_text() for text in figure.axes[0].texts] == ["is Shirt\nread as T-shirt/top\n50.00 %"]


@pytest.mark.parametrize(
    ("dataset", "title"),
    [("mnist", "MNIST"), ("fashion-mnist", "Fashion-MNIST"), ("synthetic", "GENERATED DIGITS (NOT MNIST)")],
)
def test_the_dataset_stands_in_every_picture(tmp_path: Path, tiny: Path, dataset: str, title: str) -> None:
    run = runlog.read_run(make_run(tmp_path / "run", tiny, dataset=dataset))
    image = np.zeros((1, 28, 28), np.uint8)
    for figure in (
        figures.curves_figure([run]),
        figures.curves_figure([run, run]),
        figures.confusion_figure(CONFUSION, dataset),
        figures.mistakes_figure(image, mistakes(tiny, 1), dataset),
    ):
        assert figure.get_suptitle().splitlines()[-1].startswith(f"{title}: ")


@pytest.mark.slow
def test_generated_digits_are_drawn_again_and_cannot_be_taken_for_mnist(tmp_path: Path, tiny: Path) -> None:
    from ddp_mnist.data.synthetic import make_digits

    label = int(make_digits("test", count=8)[1][7])
    wrong = [{"index": 7, "label": label, "prediction": (label + 1) % 10, "confidence": 0.5}]
    lines = metrics({"test/confusion": CONFUSION, "test/mistakes": wrong})
    nowhere = tmp_path / "nowhere"
    run = make_run(tmp_path / "run", tiny, lines=lines, dataset="synthetic", data_dir=str(nowhere))
    assert [path.name for path in report.draw(run)] == [*PICTURES, "report.html"]
    assert "Generated digits are not MNIST" in Page(run / "report.html").text
    assert not nowhere.exists()


# What is missing


def test_a_run_that_is_going_is_drawn_as_far_as_it_is(
    tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run", tiny, lines=metrics({}, steps=10), summary={})
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 15, "epo')
    assert report.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-2:] == [f"wrote {run / 'curves.png'}", f"wrote {run / 'report.html'}"]
    assert "still going" in said
    assert "no test score" in said
    page = Page(run / "report.html")
    assert len(page.pictures()) == 1
    assert "no summary yet" in page.text
    assert "no test score before the end of an epoch" in page.text


def test_a_run_that_has_just_started_has_a_page(tmp_path: Path, tiny: Path) -> None:
    run = make_run(tmp_path / "run", tiny, lines=[], summary={})
    assert report.draw(run) == [run / "report.html"]
    assert "no curves" in Page(run / "report.html").text


def test_a_failed_run_says_why(tmp_path: Path, tiny: Path) -> None:
    run = make_run(tmp_path / "run", tiny, lines=metrics({}, steps=10), summary={"finished": False, "steps": 12})
    (run / "summary.json").write_text('{"finished": false, "stop_reason": "nan", "steps": 12, "test_accuracy": null}')
    report.draw(run)
    assert "stopped: nan" in Page(run / "report.html").text


def test_a_run_that_failed_before_its_first_step_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(
        '{"stop_reason": "error", "dataset": "mnist", "steps": 0, "finished": false}'
    )
    assert report.draw(tmp_path) == [tmp_path / "report.html"]
    text = Page(tmp_path / "report.html").text
    assert "stopped: error" in text
    assert "config.json is missing" in text


def test_a_continued_run_does_not_show_the_end_of_its_last_attempt(tmp_path: Path, tiny: Path) -> None:
    run = make_run(tmp_path / "run", tiny, summary={"finished": False, "stop_reason": "SIGTERM", "steps": 10})
    report.draw(run)
    text = Page(run / "report.html").text
    assert "gone on past its summary.json" in text
    assert "no summary yet" in text


def test_the_score_of_a_run_stopped_within_an_epoch_is_in_its_summary(tmp_path: Path, tiny: Path) -> None:
    summary = {"finished": False, "stop_reason": "max_steps", "steps": 12, "test_accuracy": 0.5, "test_loss": 1.5}
    summary["test_mistakes"] = mistakes(tiny)
    run = make_run(tmp_path / "run", tiny, lines=metrics({}, steps=10), summary=summary)
    assert [path.name for path in report.draw(run)] == ["curves.png", "confusion.png", "mistakes.png", "report.html"]
    _, test = figures.curves_figure([runlog.read_run(run)]).axes[1].lines
    assert [*zip(*test.get_data(), strict=True)] == [(12, 0.5)]
    assert "no test score" not in Page(run / "report.html").text


@pytest.mark.parametrize("keep", ["test/confusion", "test/mistakes"])
def test_lines_of_an_older_version_are_enough(tmp_path: Path, tiny: Path, keep: str) -> None:
    full = {"test/confusion": CONFUSION, "test/mistakes": mistakes(tiny)}
    lines = [
        {key: value for key, value in line.items() if key != "train/accuracy"} for line in metrics({keep: full[keep]})
    ]
    run = make_run(tmp_path / "run", tiny, lines=lines)
    picture = {"test/confusion": "confusion.png", "test/mistakes": "mistakes.png"}[keep]
    assert [path.name for path in report.draw(run)] == ["curves.png", picture, "report.html"]


@pytest.mark.slow
def test_pictures_of_a_run_that_was_set_aside_do_not_stay(run: Path, tiny: Path) -> None:
    report.draw(run)
    (run / "metrics.jsonl").write_text(json.dumps(metrics({})[0]) + "\n")
    (run / "summary.json").unlink()
    report.draw(run)
    assert sorted(path.name for path in run.glob("*.png")) == ["curves.png"]


def test_without_the_images_the_mistakes_are_a_table(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddp_mnist.data.mnist._download", lambda *_: pytest.fail("downloads"))
    nowhere = tmp_path / "nowhere"
    assert report.main([str(run), "--data-dir", str(nowhere)]) == 0
    assert not (run / "mistakes.png").exists()
    assert not nowhere.exists()
    page = Page(run / "report.html")
    assert "listed without their images" in page.text
    assert str(nowhere) in page.text
    assert {"98.00 %", "93.00 %"} < set(re.findall(r"\d+\.\d\d %", page.text))
    assert "listed without their images" in capsys.readouterr().out


@pytest.mark.slow
def test_images_of_another_data_set_are_not_shown_as_mistakes(run: Path, tmp_path: Path) -> None:
    from conftest import write_digits

    write_digits(tmp_path / "other", 10, 12)
    report.draw(run, data_dir=tmp_path / "other")
    assert not (run / "mistakes.png").exists()
    assert "not those that the run was scored on" in Page(run / "report.html").text


@pytest.mark.slow
def test_the_images_are_found_through_the_environment(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run", tiny, data_dir=str(tmp_path / "gone"))
    monkeypatch.setenv("DDP_MNIST_DATA", str(tiny))
    assert run / "mistakes.png" in report.draw(run)


# Several runs


def test_runs_are_told_apart_by_name_settings_colour_and_style(run: Path, tmp_path: Path, tiny: Path) -> None:
    others = [make_run(tmp_path / f"run-{number}", tiny, lr=0.01 * number) for number in range(1, 9)]
    figure = figures.curves_figure([runlog.read_run(path) for path in [run, *others]])
    tests = figure.axes[0].lines[1::2]
    assert len({(line.get_color(), line.get_linestyle()) for line in tests}) == 9
    assert [tests[0].get_linestyle(), tests[1].get_linestyle()] == ["-", "--"]
    trains = figure.axes[0].lines[::2]
    assert [line.get_color() for line in trains] == [line.get_color() for line in tests]
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0] == "first: test 99.33 %, lr 0.001"
    assert texts[3] == "run-3: test 99.33 %, lr 0.03"
    assert figure.legends[0].get_lines()[1].get_color() == tests[1].get_color()
    looks_drawn(figures.png(figure))


def test_runs_with_other_batches_are_drawn_over_epochs(run: Path, tmp_path: Path, tiny: Path) -> None:
    lines = [line | {"step": 2 * line["step"]} for line in metrics({})]
    twice = {"per_epoch": 2 * PER_EPOCH, "summary": {"steps": 2 * STEPS}}
    other = make_run(tmp_path / "half", tiny, lines=lines, batch_size=32, **twice)
    figure = figures.curves_figure([runlog.read_run(run), runlog.read_run(other)])
    loss, accuracy = figure.axes
    assert accuracy.get_xlabel().startswith("epoch")
    assert not loss.child_axes
    assert np.allclose(loss.lines[1].get_xdata(), [1, 2])
    assert np.allclose(loss.lines[3].get_xdata(), [1, 2])


def test_each_setting_is_a_results_cause_or_none() -> None:
    """A new one has to be put into one of these lists."""
    how = {
        *("data_dir", "output_dir", "threads", "checkpoint_every", "keep_checkpoints", "fresh", "max_minutes"),
        *("timeout_minutes", "log_every", "pictures", "progress", "cuda_graphs"),
        *("wandb", "wandb_project", "wandb_entity", "wandb_group", "wandb_name", "wandb_tags", "wandb_model"),
    }
    assert not how & set(runlog.CAUSES)
    assert how | set(runlog.CAUSES) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_runs_that_only_save_or_look_otherwise_do_not_differ(run: Path, tmp_path: Path, tiny: Path) -> None:
    other = make_run(tmp_path / "second", tiny, checkpoint_every=7, fresh=True, max_minutes=3.0, threads=2)
    settings = [runlog.read_run(path).settings for path in (run, other)]
    assert runlog.differing(settings) == []
    assert runlog.differing([*settings, settings[0] | {"compile": True, "seed": 7}]) == ["seed", "compile"]


def test_the_page_of_several_runs_has_the_best_first(
    run: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = make_run(tmp_path / "best", tiny, seed=1, wandb_name="x", summary={"test_accuracy": 0.9987})
    going = make_run(tmp_path / "going", tiny, seed=2, lines=metrics({}, steps=10), summary={})
    (tmp_path / "elsewhere").mkdir()
    before = {path: sorted(path.iterdir()) for path in (run, best, going)}
    assert report.main([*map(str, (run, going, best))]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["wrote report/curves.png", "wrote report/report.html"]
    page = Page(tmp_path / "report" / "report.html")
    assert re.findall(r"<th>(.*?)</th>", page.source) == [
        *("run", "test accuracy", "test loss", "steps", "seed", "state")
    ]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", page.source)]
    assert rows == [
        ["best", "99.87%", "0.0500", "30", "1", "finished"],
        ["first", "99.33%", "0.0500", "30", "0", "finished"],
        ["going", "-", "-", "10", "2", "no summary yet"],
    ]
    assert page.pictures() == [(tmp_path / "report" / "curves.png").read_bytes()]
    assert f"{going}: There is no summary.json yet" in page.text
    assert {path: sorted(path.iterdir()) for path in (run, best, going)} == before


def test_runs_of_the_same_name_are_told_apart_by_their_parents(tmp_path: Path, tiny: Path) -> None:
    runs = [runlog.read_run(make_run(tmp_path / name, tiny)) for name in ("a/run", "b/run", "c")]
    assert runlog.labels(runs) == ["a/run", "b/run", "c"]


@pytest.mark.slow
def test_one_run_can_be_drawn_elsewhere(run: Path, tmp_path: Path) -> None:
    before = sorted(run.iterdir())
    assert report.main([str(run), "--output", str(tmp_path / "a" / "b")]) == 0
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted([*PICTURES, "report.html"])
    assert sorted(run.iterdir()) == before


# Damaged and foreign directories


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 2, "is not there; expected a run directory"),
        ({}, 2, "is not a run directory of ddp_mnist"),
        ({"config.json": '{"model_type": "bert"}'}, 2, "is not a run directory of ddp_mnist"),
        (
            {"metrics.jsonl": '{"step": 1, "epoch": 0}\n{"st\n{"step": 3, "epoch": 0}\n'},
            1,
            "metrics.jsonl is damaged: line 2 ",
        ),
        ({"metrics.jsonl": '{"loss": 1}\n'}, 1, "metrics.jsonl is damaged: line 1 "),
        ({"metrics.jsonl": "[1]\n\n"}, 1, "metrics.jsonl is damaged: line 1 "),
        ({"metrics.jsonl": '{"step": "1", "epoch": 0}\n'}, 1, "metrics.jsonl is damaged: line 1 "),
        ({"metrics.jsonl": "\xff\x00\n\n"}, 1, "metrics.jsonl is damaged: line 1 "),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, str] | None, code: int, message: str
) -> None:
    path = tmp_path / "run"
    if content is not None:
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text, encoding="latin-1")
    assert report.main([str(path)]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {path}")
    assert message in line
    assert content is None or {entry.name for entry in path.iterdir()} == set(content)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/proc/self/mem")  # its first page can be read by nobody
    assert report.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'metrics.jsonl'} cannot be read: Input/output error.\n"


def test_a_last_line_counts_without_its_end(tmp_path: Path, tiny: Path) -> None:
    run = make_run(tmp_path / "run", tiny, lines=metrics({}, steps=10), summary={})
    path = run / "metrics.jsonl"
    path.write_bytes(path.read_bytes().rstrip())
    assert [line["step"] for line in runlog.read_run(run).lines] == [5, 10]


def test_a_file_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="file is a file; expected a run directory"):
        report.draw(tmp_path / "file")


def test_a_place_that_cannot_be_written_is_named(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match=r"cannot be written: .* with --output"):
        report.draw(run, output=tmp_path / "file")


@pytest.mark.slow
def test_neither_torch_nor_pyplot_is_imported_and_matplotlib_only_to_draw(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ddp_mnist import report; before = set(sys.modules)\n"
        f"report.draw(Path({str(run)!r}))\n"
        "print('matplotlib' in before, {'torch', 'torchvision', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    ended = jobs.run([sys.executable, "-c", code])
    assert ended.out == "False set()\n", ended.err


# A run of the job itself


@pytest.mark.slow
def test_a_run_of_the_job_can_be_drawn(run_at: Any, tmp_path: Path) -> None:
    assert tmp_path / "curves.png" in report.draw(run_at(1), output=tmp_path)
