"""Pictures and page of a run, from what it has written: hand-made runs, so that every number is known."""

from __future__ import annotations

import base64
import html
import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import pytest
from PIL import Image

from ddp_mnist.config import USER_DATA_PREFIX
from ddp_mnist.report import figures
from ddp_mnist.report import page as report
from ddp_mnist.report.__main__ import main
from ddp_mnist.report.runs import RunLog, read_runs

PER_EPOCH = 15
NAME = "<b>$_$b"  # neither markup nor a formula
SETTINGS = {"dataset": "fashion-mnist", "recipe": "tutorial", "epochs": 2, "batch_size": 64, "lr": 0.001, "seed": 0}
CONFUSION = [[90 if row == column else (row + column) % 3 for column in range(10)] for row in range(10)]
CONFUSION[9][9] = 9  # a class of few images: an error weighs more in it
PICTURES = ["curves.png", "confusion.png", "mistakes.png"]


def mistakes(tiny: Path) -> list[dict[str, Any]]:
    labels = (tiny / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte").read_bytes()[8:]
    return [
        {"index": 3 * n, "label": labels[3 * n], "prediction": (labels[3 * n] + 1) % 10, "confidence": 0.99 - n / 100}
        for n in range(7)
    ]


def metrics(steps: int = 2 * PER_EPOCH, **score: Any) -> list[dict[str, Any]]:
    """Two epochs, a line every five steps; `score` is part of each test score."""
    lines = [{"step": step, "train/loss": 2 / step, "train/accuracy": 1 - 1 / step} for step in range(5, steps + 1, 5)]
    for line in lines[2::3]:
        line |= {"test/loss": 1.5 / line["step"], "test/accuracy": 1 - 0.2 / line["step"]}
        line |= {f"test/{name}": value for name, value in score.items()}
    return lines


def make_run(path: Path, tiny: Path, lines: Any, summary: Any = None, **settings: Any) -> Path:
    """A finished run; `summary={}`: one that is going."""
    path.mkdir(parents=True)
    settings = SETTINGS | {"data_dir": str(tiny), "output_dir": str(path)} | settings
    content = {"settings": settings, "steps_per_epoch": PER_EPOCH, "versions": {"torch": "9.8.7"}, "git": None}
    (path / "config.json").write_text(json.dumps(content))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    ended = {"finished": True, "stop_reason": "finished", "steps": 2 * PER_EPOCH, "test_confusion": CONFUSION}
    if summary is None or summary:
        (path / "summary.json").write_text(json.dumps(ended | {"test_accuracy": 0.9933} | (summary or {})))
    return path


@pytest.fixture
def run(request: Any, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run; its pictures have no pixels, which take most of the time, in tests that are not slow."""
    monkeypatch.delenv("DDP_MNIST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    if request.node.get_closest_marker("slow") is None:
        monkeypatch.setattr(figures, "png", lambda figure: b"a picture")
    return make_run(tmp_path / NAME, tiny, metrics(confusion=CONFUSION, mistakes=mistakes(tiny)))


def read(path: Path) -> RunLog:
    return read_runs([path])[0]


def draw(*paths: Path, **options: Any) -> list[str]:
    return [Path(line.removeprefix("wrote ")).name for line in report.draw(paths, **options) if "wrote " in line]


def page_of(path: Path) -> str:
    return html.unescape((path / "report.html").read_text())


@pytest.mark.slow
def test_a_finished_run_has_three_pictures_and_a_page_that_needs_no_network(run: Path) -> None:
    assert report.draw([run]) == [f"wrote {run / name}" for name in [*PICTURES, "report.html"]]
    page = page_of(run)
    for name in PICTURES:
        image = Image.open(run / name)
        shades = image.convert("L").histogram()
        assert image.format == "PNG" and min(image.size) > 500 and max(shades) < 0.97 * sum(shades), "nearly blank"
        assert base64.b64encode((run / name).read_bytes()).decode() in page
    assert "test_confusion" not in page and "Generated digits" not in page
    assert "<b>" not in (run / "report.html").read_text()
    for text in (NAME, "99.33%", "fashion-mnist", "finished", "batch_size", "stop_reason", "9.8.7"):
        assert text in page
    text = re.sub(r"base64,[A-Za-z0-9+=/]+", "", page).replace(str(run.parents[0]), "")
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<iframe", text)


def test_the_curves_are_the_lines_of_the_file_over_epochs(run: Path) -> None:
    lines = jobs.read_metrics(run)
    figure = figures.curves_figure([read(run)])
    loss, accuracy = figure.axes
    for axes, key in (loss, "loss"), (accuracy, "accuracy"):
        for curve, name in zip(axes.lines, ("train", "test"), strict=True):
            having = [line for line in lines if f"{name}/{key}" in line]
            heights = np.asarray(curve.get_ydata())
            assert curve.get_xdata() == pytest.approx([line["step"] / PER_EPOCH for line in having])
            values = [line[f"{name}/{key}"] for line in having]
            assert (heights if axes is loss else 1 - heights) == pytest.approx(values)
    figure.draw_without_rendering()
    assert "95%" in [label.get_text() for label in accuracy.get_yticklabels()]
    assert figure.get_suptitle() == f"{NAME}\nfashion-mnist: loss and accuracy" and accuracy.get_xlabel() == "epoch"
    (run / "config.json").write_text(json.dumps({"settings": {"dataset": "synthetic"}}))
    figure = figures.curves_figure([read(run)])
    assert "GENERATED DIGITS (NOT MNIST)" in figure.get_suptitle() and figure.axes[1].get_xlabel() == "step"


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_accuracies_are_inside_the_picture_and_high_ones_apart(tmp_path: Path, tiny: Path, share: float) -> None:
    lines = [line | {"train/accuracy": share} for line in metrics()]
    axes = figures.curves_figure([read(make_run(tmp_path / "run", tiny, lines))]).axes[1]
    to_axes = axes.transData + axes.transAxes.inverted()
    drawn = np.concatenate([to_axes.transform(line.get_xydata())[:, 1] for line in axes.lines])
    assert ((drawn > 0) & (drawn < 1)).all()
    heights = to_axes.transform([(0, 1 - each) for each in (0.9, 0.98, 0.99, 0.9933)])[:, 1]
    assert min(np.diff(heights)) > 0.04


def test_the_confusion_matrix_shows_each_count_and_the_errors_in_colour(run: Path) -> None:
    figure = figures.confusion_figure(read(run))
    matrix, counts = figure.axes[0], np.array(CONFUSION)
    shown = {(text.get_position()[1], text.get_position()[0]): int(text.get_text()) for text in matrix.texts}
    assert shown == {(row, column): counts[row, column] for row, column in zip(*counts.nonzero(), strict=True)}
    weights = matrix.images[0].norm(matrix.images[0].get_array())
    assert np.ma.getmaskarray(weights).diagonal().all(), "the diagonal has a colour"
    assert weights[0, 3] < weights[0, 1] < weights[0, 2]  # of 0, 1 and 2 errors
    assert counts[9, 7] == counts[7, 9] and weights[9, 7] > weights[7, 9]
    shares = [f"{row[label] / sum(row):.1%}" for label, row in enumerate(CONFUSION)]
    names = figures.class_names("fashion-mnist")
    assert [label.get_text() for label in matrix.get_yticklabels()] == [*map("{}\n{}".format, names, shares)]
    assert [label.get_text() for label in matrix.get_xticklabels()] == [*names]
    assert f"{counts.sum() - 819} of {counts.sum()} wrong" in figure.get_supxlabel()


@pytest.mark.parametrize("counts", [np.diag([9] * 4 + [0] + [9] * 5), np.zeros((10, 10), int), np.ones((60, 60), int)])
def test_perfect_empty_and_many_classes_are_drawn(run: Path, counts: Any) -> None:
    log = read(run)
    log.score["test/confusion"] = counts.tolist()
    figure = figures.confusion_figure(log)
    assert len(figure.axes[0].texts) == (9 if counts.trace() == 81 else 0), "of 60 classes nobody can read them"
    figure.draw_without_rendering()


def test_the_mistakes_have_their_images_classes_and_confidence(run: Path, tiny: Path) -> None:
    images = np.arange(7 * 784, dtype=np.uint8).reshape(7, 28, 28)
    for image, axes, each in zip(images, figures.mistakes_figure(read(run), images).axes, mistakes(tiny), strict=True):
        names = [figures.class_names("fashion-mnist")[each[key]] for key in ("label", "prediction")]
        assert (np.asarray(axes.images[0].get_array()) == image).all()
        assert axes.get_title() == f"{names[0]} → {names[1]}\n{100 * each['confidence']:.2f}%"


@pytest.mark.parametrize("dataset", ["mnist", "fashion-mnist"])
def test_a_network_may_answer_what_is_no_class(run: Path, dataset: str) -> None:
    log = replace(read(run), dataset=dataset)
    log.score["test/mistakes"] = [{"label": 3, "prediction": 712, "confidence": 0.5}]
    (axes,) = figures.mistakes_figure(log, np.zeros((1, 28, 28), np.uint8)).axes
    assert "→ 712" in axes.get_title()


@pytest.mark.parametrize("is_set", [True, False])  # an empty variable is no variable
def test_where_the_runs_data_are_gone_the_environments_are_used(
    run: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, is_set: bool
) -> None:
    Path("data").symlink_to(tiny)
    (run / "config.json").write_text(json.dumps({"settings": SETTINGS | {"data_dir": str(run / "gone")}}))
    monkeypatch.setenv("DDP_MNIST_DATA", str(tiny) if is_set else "")
    seen: list[Any] = []
    monkeypatch.setattr(figures, "mistakes_figure", lambda log, images: seen.append(images))
    assert draw(run) == [*PICTURES, "report.html"]
    pixels = np.fromfile(tiny / "FashionMNIST" / "raw" / "t10k-images-idx3-ubyte", np.uint8, offset=16)
    assert (seen[0] == pixels.reshape(-1, 28, 28)[0:21:3]).all()


def test_a_run_that_is_going_is_drawn_as_far_as_it_is(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_text(json.dumps({"settings": SETTINGS | {"dataset": "synthetic"}}))
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in metrics(10)) + '{"step": 15, "epo')
    (run / "summary.json").unlink()
    assert main([str(run)]) == 0
    said, page = capsys.readouterr().out, page_of(run)
    assert said.splitlines() == [f"wrote {run / 'curves.png'}", f"wrote {run / 'report.html'}"]
    assert page.count("<img") == 1 and "no summary yet" in page and "Generated digits are not MNIST" in page


def test_a_run_without_a_step_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({"stop_reason": "nan", "steps": 0}))
    assert draw(tmp_path) == ["report.html"]
    assert "stopped: nan" in page_of(tmp_path)


def test_the_score_of_a_run_stopped_within_an_epoch_is_in_its_summary(tmp_path: Path, tiny: Path) -> None:
    summary = {"finished": False, "stop_reason": "max_steps", "steps": 12, "test_accuracy": 0.5, "test_loss": 1.5}
    run = read(make_run(tmp_path / "run", tiny, metrics(10), summary))
    assert run.score["test/loss"] == 1.5 and run.score["test/confusion"] == CONFUSION
    assert run.series("test/accuracy") == ([12], [0.5])


@pytest.mark.parametrize(
    ("dataset", "why"),
    [
        ("fashion-mnist", "t10k-images-idx3-ubyte: missing"),
        (f"{USER_DATA_PREFIX}12", "no images of the data set"),
    ],
)
def test_without_the_images_the_rest_is_drawn_and_the_page_says_why(
    run: Path, monkeypatch: pytest.MonkeyPatch, dataset: str, why: str
) -> None:
    monkeypatch.setattr("socket.socket", lambda *_: pytest.fail("goes to the network"))
    (run / "config.json").write_text(json.dumps({"settings": SETTINGS | {"dataset": dataset}}))
    other = run.parent / "other"
    assert draw(run, data_dir=other) == ["curves.png", "confusion.png", "report.html"]
    assert "no picture of the mistakes" in page_of(run) and why in page_of(run)
    assert not other.exists()


def test_runs_are_told_apart_by_name_settings_colour_and_style(run: Path, tmp_path: Path, tiny: Path) -> None:
    others = [make_run(tmp_path / f"run-{number}", tiny, metrics(), lr=0.01 * number) for number in range(1, 9)]
    figure = figures.curves_figure(read_runs([run, *others]))
    tests, trains = figure.axes[0].lines[1::2], figure.axes[0].lines[::2]
    assert len({(line.get_color(), line.get_linestyle()) for line in tests}) == 9
    assert [line.get_color() for line in trains] == [line.get_color() for line in tests]
    shown = [(line.get_color(), line.get_linestyle()) for line in figure.legends[0].get_lines()]
    assert shown == [(line.get_color(), line.get_linestyle()) for line in tests]
    assert [text.get_text() for text in figure.legends[0].get_texts()][1:] == [*map(str, others)]
    figure.draw_without_rendering()


def test_page_and_table_of_several_runs_have_the_best_first(
    run: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line | ({"test/accuracy": 0.9987} if "test/accuracy" in line else {}) for line in metrics()]
    best = make_run(tmp_path / "best", tiny, lines, seed=1, wandb_name="x", threads=2)
    going = make_run(tmp_path / "going", tiny, metrics(10), summary={}, seed=2, compile=True)
    (twin := tmp_path / "other" / "best").mkdir(parents=True)  # of the same name, with nothing in it yet
    paths = [run, going, twin, best]
    assert main([*map(str, paths), "--table"]) == 0
    head, *rows = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    assert head == ["run", "test accuracy", "test loss", "steps", "seed", "compile", "state"]
    assert rows == [
        [str(best), "99.87%", "0.0500", "30", "1", "-", "finished"],
        [str(run), "99.33%", "0.0500", "30", "0", "-", "finished"],
        [str(going), "-", "-", "10", "2", "True", "no summary yet"],
        [str(twin), "-", "-", "-", "-", "-", "not started"],
    ]
    assert main([*map(str, paths)]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == ["wrote report/curves.png", "wrote report/report.html"]
    page = page_of(tmp_path / "report")
    assert re.findall(r"<th>(.*?)</th>", page) == head
    assert [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr>(<td>.*?)</tr>", page)] == rows
    assert page.count("<img") == 1


def test_a_run_without_class_labels_has_the_curve_of_its_loss(
    run: Path, tmp_path: Path, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing = dict.fromkeys(["test_accuracy", "test_correct", "test_confusion", "test_mistakes", "train_accuracy"])
    lines = [{key: value for key, value in line.items() if not key.endswith("accuracy")} for line in metrics()]
    worse = make_run(tmp_path / "worse", tiny, lines, nothing, dataset=f"{USER_DATA_PREFIX}1")
    lines = [line | ({"test/accuracy": None, "test/loss": 0.0} if "test/loss" in line else {}) for line in lines]
    better = make_run(tmp_path / "better", tiny, lines, nothing | {"test_loss": 0.0}, dataset=f"{USER_DATA_PREFIX}1")
    assert draw(better) == ["curves.png", "report.html"] and "<td>-</td>" in page_of(better)
    (axes,) = figures.curves_figure([read(better)]).axes
    assert (axes.get_ylabel(), axes.get_xlabel(), len(axes.lines)) == ("loss", "epoch", 2)
    assert axes.get_yscale() == "linear", "zero has no logarithm"
    assert len(figures.curves_figure(read_runs([worse, run])).axes) == 2
    stopped = {"steps": 12, "test_loss": 0.02, "finished": False, "stop_reason": "max_steps"}
    within = make_run(tmp_path / "within", tiny, lines[:2], nothing | stopped)
    assert main([*map(str, [worse, within, run, better]), "--table"]) == 0
    rows = [re.split("  +", line)[:4] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows[0][1] == "99.33%"
    assert rows[1:] == [
        [str(better), "-", "0.0000", "30"],
        [str(within), "-", "0.0200", "12"],
        [str(worse), "-", "0.0500", "30"],
    ]
    assert draw(worse, within, run, better, output=tmp_path / "all") == ["curves.png", "report.html"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("", "", "is not a run directory of ddp_mnist"),
        ("config.json", '{"model_type": "bert"}', "is not a run directory of ddp_mnist"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "metrics.jsonl: line 2 is damaged"),
        ("metrics.jsonl", "[1]\n\n", "metrics.jsonl: line 1 is damaged"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, message: str
) -> None:
    path = tmp_path / "run"
    if name:
        path.mkdir()
        (path / name).write_text(content)
    for options in ([], ["--table"]):
        assert main([str(path), *options]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {path}") and message in line


def test_what_cannot_be_read_or_written_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").unlink()
    assert main([str(run), "--output", str(run / "config.json")]) == 1
    assert re.match(r"error: .*config.json could not be written: ", capsys.readouterr().err)
    (run / "metrics.jsonl").symlink_to("/proc/self/mem")  # its first page can be read by nobody
    assert main([str(run)]) == 1
    assert re.match(r"error: .*metrics.jsonl: .* cannot be read: .*Input/output error", capsys.readouterr().err)


@pytest.mark.slow
def test_a_run_of_the_job_is_drawn_elsewhere_without_torch_and_pyplot(run_at: Any, tmp_path: Path) -> None:
    code = (
        f"import sys; from ddp_mnist.report.__main__ import main; main(['--table', run := {str(run_at(1))!r}])\n"
        "early = {'matplotlib', 'jinja2'} & set(sys.modules); main([run, '--output', 'a/b'])\n"
        "print(early, {'torch', 'torchvision', 'matplotlib.pyplot'} & set(sys.modules))"
    )
    ended = jobs.run([sys.executable, "-c", code], cwd=tmp_path)
    assert ended.out.splitlines()[-1] == "set() set()", ended.err
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == sorted([*PICTURES, "report.html"])
