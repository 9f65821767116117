"""Pictures and page of a run, from what it has written: hand-made runs, so that every number is known."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import socket
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
from conftest import write_digits
from PIL import Image

from ddp_mnist.config import USER_DATA_PREFIX, TrainConfig
from ddp_mnist.report import figures
from ddp_mnist.report import page as report
from ddp_mnist.report.runs import CAUSES, RunLog, comparison, read_runs

STEPS, PER_EPOCH, EVERY = 30, 15, 5  # two epochs, a line every five steps
SETTINGS = {"dataset": "fashion-mnist", "recipe": "tutorial", "epochs": 2, "batch_size": 64, "lr": 0.001, "seed": 0}
CONFUSION = [[90 if row == column else (row + column) % 3 for column in range(10)] for row in range(10)]
CONFUSION[9][9] = 9  # a class of few images: an error weighs more in it
PICTURES = ["curves.png", "confusion.png", "mistakes.png"]


def mistakes(tiny: Path, count: int = 7) -> list[dict[str, Any]]:
    labels = (tiny / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").read_bytes()[8:]
    return [
        {"index": 3 * n, "label": labels[3 * n], "prediction": (labels[3 * n] + 1) % 10, "confidence": 0.99 - n / 100}
        for n in range(count)
    ]


def metrics(test: dict[str, Any], *, steps: int = STEPS) -> list[dict[str, Any]]:
    lines = []
    for step in range(EVERY, steps + 1, EVERY):
        line: dict[str, Any] = {"step": step, "epoch": (step - 1) // PER_EPOCH, "train/loss": 2 / step}
        line["train/accuracy"] = 1 - 1 / step
        if step % PER_EPOCH == 0:
            line |= {"test/loss": 1.5 / step, "test/accuracy": 1 - 0.2 / step, **test}
        lines.append(line)
    return lines


def make_run(
    path: Path, tiny: Path, lines: Any = None, summary: Any = None, per_epoch: int = PER_EPOCH, **settings: Any
) -> Path:
    """A finished run; `summary={}`: one that is going."""
    path.mkdir(parents=True)
    settings = SETTINGS | {"data_dir": str(tiny), "output_dir": str(path)} | settings
    content = {"settings": settings, "steps_per_epoch": per_epoch, "versions": {"torch": "9.8.7"}, "git": None}
    (path / "config.json").write_text(json.dumps(content))
    if lines is None:
        lines = metrics({"test/confusion": CONFUSION, "test/mistakes": mistakes(tiny)})
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = {"finished": True, "stop_reason": "finished", "steps": STEPS, "test_accuracy": 0.9933}
    if summary is None or summary:
        (path / "summary.json").write_text(json.dumps(ended | {"test_confusion": CONFUSION} | (summary or {})))
    return path


@pytest.fixture
def run(tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("DDP_MNIST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return make_run(tmp_path / "first", tiny)


def looks_drawn(content: bytes) -> None:
    image = Image.open(io.BytesIO(content))
    assert image.format == "PNG" and min(image.size) > 500
    colours = image.convert("RGB").getcolors(2**24) or []
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
        return [base64.b64decode(each.removeprefix("data:image/png;base64,")) for each in self.references]


def read(path: Path) -> RunLog:
    return read_runs([path])[0]


def draw(*paths: Path, **options: Any) -> list[str]:
    """Draw the runs; return the names of the files that were written."""
    return [Path(line.removeprefix("wrote ")).name for line in report.draw(paths, **options) if "wrote " in line]


# One run


def test_a_finished_run_has_three_pictures_and_a_page_that_needs_no_network(run: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert report.draw([run]) == [f"wrote {run / name}" for name in [*PICTURES, "report.html"]]
    for name in PICTURES:
        looks_drawn((run / name).read_bytes())
    page = Page(run / "report.html")
    assert page.pictures() == [(run / name).read_bytes() for name in PICTURES]
    assert "test_confusion" not in page.text
    for text in ("99.33%", "fashion-mnist", "finished", "batch_size", "stop_reason", "9.8.7"):
        assert text in page.text
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    text = re.sub(r"base64,[A-Za-z0-9+=/]+", "", page.source)
    assert not re.search(r"https?:|//|url\(|@import", text.replace(str(run.parents[0]), ""))
    assert {path.name for path in run.iterdir()} == {*before, *PICTURES, "report.html"}
    assert all((run / name).read_bytes() == content for name, content in before.items())


def test_names_and_settings_are_text_and_neither_markup_nor_formulas(tmp_path: Path, tiny: Path) -> None:
    runs = [tmp_path / "<b>$_$b", tmp_path / "$_$"]
    for path in runs:
        make_run(path, tiny, init_from="<script>alert('x')</script>&amp;", dataset="<i>")
        draw(path)
    page = Page(runs[0] / "report.html")
    assert not {"script", "i", "b"} & set(page.tags)
    assert "<b>$_$b" in page.text and "<script>alert('x')</script>&amp;" in page.text
    draw(*runs, output=tmp_path / "both")


def test_the_curves_are_the_lines_of_the_file(run: Path) -> None:
    lines = jobs.read_metrics(run)
    figure = figures.curves_figure([read(run)])
    figures.png(figure)
    loss, accuracy = figure.axes
    assert [loss.get_ylabel(), accuracy.get_ylabel(), accuracy.get_xlabel()] == ["loss", "accuracy", "step"]
    for axes, key in (loss, "loss"), (accuracy, "accuracy"):
        train, test = axes.lines
        assert [*zip(*train.get_data(), strict=True)] == [(line["step"], line[f"train/{key}"]) for line in lines]
        scored = [(line["step"], line[f"test/{key}"]) for line in lines if f"test/{key}" in line]
        assert [*zip(*test.get_data(), strict=True)] == scored
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["training", "test"]
        shown = [(line.get_linewidth(), line.get_color()) for line in (train, test, *axes.get_legend().get_lines())]
        assert shown[:2] == shown[2:] and shown[0] != shown[1]
    assert [text.get_text() for text in loss.texts + accuracy.texts] == ["0.0500", "99.33%"]
    assert figure.get_suptitle() == "first\nFashion-MNIST: loss and accuracy"
    (epochs,) = loss.child_axes
    assert epochs.get_xlabel() == "epoch"
    assert [tick for tick in epochs.get_xticks() if 0 <= tick <= 2] == [0, 1, 2]
    assert np.allclose(epochs.get_xlim(), np.divide(loss.get_xlim(), PER_EPOCH))


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_accuracies_are_inside_the_picture_and_high_ones_apart(tmp_path: Path, tiny: Path, share: float) -> None:
    lines = [line | {"train/accuracy": share} for line in metrics({})]
    figure = figures.curves_figure([read(make_run(tmp_path / "run", tiny, lines=lines))])
    figures.png(figure)
    axes = figure.axes[1]
    points = axes.transData.transform([(0, each) for each in (share, 0.9, 0.98, 0.99, 0.9933)])
    own, *heights = axes.transAxes.inverted().transform(points)[:, 1]
    assert 0 <= own <= 1 and 0 <= heights[0] < heights[-1] <= 1
    assert all(np.diff(heights) > 0.04)


def test_the_confusion_matrix_shows_each_count_and_the_errors_in_colour(run: Path) -> None:
    figure = figures.confusion_figure(read(run))
    matrix = figure.axes[0]
    shown = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in matrix.texts}
    assert shown == {
        (row, column): str(count) for row, line in enumerate(CONFUSION) for column, count in enumerate(line) if count
    }
    (image,) = matrix.images
    colours = image.to_rgba(image.get_array())
    assert not colours[range(10), range(10), 3].any(), "the diagonal has the colour of what is behind it"
    white, one, two = (1 - colours[0, column, :3].min() for column in (3, 1, 2))
    assert [CONFUSION[0][column] for column in (3, 1, 2)] == [0, 1, 2]
    assert white < 0.1 < one < two
    weights = image.norm(image.get_array())
    assert CONFUSION[9][7] == CONFUSION[7][9] and weights[9, 7] > weights[7, 9]
    (accuracies,) = matrix.child_axes
    assert [label.get_text() for label in accuracies.get_yticklabels()] == [
        f"{row[label] / sum(row):.1%}" for label, row in enumerate(CONFUSION)
    ]
    for labels in matrix.get_xticklabels(), matrix.get_yticklabels():
        assert [label.get_text() for label in labels[::9]] == ["T-shirt/top", "Ankle boot"]
    wrong = sum(map(sum, CONFUSION)) - 819
    assert f"{wrong} of {819 + wrong} wrong" in figure.get_supxlabel()
    looks_drawn(figures.png(figure))


@pytest.mark.parametrize("counts", [np.diag([9] * 4 + [0] + [9] * 5), np.zeros((10, 10), int), np.ones((60, 60), int)])
def test_perfect_empty_and_many_classes_are_drawn(run: Path, counts: Any) -> None:
    log = read(run)
    log.score["test/confusion"] = counts.tolist()
    figure = figures.confusion_figure(log)
    assert len(figure.axes[0].texts) == (9 if counts.trace() == 81 else 0), "of 60 classes nobody can read them"
    figures.png(figure)


def test_the_mistakes_have_their_images_classes_and_confidence(run: Path, tiny: Path) -> None:
    images = np.arange(7 * 784, dtype=np.uint8).reshape(7, 28, 28)
    figure = figures.mistakes_figure(read(run), images)
    names = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
    (axes,) = figure.axes
    assert len(axes.images) == len(axes.texts) == len(axes.patches) == 7 and not axes.axison
    for number, each in enumerate(mistakes(tiny)):
        drawn, frame, text = axes.images[number], axes.patches[number], axes.texts[number]
        assert (np.asarray(drawn.get_array()) == images[number]).all()
        expected = f"{names[each['label']]} → {names[each['prediction']]}\n{100 * each['confidence']:.2f}%"
        assert text.get_text() == expected
        left, right, bottom, top = drawn.get_extent()
        assert frame.get_xy() == (left, top) and left < text.get_position()[0] < right and text.get_position()[1] < top
        assert axes.viewLim.x0 <= left < right <= axes.viewLim.x1 and axes.viewLim.y1 < top < bottom < axes.viewLim.y0
    assert len({tuple(drawn.get_extent()) for drawn in axes.images}) == 7
    looks_drawn(figures.png(figure))


@pytest.mark.parametrize("elsewhere", [False, True])
def test_the_images_come_from_the_test_set(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, elsewhere: bool
) -> None:
    """Of the run's folder, or where that is gone, of the environment's."""
    monkeypatch.setenv("DDP_MNIST_DATA", str(tiny if elsewhere else tmp_path / "nowhere"))
    run = make_run(tmp_path / "run", tiny, data_dir=str(tmp_path / "gone" if elsewhere else tiny))
    seen, mistakes_figure = [], figures.mistakes_figure
    monkeypatch.setattr(
        figures, "mistakes_figure", lambda log, images: seen.append(images) or mistakes_figure(log, images)
    )
    assert "mistakes.png" in draw(run)
    pixels = np.fromfile(tiny / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte", np.uint8, offset=16)
    assert (seen[0] == pixels.reshape(-1, 28, 28)[0:21:3]).all()


@pytest.mark.parametrize(
    ("dataset", "title"),
    [("mnist", "MNIST"), ("fashion-mnist", "Fashion-MNIST"), ("synthetic", "GENERATED DIGITS (NOT MNIST)")],
)
def test_the_dataset_stands_in_every_picture(tmp_path: Path, tiny: Path, dataset: str, title: str) -> None:
    path = make_run(tmp_path / "run", tiny, dataset=dataset)
    run, images = read(path), np.zeros((7, 28, 28), np.uint8)
    curves, both = figures.curves_figure([run]), figures.curves_figure([run, run])
    for figure in curves, both, figures.confusion_figure(run), figures.mistakes_figure(run, images):
        assert figure.get_suptitle().splitlines()[-1].startswith(f"{title}: ")
    report.draw([path, path], output=tmp_path)
    assert ("Generated digits are not MNIST" in Page(tmp_path / "report.html").text) == (dataset == "synthetic")


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
    page = Page(run / "report.html")
    assert len(page.pictures()) == 1 and "no summary yet" in page.text
    for text in ("still going", "no test score before the end of an epoch"):
        assert text in said and text in page.text


@pytest.mark.parametrize(
    ("name", "content", "notes"),
    [
        ("config.json", {"settings": SETTINGS}, ["no summary yet", "no curves"]),
        ("summary.json", {"stop_reason": "nan", "steps": 0}, ["stopped: nan", "config.json is missing"]),
    ],
)
def test_a_run_without_a_step_has_a_page(tmp_path: Path, name: str, content: Any, notes: list[str]) -> None:
    (tmp_path / name).write_text(json.dumps(content))
    assert draw(tmp_path) == ["report.html"]
    assert [note for note in notes if note not in Page(tmp_path / "report.html").text] == []


def test_the_score_of_a_run_stopped_within_an_epoch_is_in_its_summary(tmp_path: Path, tiny: Path) -> None:
    summary = {"finished": False, "stop_reason": "max_steps", "steps": 12, "test_accuracy": 0.5, "test_loss": 1.5}
    summary["test_mistakes"] = mistakes(tiny)
    run = make_run(tmp_path / "run", tiny, lines=metrics({}, steps=10), summary=summary)
    assert draw(run) == [*PICTURES, "report.html"]
    _, test = figures.curves_figure([read(run)]).axes[1].lines
    assert [*zip(*test.get_data(), strict=True)] == [(12, 0.5)]
    assert "no test score" not in Page(run / "report.html").text


def test_pictures_of_a_run_that_was_set_aside_do_not_stay(run: Path) -> None:
    draw(run)
    (run / "metrics.jsonl").write_text(json.dumps(metrics({})[0]) + "\n")
    (run / "summary.json").unlink()
    draw(run)
    assert sorted(path.name for path in run.glob("*.png")) == ["curves.png"]


@pytest.mark.parametrize("found", ["nothing", "fewer images", "other labels", "a script's own data"])
def test_without_the_images_the_rest_is_drawn_and_the_page_says_why(
    run: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: str
) -> None:
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("goes to the network"))
    folder = tmp_path / "other"
    if found in ("fewer images", "other labels"):
        labels = write_digits(folder, 10, 12 if found == "fewer images" else 40) / "t10k-labels-idx1-ubyte"
        labels.write_bytes(labels.read_bytes()[:8] + bytes(len(labels.read_bytes()) - 8))
        why = "not those that the run was scored on"
    elif found == "nothing":
        why = str(folder)
    else:
        run, why = make_run(tmp_path / "own", tiny, dataset=f"{USER_DATA_PREFIX}12"), "no images of the data set"
    assert draw(run, data_dir=folder) == ["curves.png", "confusion.png", "report.html"]
    text = Page(run / "report.html").text
    assert "no picture of the mistakes" in text and why in text
    assert folder.exists() == (why == "not those that the run was scored on")


# Several runs


def test_runs_are_told_apart_by_name_settings_colour_and_style(run: Path, tmp_path: Path, tiny: Path) -> None:
    others = [make_run(tmp_path / f"run-{number}", tiny, lr=0.01 * number) for number in range(1, 9)]
    figure = figures.curves_figure(read_runs([run, *others]))
    tests, trains = figure.axes[0].lines[1::2], figure.axes[0].lines[::2]
    assert len({(line.get_color(), line.get_linestyle()) for line in tests}) == 9
    assert [tests[0].get_linestyle(), tests[1].get_linestyle()] == ["-", "--"]
    assert [line.get_color() for line in trains] == [line.get_color() for line in tests]
    heads, *rows = [text.get_text() for text in figure.legends[0].get_texts()]
    assert heads.split() == ["run", "test", "accuracy", "test", "loss", "steps", "lr", "state"]
    assert [rows[number].split() for number in (0, 3)] == [
        ["first", "99.33%", "0.0500", "30", "0.001", "finished"],
        ["run-3", "99.33%", "0.0500", "30", "0.03", "finished"],
    ]
    assert [line.get_color() for line in figure.legends[0].get_lines()[1:]] == [line.get_color() for line in tests]
    looks_drawn(figures.png(figure))


def test_runs_with_other_batches_are_drawn_over_epochs(run: Path, tmp_path: Path, tiny: Path) -> None:
    lines = [line | {"step": 2 * line["step"]} for line in metrics({})]
    twice: dict[str, Any] = {"per_epoch": 2 * PER_EPOCH, "summary": {"steps": 2 * STEPS}}
    other = make_run(tmp_path / "half", tiny, lines=lines, batch_size=32, **twice)
    loss, accuracy = figures.curves_figure(read_runs([run, other])).axes
    assert accuracy.get_xlabel().startswith("epoch") and not loss.child_axes
    assert np.allclose(loss.lines[1].get_xdata(), [1, 2]) and np.allclose(loss.lines[3].get_xdata(), [1, 2])


def test_each_setting_is_a_results_cause_or_none() -> None:
    """A new one has to be put into one of these lists."""
    how = {
        *("data_dir", "output_dir", "threads", "checkpoint_every", "keep_checkpoints", "fresh", "max_minutes"),
        *("timeout_minutes", "log_every", "pictures", "progress", "cuda_graphs"),
        *("wandb", "wandb_project", "wandb_entity", "wandb_group", "wandb_name", "wandb_tags", "wandb_model"),
    }
    assert not how & set(CAUSES)
    assert how | set(CAUSES) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_the_page_of_several_runs_has_the_best_first(
    run: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line | ({"test/accuracy": 0.9987} if "test/accuracy" in line else {}) for line in metrics({})]
    best = make_run(tmp_path / "best", tiny, seed=1, wandb_name="x", threads=2, lines=lines)
    going = make_run(tmp_path / "going", tiny, seed=2, compile=True, lines=metrics({}, steps=10), summary={})
    before = {path: sorted(path.iterdir()) for path in (run, best, going)}
    assert report.main([*map(str, (run, going, best))]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["wrote report/curves.png", "wrote report/report.html"]
    page = Page(tmp_path / "report" / "report.html")
    assert re.findall(r"<th>(.*?)</th>", page.source) == [
        *("run", "test accuracy", "test loss", "steps", "seed", "compile", "state")
    ]
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", page.source)]
    assert rows == [
        ["best", "99.87%", "0.0500", "30", "1", "-", "finished"],
        ["first", "99.33%", "0.0500", "30", "0", "-", "finished"],
        ["going", "-", "-", "10", "2", "True", "no summary yet"],
    ]
    assert page.pictures() == [(tmp_path / "report" / "curves.png").read_bytes()]
    assert f"{going}: There is no summary.json yet" in page.text
    assert {path: sorted(path.iterdir()) for path in (run, best, going)} == before


def test_the_table_has_a_row_for_every_run_also_without_metrics(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ends: dict[str, dict[str, Any]] = {
        "a": {"finished": True, "test_accuracy": 0.9, "test_loss": 0.3, "steps": 8},
        "b": {"finished": True, "test_accuracy": 0.95, "test_loss": 0.21, "steps": 8},
        "c": {},
        "d": {"finished": False, "stop_reason": "SIGUSR2", "test_accuracy": None, "steps": 3},
    }
    for number, (name, summary) in enumerate(ends.items(), start=1):
        (tmp_path / name).mkdir()
        settings = {"seed": 0, "output_dir": name, "lr": number / 10}
        (tmp_path / name / "config.json").write_text(json.dumps({"settings": settings}))
        if summary:
            (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "e").mkdir()
    assert report.main(["--table", *(str(tmp_path / name) for name in "abcde")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "run  test accuracy  test loss  steps  lr   state",
        "b    95.00%         0.2100     8      0.2  finished",
        "a    90.00%         0.3000     8      0.1  finished",
        "c    -              -          -      0.3  no summary yet",
        "d    -              -          3      0.4  stopped: SIGUSR2",
        "e    -              -          -      -    not started",
    ]
    assert not [path for path in tmp_path.rglob("*") if path.suffix in (".png", ".html")]


def test_runs_of_the_same_name_are_told_apart_by_their_paths(tmp_path: Path, tiny: Path) -> None:
    runs = [make_run(tmp_path / name, tiny) for name in ("a/run", "b/run", "c")]
    assert {row[0] for row in comparison(read_runs(runs))[1:]} == {str(runs[0]), str(runs[1]), "c"}


# Damaged and foreign directories


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no directory; expected a run directory"),
        ({}, "is not a run directory of ddp_mnist"),
        ({"config.json": '{"model_type": "bert"}'}, "is not a run directory of ddp_mnist"),
        ({"metrics.jsonl": '{"step": 1}\n{"st\n{"step": 3}\n'}, "metrics.jsonl is damaged: line 2 "),
        ({"metrics.jsonl": '{"loss": 1}\n'}, "metrics.jsonl is damaged: line 1 "),
        ({"metrics.jsonl": "[1]\n\n"}, "metrics.jsonl is damaged: line 1 "),
        ({"metrics.jsonl": "\xff\x00\n\n"}, "metrics.jsonl is damaged: line 1 "),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: dict[str, str] | None, message: str
) -> None:
    path = tmp_path / "run"
    if content is not None:
        path.mkdir()
        for name, text in content.items():
            (path / name).write_text(text, encoding="latin-1")
    for options in ([], ["--table"]):
        assert report.main([str(path), *options]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path}") and message in line
    assert content is None or {entry.name for entry in path.iterdir()} == set(content)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/proc/self/mem")  # its first page can be read by nobody
    assert report.main([str(tmp_path)]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'metrics.jsonl'} cannot be read: Input/output error.\n"


def test_a_place_that_cannot_be_written_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    assert report.main([str(run), "--output", str(tmp_path / "file")]) == 1
    assert re.match(r"error: .*file cannot be written: .* with --output", capsys.readouterr().err)


@pytest.mark.slow
def test_neither_torch_nor_pyplot_is_imported_and_matplotlib_only_to_draw(run: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from ddp_mnist.report import page as report\n"
        f"path = Path({str(run)!r}); report.main([str(path), '--table'])\n"
        "before = set(sys.modules); report.draw([path])\n"
        "print({'matplotlib', 'jinja2'} & before, {'torch', 'torchvision', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    ended = jobs.run([sys.executable, "-c", code])
    assert ended.out.splitlines()[-1] == "set() set()", ended.err


# A run of the job itself


@pytest.mark.slow
def test_a_run_of_the_job_can_be_drawn_elsewhere(run_at: Any, tmp_path: Path) -> None:
    before = sorted(run_at(1).iterdir())
    assert draw(run_at(1), output=tmp_path / "a" / "b") == [*PICTURES, "report.html"]
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted([*PICTURES, "report.html"])
    assert sorted(run_at(1).iterdir()) == before
